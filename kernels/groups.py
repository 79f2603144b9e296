"""Groups of the contiguous layout: which rows belong to which expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rooms import ALIGNMENT


class Groups(NamedTuple):
    """Rows in groups, one per local expert. Each begins at the next multiple of `alignment`; padding lies between.

    As DeepGEMM's "psum" layout. A GEMM sees from the ends which blocks hold real rows, and computes no others.
    """

    ends: Tensor  # [L] int32: the row behind the group's last one; where an empty group begins
    alignment: int

    def ranges(self) -> list[tuple[int, int]]:
        """Return each group's first row and end. Waits for the device."""
        start, found = 0, []
        for end in self.ends.tolist():
            found.append((start, end))
            start = self.aligned(end)
        return found

    def aligned(self, rows: int) -> int:
        """Return `rows` rounded up to the alignment."""
        return -(-rows // self.alignment) * self.alignment

    def of_rows(self, num_rows: int) -> Tensor:
        """Return each row's group [num_rows] int32, -1 for padding. Waits for the device."""
        group = torch.full((num_rows,), -1, dtype=torch.int32, device=self.ends.device)
        for expert, (start, end) in enumerate(self.ranges()):
            group[start:end] = expert
        return group


def check_groups(x: Tensor, weight: Tensor, groups: Groups) -> None:
    """Raise ValueError unless a GPU's product can take rows x [M, D] in these groups, with weight [L, N, D]."""
    if x.shape[0] % ALIGNMENT:
        raise ValueError(f"{x.shape[0]} rows: rows % {ALIGNMENT} must be 0, not {x.shape[0] % ALIGNMENT}")
    if groups.alignment != ALIGNMENT:
        raise ValueError(f"groups.alignment {groups.alignment}: it must be {ALIGNMENT}")
    if groups.ends.shape != weight.shape[:1]:
        raise ValueError(f"ends {tuple(groups.ends.shape)}: there must be one per weight, {weight.shape[0]}")
