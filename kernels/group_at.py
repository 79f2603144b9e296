"""Find a row's group (`groups.py`) within a kernel."""

import triton
import triton.language as tl


@triton.jit
def group_at(ends, row, L, EXPERTS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the expert and the end of the group that `row` lies in. Behind all groups the end is 0."""
    ids = tl.arange(0, EXPERTS)
    end = tl.load(ends + ids, mask=ids < L, other=0)
    earlier = (tl.cdiv(end, ALIGNMENT) * ALIGNMENT <= row) & (ids < L)
    expert = tl.sum(earlier.to(tl.int32), 0)
    return expert, tl.sum(tl.where(ids == expert, end, 0), 0)
