"""Find a row's group (`groups.py`) within a kernel."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.groups import Groups


def group_arguments(groups: Groups | None, rows: int) -> tuple[Tensor | None, int, int, int]:
    """Return ends, L, BLOCK_L and ALIGNMENT for `group_at`, in a kernel whose programs take `rows` rows each.

    `groups` None: all rows are real and go with one weight.
    """
    if groups is None:
        return None, 1, 1, rows
    assert groups.alignment % rows == 0, f"{groups.alignment=} {rows=}"
    num_local = len(groups.ends)
    return groups.ends, num_local, triton.next_power_of_2(num_local), groups.alignment


@triton.jit
def group_at(ends, row, L, BLOCK_L: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the expert and the end of the group that `row` lies in; behind all groups the end is 0. ends [L]."""
    ids = tl.arange(0, BLOCK_L)
    end = tl.load(ends + ids, mask=ids < L, other=0)
    earlier = (tl.cdiv(end, ALIGNMENT) * ALIGNMENT <= row) & (ids < L)
    expert = tl.sum(earlier.to(tl.int32), 0)
    return expert, tl.sum(tl.where(ids == expert, end, 0), 0)
