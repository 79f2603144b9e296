"""flash-attn-4 behind our contract (Hopper, bf16; queries and keys of 192, values of 128)."""

import triton
import triton.language as tl
from flash_attn.cute import flash_attn_varlen_func
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.pdl import after_previous, pdl
from kernels.quant import quantize_1x128

WHOLE_KEYS = True  # see `Ops.whole_keys`


@triton.jit
def _keys_kernel(
    k_nope,
    k_rope,
    out,
    token_stride,
    head_stride,
    rope_stride,
    nope: tl.constexpr,
    rope: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL, LET_NEXT=False)  # attention comes next: see kernels/pdl.py
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col, rope_col = tl.arange(0, nope)[None, :], tl.arange(0, rope)[None, :]
    row = out + (token * tl.num_programs(1) * HEADS + head) * (nope + rope)
    tl.store(row + col, tl.load(k_nope + token * token_stride + head * head_stride + col))
    key = tl.load(k_rope + token * rope_stride + rope_col)
    tl.store(row + nope + rope_col, tl.broadcast_to(key, (HEADS, rope)))


def whole_keys(k_nope: Tensor, k_rope: Tensor) -> Tensor:
    """Join k_nope [N, H, 128] and k_rope [N, 64], any row strides -> [N, H, 192], in one pass."""
    (tokens, heads, nope), rope = k_nope.shape, k_rope.shape[1]
    out = k_nope.new_empty(tokens, heads, nope + rope)
    share = next(n for n in (16, 8, 4, 2, 1) if heads % n == 0)  # heads per program
    if tokens:
        _keys_kernel[tokens, heads // share](
            k_nope, k_rope, out, k_nope.stride(0), k_nope.stride(1), k_rope.stride(0), nope, rope, share, **pdl(out)
        )
    return out


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
    """Serve `ref.prefill_attention`. The library aligns queries to the last keys as we do, and wants whole keys."""
    out = flash_attn_varlen_func(
        q,
        whole_keys(k_nope, k_rope),
        v,
        cu_seqlens_q=q_starts,
        cu_seqlens_k=kv_starts,
        max_seqlen_q=max_q,
        max_seqlen_k=max_kv,
        softmax_scale=scale,
        causal=True,
    )
    out = out[0] if isinstance(out, tuple) else out
    return quantize_1x128(out.flatten(1)) if quantize else out
