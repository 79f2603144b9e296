"""FlashMLA behind our contract (Hopper, bf16, latent 512 + rope 64, pages of 64)."""

from typing import Any, NamedTuple

import flash_mla
from torch import Tensor

from kernels import mla_decode as ours
from kernels.decode_few_heads import Splits


class TilePlan(NamedTuple):
    lens: Tensor  # [B] int32, at least Q because the library reads a row for every query
    metadata: Any  # how the library cuts the sequences; filled in at a step's first call


def decode_plan(kv_lens: Tensor, q_len: int, heads: int) -> TilePlan | Splits:
    """Return the library's plan; with few heads that of our own kernel, which is faster there."""
    splits = ours.decode_plan(kv_lens, q_len, heads)
    return TilePlan(kv_lens.clamp(min=q_len), flash_mla.get_mla_metadata()[0]) if splits is None else splits


def mla_decode(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    v_dim: int | None = None,
    plan: TilePlan | Splits | None = None,
) -> Tensor:
    """Serve `ref.mla_decode` for v_dim 512. A sequence of length 0 may attend the first rows of its first page."""
    assert v_dim == 512, f"{v_dim=}"
    batch, q_len = len(kv_lens), len(q) // max(1, len(kv_lens))
    cut = plan or decode_plan(kv_lens, q_len, q.shape[1])
    if isinstance(cut, Splits):  # `plan`, not `cut`: a plan that was made just now may not be read early
        return ours.mla_decode(q, kv_pages, page_table, kv_lens, scale, v_dim, plan)
    out, _ = flash_mla.flash_mla_with_kvcache(
        q.unflatten(0, (batch, q_len)),
        kv_pages[:, :, None],
        page_table,
        cut.lens,
        512,
        cut.metadata,
        softmax_scale=scale,
        causal=q_len > 1,
    )
    return out.flatten(0, 1)
