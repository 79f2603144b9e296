"""One rank's part of a step: Work before it is launched, Step afterwards."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disagg.scheduler import Plan, Sequence
from model.batch import NO_DECODES, Chunk, Decodes
from model.sampling import logprob_pairs


@dataclass(frozen=True)
class Work:
    """A step that is laid out."""

    plan: Plan
    decodes: Decodes
    prompts: list[Chunk]
    decode_rows: int | None  # None: some rank has prompt tokens
    overlapped: bool
    sequences: list[Sequence]  # those that get a token, the decodes first
    rows: np.ndarray  # of their tokens

    @property
    def mixed(self) -> bool:
        return self.decode_rows is None

    def next_decodes(self, sequences: list[Sequence]) -> Decodes:
        """What those that decode in the step after this one bring to it: the token that it samples for each, seen yet
        or not, unless a sequence was handed over and has its first one with it."""
        if sequences == self.plan.decodes:  # all of them are one token further
            return Decodes(-1 - self.rows[: len(sequences)], self.decodes.positions + 1, self.decodes.pages)
        rows = dict(zip(self.sequences, self.rows.tolist(), strict=True))
        ids = [-1 - rows[s] if s in rows else s.tokens[-1] for s in sequences]
        positions = np.array([s.computed for s in sequences], np.int64)
        return Decodes(np.array(ids, np.int64), positions, [s.pages for s in sequences])


NO_WORK = Work(Plan([], []), NO_DECODES, [], None, False, [], np.arange(0))


@dataclass(frozen=True)
class Step:
    """A step that was launched: its tokens are on their way to the host, its KV to the pool."""

    work: Work
    started: float  # when its launch began, of time.perf_counter
    tokens: Tensor  # [most rows] on the host, from `done` to the second step after this: a sequence's is in its row
    logprobs: tuple[Tensor, Tensor] | None  # [sequences, ...] on the host, once `done`
    done: torch.cuda.Event | None  # None on a CPU, where it already is

    def sampled(self) -> list[int]:
        """The new token of each of work.sequences; waits for them."""
        if self.done is not None:
            self.done.synchronize()
        return self.tokens.numpy()[self.work.rows].tolist()

    def pairs(self) -> list[list[tuple[int, float]]]:
        """Of each, (token, log probability): empty unless asked for. After `sampled`."""
        sequences = self.work.sequences
        if self.logprobs is None:
            return [[]] * len(sequences)
        rows = zip(sequences, *(part.tolist() for part in self.logprobs), strict=True)
        return [logprob_pairs(*row, n) if (n := s.request.logprobs) else [] for s, *row in rows]
