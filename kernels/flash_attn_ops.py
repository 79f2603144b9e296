"""flash-attn-4 behind our contract (Hopper, bf16; queries and keys of 192, values of 128)."""

from flash_attn.cute import flash_attn_varlen_func
from torch import Tensor


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, kv_starts: Tensor, max_q: int, max_kv: int, scale: float
) -> Tensor:
    """`ref.prefill_attention`: the library, too, takes the queries for the last of their keys."""
    out = flash_attn_varlen_func(
        q, k, v.contiguous(), cu_seqlens_q=q_starts, cu_seqlens_k=kv_starts, max_seqlen_q=max_q, max_seqlen_k=max_kv,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out
