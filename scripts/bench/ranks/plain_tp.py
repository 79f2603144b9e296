"""Plain tensor parallelism of a whole model, to compare wide expert parallelism with.

All ranks are one attention replica, and each holds a slice of every expert. Attention, dense FFN and LM head are the
project's own, with --attn-tp equal to the number of ranks. A rank has a part of every expert's width, so all experts
are local to it. Attention leaves the tokens scattered over the ranks: they are gathered before the experts, and the
experts' partial sums are reduced and scattered after them.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.addends import summed
from kernels.fp8 import Quantized
from model.config import ModelConfig
from parallel.dispatch import Contiguous, Copies, LocalContiguous, Masked, Pending
from parallel.dispatchers import Dispatchers
from parallel.mesh import Group, Mesh


def plain_tp(mesh: Mesh, config: ModelConfig) -> tuple[Mesh, ModelConfig]:
    """Return the mesh, and the configuration of one rank's share. Raises ValueError if the width does not divide."""
    if config.moe_intermediate_size % mesh.size:
        raise ValueError(
            f"plain tensor parallelism: moe_intermediate_size % ranks must be 0, not {config.moe_intermediate_size} % "
            f"{mesh.size} = {config.moe_intermediate_size % mesh.size}"
        )
    share = config.moe_intermediate_size // mesh.size
    # A rank computes the whole shared expert, but only for its own tokens. That is as much work as a slice for all.
    shared = config.n_shared_experts * mesh.size
    attn = Group(mesh.size, mesh.rank, dist.group.WORLD) if mesh.size > 1 else Group()
    sliced = replace(config, moe_intermediate_size=share, n_shared_experts=shared)
    return replace(mesh, attn=attn, ep=Group()), sliced


def sliced_experts(local: Dispatchers, mesh: Mesh) -> Dispatchers:
    """Return dispatchers for experts that are sliced over the attention group. `local`: those of one rank alone."""
    contiguous, masked = (SlicedExperts(mesh.attn, one) for one in (local.contiguous, local.masked))
    return Dispatchers(contiguous, masked, "none: each rank holds a slice of every expert")


class SlicedExperts:
    """A dispatcher that sends every token to all ranks, and sums their results."""

    casts, num_sms = False, 0

    def __init__(self, group: Group, local: LocalContiguous) -> None:
        self.group, self.local = group, local

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous | Masked | Copies]:
        """Gather x [T / t, D], slots and weights [T / t, K] from all ranks, and group the tokens [T, ...] by expert."""
        gather = self.group.all_gather
        if isinstance(x, Tensor):
            x = gather(x)
        else:
            values, scales = x
            x = gather(values.view(torch.uint8)).view(values.dtype), gather(scales)
        return self.local.dispatch(x, gather(slots), gather(weights))

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """Return this rank's tokens [T / t, D], summed over the slices of all ranks."""
        partial = summed(self.local.combine(y, way_back).wait(), self.local.ops.ep_gather)
        out = self.group.reduce_scatter(partial)
        return Pending(lambda: lambda: out if plus is None else out + plus)
