"""What the host tells the device for a step with drafts.

The device alone knows the front of a sequence that was in the latest step: its latest token, its drafts and its
position. For such a one the host says -1 - row, in place of the token and of the position. A sequence that was handed
over brings its own front: the prefill job made the drafts.

    columns       latest token | position | drafts (N columns)         one row per decoding sequence, padding behind
    page_table    the pages of these, and of the prompts that end here
    prompts       the step's chunks, and the token after each of theirs
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from disagg.fixed_inputs import FixedInputs
from disagg.step import Work
from model.batch import Batch, Chunk, Decodes, split_behind, to_device


@dataclass(frozen=True)
class Prompts:
    """The prompt tokens of a step, T with padding, which comes first. P prompts end here."""

    batch: Batch
    following: Tensor  # [T] int64: the token after each; -1 - i: that of the i-th prompt that ends
    lengths: Tensor  # [P] int64, of those that end


class Half(NamedTuple):
    """A half of a step that overlaps: some of its decoding sequences, whole, and some of its prompt tokens."""

    rows: slice
    prompts: Batch | None


@dataclass(frozen=True)
class Inputs:
    """A step's inputs on the device. Without prompts they lie where those of every such step lie."""

    ids: Tensor  # [R] int64: each sequence's latest token
    positions: Tensor  # [R] int64: that token's
    drafts: Tensor  # [N, R] int64
    page_table: Tensor  # [at least R + P, width] int32
    prompts: Prompts | None
    halves: tuple[Half, Half] | None  # if the step overlaps

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
        padded = rows  # of the page table
        if work.mixed:
            pages = [*pages, *(chunk.pages for chunk in work.prompts if chunk.wants_logits)]
            places, padded = np.arange(len(pages)), -(-len(pages) // self.multiple) * self.multiple
        self.fixed.stage_pages(pages, places, padded)
        ids, positions, *_ = columns = self.fixed.columns[:, :rows]
        chunks = self._chunks(work, count) if work.mixed else []
        prompts = self._prompts(work, chunks) if work.mixed else None
        halves = self._halves(work, rows, chunks) if work.overlapped else None
        return Inputs(ids, positions, columns[2:], self.fixed.page_table[:padded], prompts, halves)

    def _drafts(self, decodes: Decodes) -> np.ndarray:
        """Return the drafts [N, B] that the host knows, 0 for others."""
        drafts = np.zeros((len(self.fixed.columns) - 2, len(decodes.pages)), np.int64)
        for column, known in zip(drafts.T, decodes.drafts, strict=False):
            column[: len(known)] = known
        return drafts

    def _chunks(self, work: Work, count: int) -> list[Chunk]:
        """Return the chunks behind `count` decodes. Padding before them makes the step's tokens divide."""
        padding = -(count * each(work) + sum(len(chunk.token_ids) for chunk in work.prompts)) % self.multiple
        return [Chunk((0,) * padding, 0, (), wants_logits=False), *work.prompts] if padding else work.prompts

    def _prompts(self, work: Work, chunks: list[Chunk]) -> Prompts:
        device = self.fixed.columns.device
        batch, following = Batch.build([], chunks, device), following_tokens(work)
        following = np.array([0] * (batch.num_tokens - len(following)) + following, np.int64)
        lengths = np.array([sequence.computed for sequence in work.sequences[len(work.decodes.pages) :]], np.int64)
        return Prompts(batch, to_device(following, device), to_device(lengths, device))

    def _halves(self, work: Work, rows: int, chunks: list[Chunk]) -> tuple[Half, Half]:
        """Cut a step. One without prompts is cut in the middle of its rows, padding included, on all ranks."""
        cut, both = rows // 2, (None, None)
        if work.mixed:
            cut, *chunks_of = split_behind(rows, each(work), chunks, self.multiple)
            both = [Batch.build([], half, self.fixed.columns.device) for half in chunks_of]
        return Half(slice(cut), both[0]), Half(slice(cut, None), both[1])


def each(work: Work) -> int:
    """Return the tokens of each decoding sequence in a step."""
    assert work.drafts is not None
    return work.drafts.verified + 1


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
