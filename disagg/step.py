"""One rank's part of a step: Work before its launch, Step afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from disagg.scheduler import Plan, Sequence
from model.batch import NO_DECODES, Chunk, Decodes
from model.prompt_row import pack
from model.sampling import logprob_pairs


class Drafts(NamedTuple):
    """How many drafts a step has of each sequence."""

    verified: int  # of those that decode, behind their latest token
    made: int  # new ones, for the next step to verify


@dataclass(frozen=True)
class Work:
    """A step that is laid out: everything that its launch needs."""

    plan: Plan
    decodes: Decodes
    prompts: list[Chunk]
    decode_rows: int | None  # None: some rank has prompt tokens
    overlapped: bool
    sequences: list[Sequence]  # those that get a token, decodes first
    rows: np.ndarray  # [sequences]: the row of each one's token
    eager: bool = False  # a decode step that replays no graph
    drafts: Drafts | None = None  # None: the job does not speculate
    most_tokens: int = 0  # of the fullest replica

    @property
    def mixed(self) -> bool:
        return self.decode_rows is None

    def next_decodes(self, sequences: list[Sequence]) -> Decodes:
        """Return the inputs of the sequences that decode in the next step.

        Each one's token is the one sampled in this step, which the host may not have seen: -1 - row stands for it, and
        with drafts for its position, too. A sequence without one was handed over with its first token and drafts.
        """
        if sequences == self.plan.decodes:  # the same sequences, each one token further, or more
            ids = -1 - self.rows[: len(sequences)]
            return Decodes(ids, ids if self.drafts else self.decodes.positions + 1, self.decodes.pages)
        rows = dict(zip(self.sequences, self.rows.tolist(), strict=True))
        ids = [-1 - rows[s] if s in rows else s.tokens[-1] for s in sequences]
        positions = np.array([-1 - rows[s] if self.drafts and s in rows else s.computed for s in sequences], np.int64)
        drafts = [() if s in rows else s.drafts for s in sequences]
        return Decodes(np.array(ids, np.int64), positions, [s.pages for s in sequences], drafts)


NO_WORK = Work(Plan([], []), NO_DECODES, [], None, False, [], np.arange(0))


@dataclass(frozen=True)
class Step:
    """A step that was launched. Its tensors are valid on the host after `done`."""

    work: Work
    started: float  # time.perf_counter() when its launch began
    tokens: Tensor  # [rows]; read it before the second step after this one, which overwrites it
    logprobs: tuple[Tensor, Tensor] | None  # ids and values [sequences, ...]; with drafts [sequences, verified + 1, ..]
    done: torch.cuda.Event | None  # None on a CPU, where the step is done already
    chosen: Tensor | None = None  # [T, MoE layers, K] int16, at the replica's first rank if a request asks
    prompt_rows: Tensor | None = None  # [targets, 2, K + 1] int32 of `model/prompt_logprobs.py`, likewise
    counts: Tensor | None = None  # with drafts: [rows], how many of tokens [rows, N + 1] are new; overwritten likewise

    def wait(self) -> None:
        """Wait until the tensors are valid on the host. The methods below read them."""
        if self.done is not None:
            self.done.synchronize()

    def sampled(self) -> list[int]:
        """Return the new token, or NO_TOKEN, of each of work.sequences. With drafts, its first new token."""
        tokens = self.tokens.numpy()
        return (tokens if self.counts is None else tokens[:, 0])[self.work.rows].tolist()

    def outcomes(self) -> Iterator[tuple[Sequence, list[int], list[list[tuple[int, float]]]]]:
        """Yield each sequence with its new tokens, and pairs as in `pairs` for each, if requested.

        Without drafts that is one token each. NO_TOKEN may be the last.
        """
        if self.counts is None:
            for sequence, token, pairs in zip(self.work.sequences, self.sampled(), self.pairs(), strict=True):
                yield sequence, [token], [pairs] if pairs else []
            return
        ids, values = self.logprobs or (None, None)
        tokens, counts = self.tokens.numpy()[self.work.rows], self.counts.numpy()[self.work.rows].tolist()
        for i, (sequence, count) in enumerate(zip(self.work.sequences, counts, strict=True)):
            pairs, most = [], sequence.request.logprobs
            if ids is not None and values is not None and most:
                rows = zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True)
                pairs = [logprob_pairs(row_ids, row_values, most) for row_ids, row_values in rows]
            yield sequence, tokens[i, :count].tolist(), pairs

    def first_drafts(self) -> list[list[int]]:
        """Return the drafts that follow the first token of each of work.sequences, if all of them are prompts."""
        drafts = self.work.drafts
        if drafts is None:
            return [[]] * len(self.work.sequences)
        return self.tokens.numpy()[self.work.rows, 1 : drafts.made + 1].tolist()

    def pairs(self) -> list[list[tuple[int, float]]]:
        """Return (token, log probability) pairs per sequence: empty unless requested."""
        sequences = self.work.sequences
        if self.logprobs is None:
            return [[]] * len(sequences)
        ids, values = self.logprobs
        rows = zip(sequences, ids.tolist(), values.tolist(), strict=True)
        return [
            logprob_pairs(row_ids, row_values, count) if (count := sequence.request.logprobs) else []
            for sequence, row_ids, row_values in rows
        ]

    def chosen_experts(self) -> list[tuple[Sequence, bytes]]:
        """Return (sequence, chosen experts of its tokens in this step) for the sequences whose requests ask.

        With drafts, `fed_experts` has those of decoding sequences. The experts are [tokens, MoE layers, K] uint16,
        little-endian. The replica's other ranks return nothing.
        """
        if self.chosen is None:
            return []
        plan, found = self.work.plan, []
        chosen = self.chosen.numpy().astype("<i2", copy=False)
        decode_rows = self.work.rows[: len(plan.decodes)].tolist()
        first = len(chosen) - plan.num_prefill_tokens  # prompts come last
        for sequence, row in zip(plan.decodes, decode_rows, strict=True):
            if sequence.request.return_experts and not self.work.drafts:
                found.append((sequence, chosen[row].tobytes()))
        for sequence, count in plan.prefills:
            if sequence.request.return_experts:
                found.append((sequence, chosen[first : first + count].tobytes()))
            first += count
        return found

    def fed_experts(self) -> dict[Sequence, list[bytes]]:
        """Return, with drafts, what `chosen_experts` returns for decoding sequences: one piece for each token fed.

        The first new token followed on the first token fed, and so on. Wrong drafts were fed, too.
        """
        if self.chosen is None or self.work.drafts is None:
            return {}
        chosen, each = self.chosen.numpy().astype("<i2", copy=False), self.work.drafts.verified + 1
        decodes = zip(self.work.rows.tolist(), self.work.plan.decodes, strict=False)  # prompts have rows, too
        asking = [(i, s) for i, s in decodes if s.request.return_experts]
        return {s: [row.tobytes() for row in chosen[i * each : (i + 1) * each]] for i, s in asking}

    def prompt_logprobs(self) -> list[tuple[Sequence, bytes]]:
        """Return (sequence, rows of the prompt tokens that its chunk predicts) for the sequences whose requests ask.

        `model/prompt_logprobs.py` says what a row is. The replica's other ranks return nothing.
        """
        if self.prompt_rows is None:
            return []
        found, first = [], 0
        for (sequence, _), chunk in zip(self.work.plan.prefills, self.work.prompts, strict=True):
            if count := len(chunk.targets):
                found.append((sequence, pack(self.prompt_rows[first : first + count].numpy(), chunk.top)))
                first += count
        return found
