"""Paged latent KV: one pool of pages for all layers.

Per token and layer, MLA caches only the normed latent and the rotated shared key: C + R numbers instead of
2 x heads x head_dim (DeepSeek-V2, section 2.1).
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.pages import PAGE


def make_pool(config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Allocate [layers, pages, PAGE, C + R], zeroed so that a stray read is finite.

    The multi-token-prediction layer, if it drafts, is the last of the layers.
    """
    return torch.zeros(config.kv_layers, num_pages, PAGE, config.kv_dim, dtype=dtype, device=device)
