"""Speculative sampler: chooses tokens and drafts in a step with drafts in which some request is not plainly greedy.

The device's part of a step always takes the likeliest token. What other requests want is done here, behind it. A step
without such requests does nothing here. `sampler.py` does the same for steps without drafts.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from disagg.sampler import process, sampling_rows
from disagg.scheduler import Sequence
from disagg.step import Work
from model.batch import to_device, to_host
from model.sampling import COLDEST, NO_TOKEN, sample, top_logprobs
from parallel.mesh import Group


class SpeculativeSampler:
    def __init__(self, attn: Group) -> None:
        """`attn`: the replica. Its ranks take the first one's choice: their sums may differ in the last bits."""
        self.attn = attn

    def choose(
        self, logits: Tensor, choice: Tensor, work: Work, fed: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Choose the model's own tokens from logits [rows, V] into `choice` [rows], as without drafts.

        fed [R, v + 1]: what each decoding sequence verifies. after [rows]: the position behind each row.
        Returns the ids and log probabilities that were requested, [S, v + 1, K + 1], on the host once the step is done,
        or None. They are the model's own, before processors, temperature and limits.
        """
        plan, count, each = work.plan, len(work.decodes.pages), fed.shape[1]
        if plan.is_plain:
            return None
        sequences = [*(s for s in plan.decodes for _ in range(each)), *work.sequences[count:]]
        real = to_device(rows_of(work, len(choice), each), logits.device)
        rows, greedy = logits[real], choice[real]
        if plan.processes_logits:
            seen = [len(s.tokens) for s in plan.decodes for _ in range(each)]
            ends = [n + i % each for i, n in enumerate(seen)] + [s.computed for s in work.sequences[count:]]
            owner, column = before_each(count, each)
            row = work.rows[owner // each]
            process(rows, sequences, fed[to_device(row, fed.device), to_device(column, fed.device)], owner, ends)
        if plan.processes_logits or is_warm(sequences):
            parameters = replace(sampling_rows(sequences, logits.device), position=after[real])
            mine = sample(rows, parameters) if is_warm(sequences) else rows.argmax(-1)
            choice[real] = self.attn.broadcast(mine.masked_fill(greedy == NO_TOKEN, NO_TOKEN))
        most = max((s.request.logprobs for s in sequences), default=0)
        if not most:
            return None
        ids, values = top_logprobs(logits[real], choice[real].clamp(min=0), most)
        return by_sequence(ids, count, each), by_sequence(values, count, each)

    def draft(self, logits: Tensor, drafts: Tensor, work: Work, positions: Tensor, place: int) -> None:
        """Choose a draft from each row of logits [S, V] into `drafts` [S], with the noise that the model will have.

        positions [rows]: of the tokens that they are drafts behind, `place` tokens further.
        """
        sequences = work.sequences
        if is_warm(sequences):
            real = to_device(work.rows, logits.device)
            parameters = replace(sampling_rows(sequences, logits.device), position=positions[real] + place)
            drafts[real] = self.attn.broadcast(sample(logits[real], parameters))


def is_warm(sequences: list[Sequence]) -> bool:
    return any(s.request.temperature > COLDEST for s in sequences)


def rows_of(work: Work, total: int, each: int) -> np.ndarray:
    """Return which of `total` rows of logits belong to sequences: `each` per decode, and one per prompt at the end."""
    count = len(work.decodes.pages)
    decodes = work.rows[:count, None] * each + np.arange(each)
    return np.concatenate((decodes.ravel(), np.arange(total - len(work.sequences) + count, total)))


def by_sequence(rows: Tensor, count: int, each: int) -> Tensor:
    """Return rows [R, K] of `count` decodes, `each` per sequence, and of prompts as [S, each, K] on the host."""
    decodes = rows[: count * each].view(count, each, rows.shape[1])
    prompts = rows[count * each :, None].expand(-1, each, -1)
    return to_host(torch.cat((decodes, prompts)))


def before_each(count: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the drafts before each row of `count` sequences of `each` rows, as pairs (row, place among its tokens).

    Row 0 follows on the latest token alone, row 2 on the drafts in the places 1 and 2.
    """
    place = np.concatenate([np.arange(1, i + 1) for i in range(each)])
    row = np.repeat(np.arange(each), np.arange(each))
    rows = (np.arange(count)[:, None] * each + row).ravel()
    return rows, np.tile(place, count)
