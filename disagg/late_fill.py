"""LateFill: on a CPU, steps without drafts put off what only later drafts need, and then do it for many steps at once.

A row of the draft layer's KV needs the model's output at its position and the next token (`model/mtp.py`), and both
stay in memory. A fill of few rows takes most of its time to start its operations. So a step that verifies no drafts and
makes none leaves its rows here. They are filled before a step that drafts, verifies, has prompts, or has other
sequences. They are filled before a sequence lets go of its pages, too, because then others read or own them. And they
are filled once MOST steps have left theirs.

The next step of the same sequences goes on from these rows, so its inputs need not be laid out. Nor are the sequences'
fronts (`speculation.py`) written before the rows are filled. On a GPU a step's parts are graphs, in which all this
costs little: each step does it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from disagg.speculation_inputs import Inputs
from disagg.step import Work
from model.batch import Batch
from model.transformer import Transformer

MOST = 32  # steps; under a page, because the positions of padding grow from 0


class Left(NamedTuple):
    """What a step leaves, by row."""

    hidden: Tensor  # [R, D], after the final norm
    tokens: Tensor  # [R] int64, those after it
    positions: Tensor  # [R] int64, of `hidden`
    after: Tensor  # [R] int64, of `tokens`


class LateFill:
    """What steps in a row have left. All of them are of the same sequences, in the same places."""

    def __init__(self, model: Transformer, pool: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """`tokens`, `positions`: where `Speculation` keeps the fronts."""
        self._model, self._pool, self._tokens, self._positions = model, pool, tokens, positions
        self._left: list[Left] = []
        self._inputs: Inputs | None = None
        self._pages: list[Sequence[int]] = []
        self._places: tuple[int | None, bool] = None, False

    def goes_on(self, work: Work) -> tuple[Inputs, tuple[Tensor, Tensor]] | None:
        """Return the inputs of a step that goes on from the rows that were left, and its tokens [R, 1] and positions
        [R]. None: it does not, and the rows are filled.
        """
        places = work.decode_rows, work.overlapped
        same = leaves(work) and work.decodes.pages is self._pages and places == self._places
        if self._left and self._inputs is not None and same and len(self._left) < MOST:
            return self._inputs, (self._left[-1].tokens.clamp(min=0)[:, None], self._left[-1].after)
        self.fill()
        self._pages, self._places = work.decodes.pages, places
        return None

    def add(self, inputs: Inputs, left: Left) -> None:
        """Leave a step's rows. Their tensors belong to this object from now on."""
        self._inputs = inputs
        self._left.append(left)

    @torch.inference_mode()
    def fill(self) -> None:
        """Fill the rows that were left, and write the fronts of their sequences."""
        if self._left and self._inputs is not None:
            front, rows = self._left[-1], self._inputs.rows
            self._tokens[:rows, 0], self._positions[:rows] = front.tokens.clamp(min=0), front.after
            hidden, tokens, positions, _ = map(torch.cat, zip(*self._left, strict=True))
            table = self._inputs.page_table[:rows].repeat(len(self._left), 1)
            self._model.fill_draft(hidden, Batch.decode(tokens.clamp(min=0), positions, table), self._pool)
            self._left.clear()


def leaves(work: Work) -> bool:
    """Does this step leave its rows?"""
    return not work.mixed and work.drafts == (0, 0)
