"""The random weights that benchmarks give to a model, ours or a peer's. Imports torch alone: a peer reads it, too."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights under which routing spreads as a trained model's does: the gate's logits have deviation 1."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1)
        elif name.endswith("_scale_inv"):  # the values are of deviation 1
            weight.fill_(model.get_parameter(name.removesuffix("_scale_inv")).shape[-1] ** -0.5)
        elif weight.dtype == torch.float8_e4m3fn:
            for rows in weight.view(-1, weight.shape[-1]).split(2**14):  # a part at a time: there is little room
                rows.copy_(torch.randn(rows.shape, generator=generator, device=weight.device, dtype=torch.bfloat16))
        elif weight.dim() == 1:
            weight.zero_()
        else:
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
