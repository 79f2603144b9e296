"""What the host tells the device for a step with drafts.

The device alone knows the front of a sequence that was in the latest step: its latest token, its drafts and its
position. For such a one the host says -1 - row, in place of the token and of the position. A sequence that was handed
over brings its own front: the prefill job made the drafts.

    columns       latest token | position | drafts (N columns)         one row per decoding sequence, padding behind
    page_table    the pages of these, and of the prompts that end here
    prompts       the step's chunks, and the token after each of theirs
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from disagg.fixed_inputs import FixedInputs
from disagg.step import Work
from model.batch import Batch, Chunk, Decodes, split_behind, to_device


@dataclass(frozen=True)
class Prompts:
    """The prompt tokens of a step, T with padding, which comes first. P prompts end here."""

    batch: Batch
    halves: tuple[Batch, Batch] | None  # if the step overlaps
    following: Tensor  # [T] int64: the token after each; -1 - i: that of the i-th prompt that ends
    lengths: Tensor  # [P] int64, of those that end


@dataclass(frozen=True)
class Inputs:
    """A step's inputs on the device. Without prompts they lie where those of every such step lie."""

    ids: Tensor  # [R] int64: each sequence's latest token
    positions: Tensor  # [R] int64: that token's
    drafts: Tensor  # [N, R] int64
    page_table: Tensor  # [at least R + P, width] int32
    prompts: Prompts | None
    cut: int | None  # if the step overlaps: the rows of the first half

    @property
    def rows(self) -> int:
        """R: the rows of decoding sequences, padding included."""
        return len(self.ids)

    @property
    def fronts(self) -> int:
        """S: the rows of sequences that get a token, R + P."""
        return self.rows + (0 if self.prompts is None else len(self.prompts.lengths))


class SpeculationInputs:
    """Lays out the inputs of one rank's steps."""

    def __init__(self, fixed: FixedInputs, multiple: int) -> None:
        """`fixed`: with N + 2 columns. `multiple`: what a step's rows must be a multiple of (the attention TP size)."""
        self.fixed, self.multiple = fixed, multiple

    def lay_out(self, work: Work) -> Inputs:
        """Copy a step's inputs to the device."""
        count = len(work.decodes.pages)
        rows = count if work.decode_rows is None else work.decode_rows
        pages, places = work.decodes.pages, work.rows[:count]
        self.fixed.stage((work.decodes.ids, work.decodes.positions, *self._drafts(work.decodes)), places, rows)
        fronts = rows
        if work.mixed:
            pages = [*pages, *(chunk.pages for chunk in work.prompts if chunk.wants_logits)]
            places, fronts = np.arange(len(pages)), -(-len(pages) // self.multiple) * self.multiple
        self.fixed.stage_pages(pages, places, fronts)
        ids, positions, *_ = columns = self.fixed.columns[:, :rows]
        prompts, cut = None, rows // 2 if work.overlapped else None
        if work.mixed:
            prompts, cut = self._prompts(work, count)
        return Inputs(ids, positions, columns[2:], self.fixed.page_table[:fronts], prompts, cut)

    def _drafts(self, decodes: Decodes) -> np.ndarray:
        """Return the drafts [N, B] that the host knows, 0 for others."""
        drafts = np.zeros((len(self.fixed.columns) - 2, len(decodes.pages)), np.int64)
        for column, known in zip(drafts.T, decodes.drafts, strict=False):
            column[: len(known)] = known
        return drafts

    def _prompts(self, work: Work, count: int) -> tuple[Prompts, int | None]:
        """Lay out the chunks behind `count` decodes. Padding before them makes the step's tokens divide.

        Returns also how many of the decodes are in the first half, if the step overlaps.
        """
        assert work.drafts is not None
        each = work.drafts.verified + 1
        padding = -(count * each + sum(len(chunk.token_ids) for chunk in work.prompts)) % self.multiple
        chunks = [Chunk((0,) * padding, 0, (), wants_logits=False), *work.prompts] if padding else work.prompts
        device = self.fixed.columns.device
        cut, halves = None, None
        if work.overlapped:
            cut, *both = split_behind(count, each, chunks, self.multiple)
            first, second = (Batch.build([], half, device) for half in both)
            halves = first, second
        lengths = np.array([sequence.computed for sequence in work.sequences[count:]], np.int64)
        following = np.array([0] * padding + following_tokens(work), np.int64)
        batch = Batch.build([], chunks, device)
        return Prompts(batch, halves, to_device(following, device), to_device(lengths, device)), cut


def following_tokens(work: Work) -> list[int]:
    """Return the token after each of a step's prompt tokens; -1 - i for the last one of the i-th prompt that ends."""
    ids, ended = [], 0
    for (sequence, count), chunk in zip(work.plan.prefills, work.prompts, strict=True):
        ids += chunk.token_ids[1:]
        if chunk.wants_logits:
            ended += 1
            ids.append(-ended)
        else:
            ids.append(sequence.request.prompt[chunk.start + count])
    return ids
