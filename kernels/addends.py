"""A delta of the residual stream whose addends are not summed yet: the next norm's kernel sums them.

A kernel of its own would write the sum to memory, from where the norm would read it again.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Addends(NamedTuple):
    """A delta [T, D]: delta[t] = plus[t] + sum over k of weights[t, k] * rows[index[t, k]], rounded to rows' dtype.

    Index -1 adds nothing. `index` None: copy (t, k) is row t * K + k. With neither index nor weights, token t has
    row t.
    """

    rows: Tensor  # [M, D]
    index: Tensor | None = None  # [T, K] int64
    weights: Tensor | None = None  # [T, K] float32
    plus: Tensor | None = None  # [T, D] in rows' dtype

    @property
    def top_k(self) -> int:
        """K, the number of rows per token."""
        of_copies = self.weights if self.index is None else self.index
        return 1 if of_copies is None else of_copies.shape[1]


Delta = Tensor | Addends


def summed(delta: Delta, ep_gather: Callable[..., Tensor]) -> Tensor:
    """Return the delta [T, D] as one tensor. `ep_gather`: the op, which sums copies."""
    if isinstance(delta, Tensor):
        return delta
    if delta.index is not None or delta.weights is not None:
        return ep_gather(*delta)
    return delta.rows if delta.plus is None else delta.rows + delta.plus
