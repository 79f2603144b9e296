"""FlashMLA behind our contract (Hopper, bf16, latent 512 + rope 64, pages of 64)."""

import flash_mla
import torch
from torch import Tensor


def mla_decode(
    q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, scale: float, v_dim: int | None = None
) -> Tensor:
    """`ref.mla_decode` for v_dim 512. A sequence of length 0 reads one row of its first page, and gives zeros."""
    assert v_dim == 512, f"{v_dim=}"
    metadata, _ = flash_mla.get_mla_metadata()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q[:, None], kv_pages[:, :, None], page_table, kv_lens.clamp(min=1), 512, metadata, softmax_scale=scale
    )
    return torch.where(kv_lens[:, None, None] > 0, out[:, 0], 0)
