"""One rank's part of a step: Work before its launch, Step afterwards."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disagg.scheduler import Plan, Sequence
from model.batch import NO_DECODES, Chunk, Decodes
from model.prompt_row import pack
from model.sampling import logprob_pairs


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

    @property
    def mixed(self) -> bool:
        return self.decode_rows is None

    def next_decodes(self, sequences: list[Sequence]) -> Decodes:
        """Return the inputs of the sequences that decode in the next step.

        Each one's token is the one sampled in this step, which the host may not have seen: -1 - row stands for it. A
        sequence without one was handed over with its first token.
        """
        if sequences == self.plan.decodes:  # the same sequences, each one token further
            return Decodes(-1 - self.rows[: len(sequences)], self.decodes.positions + 1, self.decodes.pages)
        rows = dict(zip(self.sequences, self.rows.tolist(), strict=True))
        ids = [-1 - rows[s] if s in rows else s.tokens[-1] for s in sequences]
        positions = np.array([s.computed for s in sequences], np.int64)
        return Decodes(np.array(ids, np.int64), positions, [s.pages for s in sequences])


NO_WORK = Work(Plan([], []), NO_DECODES, [], None, False, [], np.arange(0))


@dataclass(frozen=True)
class Step:
    """A step that was launched. Its tensors are valid on the host after `done`."""

    work: Work
    started: float  # time.perf_counter() when its launch began
    tokens: Tensor  # [max rows]; read it before the second step after this one, which overwrites it
    logprobs: tuple[Tensor, Tensor] | None  # ids and values, both [sequences, ...]
    done: torch.cuda.Event | None  # None on a CPU, where the step is done already
    chosen: Tensor | None = None  # [T, MoE layers, K] int16, at the replica's first rank if a request asks
    prompt_rows: Tensor | None = None  # [targets, 2, K + 1] int32 of `model/prompt_logprobs.py`, likewise

    def sampled(self) -> list[int]:
        """Wait for the step. Returns the new token, or NO_TOKEN, of each of work.sequences."""
        if self.done is not None:
            self.done.synchronize()
        return self.tokens.numpy()[self.work.rows].tolist()

    def pairs(self) -> list[list[tuple[int, float]]]:
        """Return (token, log probability) pairs per sequence: empty unless requested. Call it after `sampled`."""
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

        The experts are [tokens, MoE layers, K] uint16, little-endian. Call it after `sampled`. The replica's other
        ranks return nothing.
        """
        if self.chosen is None:
            return []
        plan, found = self.work.plan, []
        chosen = self.chosen.numpy().astype("<i2", copy=False)
        decode_rows = self.work.rows[: len(plan.decodes)].tolist()
        first = len(chosen) - plan.num_prefill_tokens  # prompts come last
        for sequence, row in zip(plan.decodes, decode_rows, strict=True):
            if sequence.request.return_experts:
                found.append((sequence, chosen[row].tobytes()))
        for sequence, count in plan.prefills:
            if sequence.request.return_experts:
                found.append((sequence, chosen[first : first + count].tobytes()))
            first += count
        return found

    def prompt_logprobs(self) -> list[tuple[Sequence, bytes]]:
        """Return (sequence, rows of the prompt tokens that its chunk predicts) for the sequences whose requests ask.

        `model/prompt_logprobs.py` says what a row is. Call it after `sampled`. The replica's other ranks return
        nothing.
        """
        if self.prompt_rows is None:
            return []
        found, first = [], 0
        for (sequence, _), chunk in zip(self.work.plan.prefills, self.work.prompts, strict=True):
            if count := len(chunk.targets):
                found.append((sequence, pack(self.prompt_rows[first : first + count].numpy(), chunk.top)))
                first += count
        return found
