"""Random weights for the benchmarks' models, ours and a peer's. Imports only torch, because peer.py imports it too."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Fill all parameters. The gate's logits get standard deviation 1, so that routing spreads as in trained models."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1)
        elif name.endswith("_scale_inv"):  # the values have standard deviation 1
            weight.fill_(model.get_parameter(name.removesuffix("_scale_inv")).shape[-1] ** -0.5)
        elif weight.dtype == torch.float8_e4m3fn:
            for rows in weight.view(-1, weight.shape[-1]).split(2**14):  # in parts: little memory is free
                rows.copy_(torch.randn(rows.shape, generator=generator, device=weight.device, dtype=torch.bfloat16))
        elif weight.dim() == 1:
            weight.zero_()
        else:
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
