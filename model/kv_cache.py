"""Paged latent KV: one pool of pages for all layers.

Per token and layer, MLA caches only the normed latent and the rotated shared key: C + R numbers instead of
2 x heads x head_dim (DeepSeek-V2, section 2.1).
"""

import hashlib

import torch
from torch import Tensor

from model.config import ModelConfig
from model.pages import PAGE
from model.transformer import Transformer


def make_pool(config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Allocate [layers, pages, PAGE, C + R], zeroed so that a stray read is finite.

    The multi-token-prediction layer, if it drafts, is the last of the layers.
    """
    return torch.zeros(config.kv_layers, num_pages, PAGE, config.kv_dim, dtype=dtype, device=device)


def kv_layout(model: Transformer, pool: Tensor) -> dict[str, str]:
    """Return the properties in which both sides of a KV handoff must agree: the pool's rows, and the model.

    The model is identified by a hash of its configuration and its norms, which every rank holds unsplit. The
    configuration's own hash is what a router can compare, which has no weights. The multi-token-prediction layer is not
    among them: whether it is there is a flag's doing.
    """
    config = model.config.fingerprint
    model_hash = hashlib.sha256(config.encode())
    for name, weight in model.named_parameters():
        if "norm" in name and not name.startswith("mtp."):
            norm = weight.detach().cpu().bfloat16()  # the same for every --dtype
            model_hash.update(norm.view(torch.uint8).numpy().tobytes())
    _, _, page, width = pool.shape
    dtype = str(pool.dtype).removeprefix("torch.")
    shape = {"page": page, "width": width, "dtype": dtype, "model": model_hash.hexdigest()[:8]}
    shape["layers"] = model.config.num_hidden_layers
    shape["config"] = config
    return {name: str(value) for name, value in shape.items()}
