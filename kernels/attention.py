"""Attention in Triton: paged MLA decode (split-KV) and ragged causal prefill, for Hopper's TMA and wgmma.

Both keep a running maximum and sum per query row (FlashAttention-2, Dao 2023), and use base-2 exponentials. They read
keys and values with TMA: one thread asks for a whole tile, and the copy engine fills shared memory while the tensor
cores work. TMA fills everything past the edge with zeros.

Head dims need not be powers of two: columns come as a MAIN and a REST part, two dots into one accumulator. Decode cuts
a cache row this way (576 = 512 + 64). Prefill's keys have two parts anyway: a head's own 128 columns, and the 64 that
all heads share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import decode_hopper, prefill_hopper
from kernels.fp8 import Quantized
from kernels.pdl import after_previous, pdl
from kernels.quant import GROUP, fp8_like, quantize_1x128

PAGE = 64  # rows of a KV page
LOG2_E = 1.4426950408889634


@triton.jit
def _scores(q_main, q_rest, k_main, k_rest, HAS_REST: tl.constexpr):
    scores = tl.dot(q_main, k_main.T, input_precision="ieee")  # [M, N]
    if HAS_REST:
        scores = tl.dot(q_rest, k_rest.T, scores, input_precision="ieee")
    return scores


@triton.jit
def _softmax_step(scores, top, scale):
    """Do one block of the running softmax: return its weights, the new maximum, and the factor for earlier blocks."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    return tl.exp2(scores * scale - new_top[:, None]), new_top, tl.exp2(top - new_top)


@triton.jit
def _load_kv(kv_main, kv_rest, page_table, n, PAGE: tl.constexpr, MAIN: tl.constexpr, HAS_REST: tl.constexpr):
    row = tl.load(page_table + n // PAGE) * PAGE + n % PAGE
    main = kv_main.load([row, 0])  # [N, MAIN]
    rest = kv_rest.load([row, MAIN]) if HAS_REST else main
    return main, rest


@triton.jit
def _split_plan(kv_lens, seq, batch, splits, most, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return how a sequence is cut: blocks per split, and splits in use (0 for an empty sequence).

    A sequence of average length gets `splits`, others more or fewer in proportion, so all programs take about as long.
    """
    index = tl.arange(0, BLOCK_B)
    all_blocks = tl.sum(tl.cdiv(tl.load(kv_lens + index, mask=index < batch, other=0), BLOCK_N), 0)
    blocks = tl.cdiv(tl.load(kv_lens + seq), BLOCK_N)
    wanted = (2 * splits * batch * blocks + all_blocks) // tl.maximum(2 * all_blocks, 1)  # rounded
    wanted = tl.maximum(tl.minimum(tl.minimum(wanted, most), blocks // 2), 1)
    chunk = tl.maximum(tl.cdiv(blocks, wanted), 1)
    return chunk, tl.cdiv(blocks, chunk)


@triton.jit
def _decode_kernel(
    q_ptr, kv_main, kv_rest, page_table, kv_lens, out_ptr, partial_ptr, lse_ptr, used_ptr, heads, splits, scale,
    q_stride, q_head_stride, table_stride, kv_dim: tl.constexpr, v_dim: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PAGE: tl.constexpr,
    REST_VALUES: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    split, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + seq)
    chunk, used = _split_plan(kv_lens, seq, tl.num_programs(2), splits, tl.num_programs(1), BLOCK_N, BLOCK_B)
    if split == 0 and tl.program_id(0) == 0:
        tl.store(used_ptr + seq, used)
    if split >= tl.maximum(used, 1):
        return
    first = split * chunk * BLOCK_N
    last = tl.minimum(first + chunk * BLOCK_N, kv_len)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    col, rest_col = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    has_rest: tl.constexpr = kv_dim > MAIN
    q_row = q_ptr + seq * q_stride + head[:, None] * q_head_stride
    q_main = tl.load(q_row + col, mask=head[:, None] < heads, other=0.0)  # [BLOCK_H, MAIN]
    q_rest = q_main
    if has_rest:
        q_rest = tl.load(q_row + rest_col, mask=(head[:, None] < heads) & (rest_col < kv_dim), other=0.0)
    page_table += seq * table_stride

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)  # summed over columns once, at the end
    acc = tl.zeros([BLOCK_H, MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_H, REST], tl.float32)
    whole = first + (last - first) // BLOCK_N * BLOCK_N
    for n in range(first, whole, BLOCK_N):
        main, rest = _load_kv(kv_main, kv_rest, page_table, n, PAGE, MAIN, has_rest)
        scores = _scores(q_main, q_rest, main, rest, has_rest)
        weights, top, shrink = _softmax_step(scores, top, scale)
        total = total * shrink[:, None] + weights
        weights = weights.to(main.dtype)
        acc = tl.dot(weights, main, acc * shrink[:, None], input_precision="ieee")
        if REST_VALUES:
            acc_rest = tl.dot(weights, rest, acc_rest * shrink[:, None], input_precision="ieee")
    if whole < last:  # the last page's unused rows may hold anything, even NaN
        here = whole + tl.arange(0, BLOCK_N) < last
        main, rest = _load_kv(kv_main, kv_rest, page_table, whole, PAGE, MAIN, has_rest)
        main = tl.where(here[:, None], main, 0.0)
        rest = tl.where(here[:, None], rest, 0.0)
        scores = tl.where(here[None], _scores(q_main, q_rest, main, rest, has_rest), float("-inf"))
        weights, top, shrink = _softmax_step(scores, top, scale)
        total = total * shrink[:, None] + weights
        weights = weights.to(main.dtype)
        acc = tl.dot(weights, main, acc * shrink[:, None], input_precision="ieee")
        if REST_VALUES:
            acc_rest = tl.dot(weights, rest, acc_rest * shrink[:, None], input_precision="ieee")

    norm = tl.sum(total, 1)
    norm_or_1 = tl.where(norm > 0, norm, 1.0)  # an empty sequence gives zeros
    acc, acc_rest = acc / norm_or_1[:, None], acc_rest / norm_or_1[:, None]
    here, here_rest = (head[:, None] < heads) & (col < v_dim), (head[:, None] < heads) & (rest_col < v_dim)
    if used <= 1:
        kind = out_ptr.dtype.element_ty
        out = out_ptr + (seq * heads + head[:, None]) * v_dim
        tl.store(out + col, acc.to(kind), mask=here)
        if REST_VALUES:
            tl.store(out + rest_col, acc_rest.to(kind), mask=here_rest)
    else:
        place = (seq * tl.num_programs(1) + split) * heads + head  # [BLOCK_H]
        partial = partial_ptr + place[:, None] * v_dim
        tl.store(partial + col, acc, mask=here)
        if REST_VALUES:
            tl.store(partial + rest_col, acc_rest, mask=here_rest)
        tl.store(lse_ptr + place, top + tl.log2(norm), mask=head < heads)


@triton.jit
def _combine_kernel(
    partial, lse_ptr, used_ptr, out, heads, most, v_dim, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of one sequence, weighted by their share of the softmax sum."""
    after_previous(PDL)
    head, seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    used = tl.load(used_ptr + seq)
    if used <= 1:
        return
    split, col = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    top, total = float("-inf"), 0.0
    for first in range(0, used, BLOCK_S):  # BLOCK_S loads in flight
        here = first + split < used
        place = (seq * most + first + split) * heads + head  # [BLOCK_S]
        lse = tl.load(lse_ptr + place, mask=here, other=float("-inf"))
        rows = tl.load(
            partial + place[:, None] * v_dim + col, mask=here[:, None] & (col < v_dim), other=0.0
        )  # [BLOCK_S, BLOCK_V]
        new_top = tl.maximum(top, tl.max(lse, 0))
        shrink, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        acc = acc * shrink + tl.sum(weight[:, None] * rows, 0)
        total, top = total * shrink + tl.sum(weight, 0), new_top
    tl.store(out + (seq * heads + head) * v_dim + col, (acc / total).to(out.dtype.element_ty), mask=col < v_dim)


def _columns(dim: int) -> tuple[int, int]:
    """Cut `dim` in two: MAIN, its largest power of two, and REST, the power of two that covers the remainder."""
    main = 1 << dim.bit_length() - 1
    return main, max(16, triton.next_power_of_2(dim - main))


def _choose_splits(programs: int, pages: int, device: torch.device) -> int:
    """Return the number of splits, for a sequence of average length, that should finish first.

    The estimate: a sequence holds at most 32 pages, and starting a program costs as much as 2 pages. A program fills a
    whole SM, so 192 of them on 132 SMs take two waves at 73 % of the machine. Split in two, 384 take three half waves
    at 97 %.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    max_splits = max(1, min(64, pages // 2))
    return min(range(1, max_splits + 1), key=lambda s: -(-programs * s // sms) * (-(-min(pages, 32) // s) + 2))


def mla_decode(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    v_dim: int | None = None,
    plan: None = None,
) -> Tensor:
    """Attend one query token per sequence with absorbed MLA. Contract: `ref.mla_decode`; `v_dim` None: all columns.

    q [B, H, C + R], kv_pages [pages, 64, C + R], both bf16 or both float32; page_table [B, P] int32, kv_lens [B] int32
    -> [B, H, v_dim]. Length 0 gives zeros. The grid depends on shapes alone, and the host reads no length: safe in a
    CUDA graph.

    64 heads share a program, so it reads a page into shared memory once. The page serves as keys, and its first columns
    as values. Sequences are cut into splits that fill the GPU evenly; a second kernel merges the splits. On Hopper,
    bf16 with v_dim <= C takes `decode_hopper`: pass v_dim.
    """
    batch, heads, kv_dim = q.shape
    v_dim = v_dim or kv_dim
    out = q.new_empty(batch, heads, v_dim)
    if out.numel() == 0:
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()
    fast = q.dtype == torch.bfloat16  # float32 multiplies outside the tensor cores: small tiles
    block_h, block_n = (64, PAGE) if fast else (16, 16)
    main, rest = _columns(kv_dim)
    rows = kv_pages.view(-1, kv_dim)
    groups = triton.cdiv(heads, block_h)
    splits = _choose_splits(batch * groups, page_table.shape[1], q.device)
    max_splits = splits
    if batch > 1:  # a long sequence among short ones takes more than the average
        max_splits = min(2 * splits, max(1, page_table.shape[1] // 2))
    partial = torch.empty(batch, max_splits, heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, max_splits, heads, dtype=torch.float32, device=q.device)
    used = torch.empty(batch, dtype=torch.int32, device=q.device)
    if decode_hopper.can_decode(q, main, v_dim):
        decode_hopper.launch_decode(
            q, rows, page_table, kv_lens, out, partial, lse, used, splits, scale * LOG2_E, main, rest
        )
    else:
        _decode_kernel[groups, max_splits, batch](
            q, TensorDescriptor.from_tensor(rows, [block_n, main]), TensorDescriptor.from_tensor(rows, [block_n, rest]),
            page_table, kv_lens, out, partial, lse, used, heads, splits, scale * LOG2_E, q.stride(0), q.stride(1),
            page_table.stride(0), kv_dim, v_dim, BLOCK_H=block_h, BLOCK_N=block_n, MAIN=main, REST=rest, PAGE=PAGE,
            REST_VALUES=v_dim > main, BLOCK_B=triton.next_power_of_2(batch), num_stages=2 if fast else 1,
            num_warps=8 if fast else 4, **pdl(q),
        )  # fmt: skip
    if max_splits > 1:
        _combine_kernel[heads, batch](
            partial, lse, used, out, heads, max_splits, v_dim, BLOCK_S=8, BLOCK_V=triton.next_power_of_2(v_dim),
            **pdl(q),
        )  # fmt: skip
    return out


@triton.jit
def _prefill_kernel(
    q_ptr, k_main, k_rest, v_desc, q_starts, kv_starts, out_ptr, heads, scale, q_stride, q_head_stride,
    nope: tl.constexpr, rope: tl.constexpr, dv: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
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
        weights, top, shrink = _softmax_step(_scores(q_main, q_rest, main, rest, True), top, scale)
        total = total * shrink + tl.sum(weights, 1)
        v = v_desc.load([kv_start + n, head, 0]).reshape(BLOCK_N, BLOCK_V)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    for n in range(open_end, end, BLOCK_N):  # the diagonal
        key = n + tl.arange(0, BLOCK_N)
        main = k_main.load([kv_start + n, head, 0]).reshape(BLOCK_N, MAIN)
        rest = k_rest.load([kv_start + n, 0])
        scores = _scores(q_main, q_rest, main, rest, True)
        weights, top, shrink = _softmax_step(tl.where(key <= reach[:, None], scores, float("-inf")), top, scale)
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
    block_m, block_n = (128, 64) if fast else (32, 16)
    main, rest = triton.next_power_of_2(nope), max(16, triton.next_power_of_2(rope))
    if prefill_hopper.can_prefill(q, k_nope, k_rope, v):
        prefill_hopper.launch_prefill(q, k_nope, k_rope, v, q_starts, kv_starts, out, scales, max_q, scale * LOG2_E)
        return (out, scales) if quantize else out
    block_v = max(16, triton.next_power_of_2(dv))
    _prefill_kernel[triton.cdiv(max_q, block_m), heads, len(q_starts) - 1](
        q, TensorDescriptor.from_tensor(k_nope, [block_n, 1, main]),
        TensorDescriptor.from_tensor(k_rope, [block_n, rest]),
        TensorDescriptor.from_tensor(v, [block_n, 1, block_v]), q_starts, kv_starts, out, heads, scale * LOG2_E,
        q.stride(0), q.stride(1), nope, rope, dv, BLOCK_M=block_m, BLOCK_N=block_n, MAIN=main, REST=rest,
        BLOCK_V=block_v, num_warps=8 if fast else 4, num_stages=3 if fast else 1,
    )  # fmt: skip
    return out
