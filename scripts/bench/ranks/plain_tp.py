"""Plain tensor parallelism of a whole model, which is what wide expert parallelism is compared with: all ranks are one
attention replica, and each holds a slice of every expert.

Attention, dense FFN and LM head are the project's own with --attn-tp as large as the job. Of the experts each rank has
all, with a share of their width, so that to it they are all local; around them the tokens, which attention leaves
scattered over the ranks, are gathered, and the experts' partial sums are reduced.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.fp8 import Quantized
from model.config import ModelConfig
from parallel.dispatch import Contiguous, Copies, LocalContiguous, Masked, Pending
from parallel.dispatchers import Dispatchers
from parallel.mesh import Group, Mesh


def plain_tp(mesh: Mesh, config: ModelConfig) -> tuple[Mesh, ModelConfig]:
    """The mesh, and what one rank's share of the model is. ValueError for what does not divide."""
    if config.moe_intermediate_size % mesh.size:
        raise ValueError(
            f"plain tensor parallelism: moe_intermediate_size % ranks must be 0, not {config.moe_intermediate_size} % "
            f"{mesh.size} = {config.moe_intermediate_size % mesh.size}"
        )
    share = config.moe_intermediate_size // mesh.size
    # A rank has its tokens' shared experts whole: as much work as a share of all tokens'.
    shared = config.n_shared_experts * mesh.size
    attn = Group(mesh.size, mesh.rank, dist.group.WORLD) if mesh.size > 1 else Group()
    sliced = replace(config, moe_intermediate_size=share, n_shared_experts=shared)
    return replace(mesh, attn=attn, ep=Group()), sliced


def sliced_experts(local: Dispatchers, mesh: Mesh) -> Dispatchers:
    """For experts that are sliced over the mesh's attention group, from the dispatchers of a rank that has them all."""
    contiguous, masked = (SlicedExperts(mesh.attn, one) for one in (local.contiguous, local.masked))
    return Dispatchers(contiguous, masked, "none: each rank holds a slice of every expert")


class SlicedExperts:
    """A dispatcher that sends tokens to everybody, and sums what everybody makes of them."""

    casts, num_sms = False, 0

    def __init__(self, group: Group, local: LocalContiguous):
        self.group, self.local = group, local

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous | Masked | Copies]:
        """x [T / t, D], slots, weights [T / t, K] -> all ranks' tokens [T, ...], grouped."""
        gather = self.group.all_gather
        if isinstance(x, Tensor):
            x = gather(x)
        else:
            values, scales = x
            x = gather(values.view(torch.uint8)).view(values.dtype), gather(scales)
        return self.local.dispatch(x, gather(slots), gather(weights))

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """-> [T / t, D]: this rank's tokens, summed over all ranks' slices."""
        mine = self.group.reduce_scatter(self.local.combine(y, way_back).wait())
        return Pending(lambda: lambda: mine if plus is None else mine + plus)
