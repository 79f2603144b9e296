"""Placement: which physical slot holds which expert.

The gate names E logical experts. They live in P physical slots, L = P / ep slots per rank: slot p is number p % L on
rank p // L. All routing goes through this map, so that experts can be replicated and moved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    slot_of_expert: Tensor  # [layers, E] int64: the slot of each expert to which this rank's tokens go
    expert_of_slot: Tensor  # [layers, P] int64, the same on all ranks
    ep_size: int

    @classmethod
    def identity(
        cls, num_layers: int, num_experts: int, ep_size: int, device: torch.device | str = "cpu"
    ) -> "Placement":
        """Put expert e in slot e. Raises ValueError with the equation if slots do not divide over the ranks."""
        if num_experts % ep_size:
            raise ValueError(
                f"the experts do not divide over the ranks: n_routed_experts % ranks must be 0, "
                f"not {num_experts} % {ep_size} = {num_experts % ep_size}"
            )
        return cls.of_map(torch.arange(num_experts).repeat(num_layers, 1), num_experts, ep_size, device=device)

    @classmethod
    def of_map(
        cls,
        expert_of_slot: Tensor,
        num_experts: int,
        ep_size: int,
        rank: int = 0,
        ranks_per_node: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "Placement":
        """Make the placement of rank `rank` from a map [layers, P] that holds every expert.

        Among an expert's replicas, the rank takes one of its own, else one on its node, else any. Ranks with the same
        candidates take turns. `ranks_per_node` None: there is one node.
        """
        layers, slots = expert_of_slot.shape
        rank_of_slot = torch.arange(slots) // (slots // ep_size)
        node = ranks_per_node or ep_size
        distance = (rank_of_slot // node != rank // node).long() + (rank_of_slot != rank).long()
        choice = expert_of_slot.cpu() * 3 + distance  # 0: on this rank, 1: on its node, 2: elsewhere
        counts = torch.zeros(layers, 3 * num_experts, dtype=torch.int64).scatter_add_(
            1, choice, torch.ones_like(choice)
        )
        per_expert = counts.view(layers, num_experts, 3)
        nearest = (per_expert > 0).long().argmax(-1)  # the smallest distance that occurs
        key = torch.arange(num_experts) * 3 + nearest
        turn = (rank + torch.arange(num_experts)) % per_expert.gather(2, nearest[..., None])[..., 0].clamp(min=1)
        by_choice = choice.argsort(dim=1, stable=True)
        slot = by_choice.gather(1, (counts.cumsum(1) - counts).gather(1, key) + turn)
        return cls(slot.to(device), expert_of_slot.to(device, copy=True), ep_size)

    @property
    def num_slots(self) -> int:
        return self.expert_of_slot.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.ep_size

    def experts_on(self, rank: int, layer: int) -> list[int]:
        """Return the logical experts in the slots of rank `rank`, in slot order."""
        local = slice(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)
        return self.expert_of_slot[layer, local].tolist()

    def replace(self, layer: int, source: "Placement", row: int) -> None:
        """Copy row `row` of `source` to the layer's row, in place: CUDA graphs read at these addresses."""
        self.slot_of_expert[layer].copy_(source.slot_of_expert[row])
        self.expert_of_slot[layer].copy_(source.expert_of_slot[row])


def keep_in_place(before: Tensor, wanted: Tensor, ep_size: int) -> Tensor:
    """Return the map `wanted` [layers, P] with each rank's experts reordered, so that as few as possible move.

    An expert that a rank already has under the map `before` stays in its slot.

        before 0 1 | 2 3, wanted 3 0 | 1 2  ->  0 3 | 2 1
    """
    old, new = (x.reshape(x.shape[0] * ep_size, -1) for x in (before, wanted))  # [layers * ranks, L]
    earlier = torch.ones(old.shape[1], old.shape[1], dtype=torch.bool).tril(-1)
    nth = [((x[:, :, None] == x[:, None]) & earlier).sum(-1) for x in (old, new)]  # number among an expert's replicas
    same = (old[:, :, None] == new[:, None]) & (nth[0][:, :, None] == nth[1][:, None])
    stays, placed = same.any(2), same.any(1)  # per old slot; per new expert
    free, coming = stays.long().argsort(dim=1, stable=True), placed.long().argsort(dim=1, stable=True)
    kept = torch.empty_like(new).scatter_(1, free, new.gather(1, coming))
    return kept.where(~stays, old).view_as(wanted)
