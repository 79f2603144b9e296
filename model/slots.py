"""Slots: experts' places, each one object. Whatever belongs to an expert moves with it, or nothing does.

An expert's weights, their scales where they are fp8, and its IDENTITY, the number of the logical expert whose weights
these are: an expert that is not where the map says is found by looking.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IDENTITY = "identity"


@dataclass(frozen=True)
class Slots:
    """n slots: tensors [n, ...] by the names of `Experts`' parameters, and IDENTITY [n] int64."""

    tensors: dict[str, Tensor]

    def __getitem__(self, slot: int) -> dict[str, Tensor]:
        """The tensors of one slot."""
        return {name: tensor[slot] for name, tensor in self.tensors.items()}

    def put(self, slot: int, source: "Slots", at: int) -> None:
        """All of slot `at` of `source` into `slot`; between a GPU and pinned memory this only starts it."""
        for name, tensor in self.tensors.items():
            tensor[slot].copy_(source.tensors[name][at], non_blocking=True)

    def like(self, count: int, device: torch.device, pinned: bool = False) -> "Slots":
        """`count` more, uninitialised; `pinned`: on the host, where a GPU can copy from beside other work."""
        return Slots(
            {
                name: torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device=device, pin_memory=pinned)
                for name, tensor in self.tensors.items()
            }
        )

    @property
    def slot_bytes(self) -> int:
        """Of one slot, all that moves with an expert."""
        return sum(tensor.nbytes // len(tensor) for tensor in self.tensors.values())
