"""Slots: places for experts. Everything that belongs to an expert moves together.

A slot holds an expert's weights, their scales if they are fp8, and its IDENTITY: the number of the logical expert. With
it, an expert that is not where the map says can be detected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IDENTITY = "identity"


@dataclass(frozen=True)
class Slots:
    """n slots: tensors [n, ...], named like the parameters of `Experts`, and IDENTITY [n] int64."""

    tensors: dict[str, Tensor]

    def __getitem__(self, slot: int) -> dict[str, Tensor]:
        """Return the tensors of one slot, as views."""
        return {name: tensor[slot] for name, tensor in self.tensors.items()}

    def put(self, slot: int, source: "Slots", at: int) -> None:
        """Copy slot `at` of `source` into `slot`. Between a GPU and pinned memory, this only starts the copy."""
        for name, tensor in self.tensors.items():
            tensor[slot].copy_(source.tensors[name][at], non_blocking=True)

    def like(self, count: int, device: torch.device, pinned: bool = False) -> "Slots":
        """Allocate `count` slots of the same shapes, uninitialised. `pinned`: in pinned host memory."""
        return Slots(
            {
                name: torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device=device, pin_memory=pinned)
                for name, tensor in self.tensors.items()
            }
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(tensor.nbytes // len(tensor) for tensor in self.tensors.values())
