"""Placement: which physical slot holds which expert.

E logical experts (what the gate names) live in P physical slots, L = P / ep slots on each rank: slot p is number
p % L on rank p // L. All routing goes through this map, so that experts can be replicated and moved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    slot_of_expert: Tensor  # [layers, E] int64
    expert_of_slot: Tensor  # [layers, P] int64
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
        table = torch.arange(num_experts, device=device).repeat(num_layers, 1)
        return cls(table, table.clone(), ep_size)

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
