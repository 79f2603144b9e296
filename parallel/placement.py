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
