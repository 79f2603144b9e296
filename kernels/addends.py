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

    def cut(self, token: int) -> tuple["Addends", "Addends"]:
        """Split into those of the tokens before `token`, and the others."""
        row = token * self.top_k
        parts = []
        for mine, theirs in ((slice(token), slice(row)), (slice(token, None), slice(row, None))):
            of_tokens = (None if part is None else part[mine] for part in self[1:])
            parts.append(Addends(self.rows if self.index is not None else self.rows[theirs], *of_tokens))
        return parts[0], parts[1]


Delta = Tensor | Addends


def summed(delta: Delta, ep_gather: Callable[..., Tensor]) -> Tensor:
    """Return the delta [T, D] as one tensor. `ep_gather`: the op, which sums copies."""
    if isinstance(delta, Tensor):
        return delta
    if delta.index is not None or delta.weights is not None:
        return ep_gather(*delta)
    return delta.rows if delta.plus is None else delta.rows + delta.plus
