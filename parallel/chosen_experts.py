"""Chosen experts: the logical ones that the gates pick for each token of a step, for requests with `return_experts`.

Training on generated text replays these choices, so that the trained model runs the experts that served the text
(https://arxiv.org/abs/2510.11370). A step records only if one of its requests asks:

    slots [T / t, K] of each layer --the map that the layer used--> experts [T / t, layers, K] --all-gather--> [T, ...]

T is the step's tokens, padding included. t is the attention TP size: each rank's gate sees T / t tokens. Two halves
that overlap take turns, so each has a part of its own.
"""

import torch
from torch import Tensor

from parallel.mesh import Group
from parallel.placement import Placement

ID_BYTES = 2  # an expert is a little-endian uint16, everywhere behind the GPU
MOST_EXPERTS = 2 ** (8 * ID_BYTES)  # that these bytes can tell apart


class Part:
    """The choices of one micro-batch."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.layers: list[Tensor] = []  # per MoE layer so far: [T / t, K] int16, bit by bit the uint16

    def add(self, layer: int, slots: Tensor) -> None:
        """Record slots [T / t, K] of an MoE layer. A padding row, whose slots are -1, gets any experts.

        The map is read on the steps' stream. So a move of experts between two steps changes no row of the earlier one.
        """
        self.layers.append(self.placement.expert_of_slot[layer][slots].to(torch.int16))

    def rows(self, attn: Group) -> Tensor:
        """Return the micro-batch's rows [T, layers, K] int16, of all ranks of the replica. Collective."""
        rows = torch.stack(self.layers, dim=1)
        return attn.all_gather(rows.view(torch.uint8)).view(torch.int16)  # gloo and NCCL have no 16-bit integers


class ChosenExperts:
    """The choices of one step on one rank. The model makes a part per micro-batch, in row order."""

    def __init__(self, placement: Placement, attn: Group) -> None:
        self.placement, self.attn = placement, attn
        self.parts: list[Part] = []

    def part(self) -> Part:
        self.parts.append(Part(self.placement))
        return self.parts[-1]

    def rows(self) -> Tensor:
        """Return the step's rows [T, layers, K] int16, on the device. Collective in the replica; call it once."""
        return torch.cat([part.rows(self.attn) for part in self.parts])
