"""Random weights, to run any config.json without a checkpoint: the same on every rank, however tensors are split.

The numbers depend on a tensor's name, shape and row alone, and on the kind of device that makes them. Matrices have
standard deviation 1 / sqrt(columns), so activations and the gate's logits stay of the order of 1, and routing spreads
as in trained models. Norms are 1 and biases 0.

This file imports only torch. `scripts/bench/engine/peer.py` loads it by its path, in other engines' environments.
"""

import hashlib

import torch
from torch import Tensor, nn

ROWS = 1024  # made at once, with one seed: whole blocks of 128


def random_part(
    name: str, shape: tuple[int, ...], rows: tuple[int, int], device: torch.device | str, unit: bool = False
) -> Tensor:
    """Return the rows first..end of a tensor of this name and shape -> [end - first, ...] float32.

    `unit`: with standard deviation 1, for values in fp8 whose scales have the rest.
    """
    if "norm" in name:
        return torch.ones(rows[1] - rows[0], *shape[1:], device=device)
    if len(shape) == 1:
        return torch.zeros(rows[1] - rows[0], device=device)
    made = []
    for block in range(rows[0] // ROWS, -(-rows[1] // ROWS)):
        first, end = block * ROWS, min((block + 1) * ROWS, shape[0])
        seed = hashlib.sha256(f"{name} {block}".encode()).digest()[:7]
        generator = torch.Generator(device).manual_seed(int.from_bytes(seed, "little"))
        values = torch.randn(end - first, *shape[1:], generator=generator, device=device)
        made.append(values[max(rows[0] - first, 0) : rows[1] - first])
    values = torch.cat(made) if len(made) > 1 else made[0]
    return values if unit else values.mul_(deviation(shape))


def deviation(shape: tuple[int, ...]) -> float:
    """Return the standard deviation of a matrix's values."""
    return shape[-1] ** -0.5


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Fill all parameters of a module, for benchmarks: of ours, or of another engine's model.

    In contrast to `DummyWeights`, the numbers follow the module's own names: each rank gets its own experts' names.
    """
    for name, weight in model.named_parameters():
        if name.endswith("_scale_inv"):
            weight.fill_(deviation(tuple(model.get_parameter(name.removesuffix("_scale_inv")).shape)))
            continue
        if weight.dim() > 2 and weight.untyped_storage().nbytes() > weight.nbytes:
            continue  # a part of another parameter, which fills it (vLLM's W_UV and W_UK_T)
        matrix = weight.view(-1, weight.shape[-1]) if weight.dim() > 2 else weight
        for first in range(0, len(matrix), ROWS):  # in parts, because little memory may be free
            end = min(first + ROWS, len(matrix))
            unit = weight.dtype == torch.float8_e4m3fn
            matrix[first:end].copy_(random_part(name, tuple(matrix.shape), (first, end), weight.device, unit))
