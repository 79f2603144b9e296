"""Ragged causal prefill in Triton. `attention.py` says what it shares with decode."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import prefill_hopper
from kernels.attention import LOG2_E, attention_scores, softmax_step
from kernels.fp8 import Quantized
from kernels.quant import GROUP, fp8_like, quantize_1x128

# Columns of a key and a value: three buffers of 64 rows and 128 queries fit the shared memory of an SM (227 KB). Wider
# ones (GLM-4.7-Flash: 256 + 64 + 256, after padding) take 32 rows: 108 KB, and 80 KB of queries.
WIDEST = 384


@triton.jit(do_not_specialize=["q_starts", "kv_starts"])
def _prefill_kernel(
    q_ptr,
    k_main,
    k_rest,
    v_desc,
    q_starts,
    kv_starts,
    out_ptr,
    heads,
    scale,
    q_stride,
    q_head_stride,
    nope: tl.constexpr,
    rope: tl.constexpr,
    dv: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    block, head, seq = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, kv_start = tl.load(q_starts + seq).to(tl.int32), tl.load(kv_starts + seq).to(tl.int32)
    num_q = tl.load(q_starts + seq + 1).to(tl.int32) - q_start
    num_kv = tl.load(kv_starts + seq + 1).to(tl.int32) - kv_start
    if block * BLOCK_M >= num_q:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    reach = row + num_kv - num_q  # the last key that each query sees
    col, rest_col = tl.arange(0, MAIN), tl.arange(0, REST)
    q_row = q_ptr + (q_start + row[:, None]).to(tl.int64) * q_stride + head * q_head_stride
    q_main = tl.load(q_row + col, mask=(row[:, None] < num_q) & (col < nope), other=0.0)  # [BLOCK_M, MAIN]
    q_rest = tl.load(q_row + nope + rest_col, mask=(row[:, None] < num_q) & (rest_col < rope), other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    first_reach = block * BLOCK_M + num_kv - num_q
    open_end = (first_reach + 1) // BLOCK_N * BLOCK_N  # every query of the block sees all keys before this one
    end = tl.minimum(first_reach + BLOCK_M, num_kv)  # and none sees a key from here on
    for n in range(0, open_end, BLOCK_N):
        main = k_main.load([kv_start + n, head, 0]).reshape(BLOCK_N, MAIN)
        rest = k_rest.load([kv_start + n, 0])
        weights, top, shrink = softmax_step(attention_scores(q_main, q_rest, main, rest, True), top, scale)
        total = total * shrink + tl.sum(weights, 1)
        v = v_desc.load([kv_start + n, head, 0]).reshape(BLOCK_N, BLOCK_V)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    for n in range(open_end, end, BLOCK_N):  # the diagonal
        key = n + tl.arange(0, BLOCK_N)
        main = k_main.load([kv_start + n, head, 0]).reshape(BLOCK_N, MAIN)
        rest = k_rest.load([kv_start + n, 0])
        scores = attention_scores(q_main, q_rest, main, rest, True)
        weights, top, shrink = softmax_step(tl.where(key <= reach[:, None], scores, float("-inf")), top, scale)
        total = total * shrink + tl.sum(weights, 1)
        v = v_desc.load([kv_start + n, head, 0]).reshape(BLOCK_N, BLOCK_V)
        v = tl.where(key[:, None] < num_kv, v, 0.0)  # past the end are the next sequence's values, or NaN
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    acc = acc / total[:, None]
    v_col = tl.arange(0, BLOCK_V)
    out = out_ptr + ((q_start + row[:, None]).to(tl.int64) * heads + head) * dv + v_col
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row[:, None] < num_q) & (v_col < dv))


def _for_tma(x: Tensor) -> Tensor:
    """Return x, or a copy if TMA cannot address it. Its last stride must be 1, all else a multiple of 16 bytes."""
    aligned = all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def prefill_attention(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    max_q: int,
    max_kv: int,
    scale: float,
    quantize: bool = False,
) -> Tensor | Quantized:
    """Attend causally over ragged sequences whose queries are the LAST tokens of their keys: `ref.prefill_attention`.

    q [sum q, H, nope + R], k_nope [sum kv, H, nope], v [sum kv, H, dv], q_starts, kv_starts [S + 1] -> [sum q, H, dv].
    All heads share k_rope [sum kv, R]. Tensors are all bf16 or all float32; dims are multiples of 8. Rows may be
    strided: k_nope and v are parts of kv_b_proj's output. With `quantize`: values [sum q, H dv], and scales in the
    layout of `quant.fp8_like`. On Hopper, if dv is the number of columns per scale, that happens in the same pass.

    One program attends 128 queries of one head. Blocks of keys that all of them see skip the mask, and blocks that none
    sees are skipped whole. The programs with the most keys start first. Hopper and bf16: `prefill_hopper`.
    """
    (_, heads, nope), rope, dv = k_nope.shape, k_rope.shape[1], v.shape[2]
    q, k_nope, k_rope, v = _for_tma(q), _for_tma(k_nope), _for_tma(k_rope), _for_tma(v)
    fused = quantize and dv == GROUP.value and prefill_hopper.can_prefill(q, k_nope, k_rope, v)
    if quantize and not fused:
        out = prefill_attention(q, k_nope, k_rope, v, q_starts, kv_starts, max_q, max_kv, scale)
        return quantize_1x128(out.flatten(1))
    if fused:
        out, scales = fp8_like(q.flatten(1), heads * dv)
    else:
        out, scales = v.new_empty(q.shape[0], heads, dv), None
    if out.numel() == 0 or max_q == 0:
        return (out, scales) if quantize else out
    fast = q.dtype == torch.bfloat16  # float32 multiplies outside the tensor cores: small tiles
    main, rest = triton.next_power_of_2(nope), max(16, triton.next_power_of_2(rope))
    block_v = max(16, triton.next_power_of_2(dv))
    block_m, block_n = (128, 64) if fast else (32, 16)
    if fast and main + rest + block_v > WIDEST:
        block_n = 32
    if prefill_hopper.can_prefill(q, k_nope, k_rope, v):
        prefill_hopper.launch_prefill(q, k_nope, k_rope, v, q_starts, kv_starts, out, scales, max_q, scale * LOG2_E)
        return (out, scales) if quantize else out
    _prefill_kernel[triton.cdiv(max_q, block_m), heads, len(q_starts) - 1](
        q,
        TensorDescriptor.from_tensor(k_nope, [block_n, 1, main]),
        TensorDescriptor.from_tensor(k_rope, [block_n, rest]),
        TensorDescriptor.from_tensor(v, [block_n, 1, block_v]),
        q_starts,
        kv_starts,
        out,
        heads,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        nope,
        rope,
        dv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        MAIN=main,
        REST=rest,
        BLOCK_V=block_v,
        num_warps=8 if fast else 4,
        num_stages=3 if fast else 1,
    )
    return out
