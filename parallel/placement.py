"""Placement: which physical slot holds which expert.

E logical experts (what the gate names) live in P physical slots, L = P / ep slots on each rank: slot p is number
p % L on rank p // L. All routing goes through this map, so that experts can be replicated and moved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    slot_of_expert: Tensor  # [layers, E] int64: of an expert's slots, the one that this rank's tokens go to
    expert_of_slot: Tensor  # [layers, P] int64, the same on all ranks
    ep_size: int

    @classmethod
    def identity(
        cls, num_layers: int, num_experts: int, ep_size: int, device: torch.device | str = "cpu"
    ) -> "Placement":
        """Expert e in slot e. ValueError spells the equation if the slots do not divide over the ranks."""
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
        """From a map [layers, P] that holds every expert: rank `rank`'s choice among replicas is one on itself, else
        one on its node (`ranks_per_node` ranks; None: there is one node), else any; ranks with equal choice take turns.
        """
        layers, slots = expert_of_slot.shape
        rank_of_slot = torch.arange(slots) // (slots // ep_size)
        node = ranks_per_node or ep_size
        far = (rank_of_slot // node != rank // node).long() + (rank_of_slot != rank).long()  # 0 mine, 1 my node's, 2
        choice = expert_of_slot.cpu() * 3 + far  # replicas of an expert, by how far they are
        counts = torch.zeros(layers, 3 * num_experts, dtype=torch.int64).scatter_add_(
            1, choice, torch.ones_like(choice)
        )
        per_expert = counts.view(layers, num_experts, 3)
        nearest = (per_expert > 0).long().argmax(-1)  # the first kind that there is
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
        """The logical experts in this rank's slots, in slot order."""
        local = slice(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)
        return self.expert_of_slot[layer, local].tolist()

    def replace(self, layer: int, source: "Placement", row: int) -> None:
        """In place, for CUDA graphs read at these addresses: row `row` of `source` becomes the layer's."""
        self.slot_of_expert[layer].copy_(source.slot_of_expert[row])
        self.expert_of_slot[layer].copy_(source.expert_of_slot[row])


def keep_in_place(before: Tensor, wanted: Tensor, ep_size: int) -> Tensor:
    """The map `wanted` [layers, P] with each rank's experts in another order: one that it has `before`, too, stays
    in its slot, so that only what a rank lacks has to come.

        before 0 1 | 2 3, wanted 3 0 | 1 2  ->  0 3 | 2 1
    """
    old, new = (x.reshape(x.shape[0] * ep_size, -1) for x in (before, wanted))  # [layers * ranks, L]
    earlier = torch.ones(old.shape[1], old.shape[1], dtype=torch.bool).tril(-1)
    nth = [((x[:, :, None] == x[:, None]) & earlier).sum(-1) for x in (old, new)]  # of several of an expert, which one
    same = (old[:, :, None] == new[:, None]) & (nth[0][:, :, None] == nth[1][:, None])
    stays, placed = same.any(2), same.any(1)  # of the old slots; of the new experts
    free, coming = stays.long().argsort(dim=1, stable=True), placed.long().argsort(dim=1, stable=True)
    kept = torch.empty_like(new).scatter_(1, free, new.gather(1, coming))
    return kept.where(~stays, old).view_as(wanted)
