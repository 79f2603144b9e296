"""Sampler: chooses the tokens of a step in which some request is not plainly greedy.

A step's forward always writes the argmax of its logits. What other requests want is done here, after it, also where a
CUDA graph ran the forward. A step without such requests does nothing here.
"""

import numpy as np
import torch
from torch import Tensor

from disagg.scheduler import Sequence
from disagg.step import Work
from disagg.steps import resolve
from model.batch import to_device, to_host
from model.logits_processors import Penalties, add_bias, ban, penalize
from model.sampling import COLDEST, NO_TOKEN, SamplingRows, sample, top_logprobs
from parallel.mesh import Group


class Sampler:
    def __init__(self, tokens: Tensor, attn: Group) -> None:
        """`tokens` [rows] int64: the tokens that the latest step sampled, written in place. `attn`: the replica."""
        self.tokens, self.attn = tokens, attn

    def latest(self, work: Work) -> Tensor | None:
        """Return the latest token of each decoding sequence, [B] int64, or None if no logits processor is used.

        Call it before the step runs. The host may not have seen these tokens, and the step overwrites them.
        """
        if work.plan.is_plain or not work.plan.processes_logits:
            return None
        return resolve(to_device(work.decodes.ids, self.tokens.device), self.tokens)

    def choose(self, logits: Tensor, work: Work, latest: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Choose from logits [rows, V] into `tokens`, unless all requests take the argmax.

        `latest`: see there. Returns the ids and log probabilities that were requested, on the host once the step is
        done, or None. They are the model's own, before processors, temperature and limits.
        """
        if work.plan.is_plain:
            return None
        sequences, index = work.sequences, to_device(work.rows, logits.device)
        max_logprobs = max((s.request.logprobs for s in sequences), default=0)
        warm = any(s.request.temperature > COLDEST for s in sequences)
        rows = logits[index]
        if latest is not None:
            process(rows, sequences, latest)
        if warm or latest is not None:
            chosen = sample(rows, sampling_rows(sequences, rows.device)) if warm else rows.argmax(-1)
            chosen = chosen.masked_fill(self.tokens[index] == NO_TOKEN, NO_TOKEN)
            # All ranks of the replica take the first one's choice: their sums over many probabilities may differ in the
            # last bits.
            self.tokens[index] = self.attn.broadcast(chosen)
        if not max_logprobs:
            return None
        rows = logits[index] if latest is not None else rows
        ids, values = top_logprobs(rows, self.tokens[index].clamp(min=0), max_logprobs)
        return to_host(ids), to_host(values)


def sampling_rows(sequences: list[Sequence], device: torch.device) -> SamplingRows:
    requests = [s.request for s in sequences]
    rows = [(r.temperature, r.top_p, r.top_k, r.seed, s.computed) for r, s in zip(requests, sequences, strict=True)]
    min_p = [r.min_p for r in requests]
    return SamplingRows.build(rows, device, min_p if any(min_p) else None)


def process(
    logits: Tensor,
    sequences: list[Sequence],
    latest: Tensor,
    owners: np.ndarray | None = None,
    ends: list[int] | None = None,
) -> None:
    """Apply the sequences' processors to their logits [N, V], in place.

    `latest` [n]: the latest tokens of some rows, which the host may lack. `owners` [n] ascending: whose row each one
    belongs to (None: one for each of the first n). `ends`: how many tokens are before the one that each row chooses
    (None: all computed ones, and the latest).
    """
    owners = np.arange(len(latest)) if owners is None else owners
    ends = ends or [s.computed for s in sequences]
    at, vocab = logits.device, logits.shape[1]
    asking = [(row, s.history) for row, s in enumerate(sequences) if s.request.processes_logits]
    if biased := [(row, history) for row, history in asking if len(history.biased)]:
        bias = np.concatenate([history.bias for _, history in biased])
        add_bias(logits, places([(row, history.biased) for row, history in biased], vocab, at), to_device(bias, at))
    if penalized := [row for row, s in enumerate(sequences) if s.request.has_penalties]:
        penalize(logits, penalties(sequences, penalized, latest, owners, ends, vocab))
    banned = [(row, history.banned(ends[row])) for row, history in asking]
    if any(len(tokens) for _, tokens in banned):
        ban(logits, places(banned, vocab, at))


def penalties(
    sequences: list[Sequence], rows: list[int], latest: Tensor, owners: np.ndarray, ends: list[int], vocab: int
) -> Penalties:
    """Collect the penalties of these rows, each with all its tokens so far. The other arguments: as in `process`.

    The cost per step: 8 bytes per token so far are copied, on the host and to the device, and `penalize` makes about a
    dozen passes over [M, V]. On one CPU core, with V = 129,280, that is 2.5 ms per row; sampling the row takes 30 ms.
    The host's part is 3 ms for 64 rows of 8,000 tokens.
    """
    at, mine = latest.device, np.flatnonzero(np.isin(owners, rows))
    latest_of = np.bincount(owners, minlength=len(sequences))
    prompts, generated = [], []
    for place, row in enumerate(rows):
        sequence = sequences[row]
        seen = ends[row] - int(latest_of[row])
        prompts.append((place, sequence.history.prompt))
        generated.append((place, sequence.history.generated(sequence.tokens, seen)))
    newest = latest[to_device(mine, at)] + vocab * to_device(np.searchsorted(rows, owners[mine]), at)
    asked = [sequences[row].request for row in rows]
    columns = zip(*((r.repetition_penalty, r.presence_penalty, r.frequency_penalty) for r in asked), strict=True)
    repetition, presence, frequency = to_device(np.array(list(columns), np.float32), at)
    return Penalties(
        to_device(np.array(rows, np.int64), at),
        repetition,
        presence,
        frequency,
        places(prompts, vocab, at),
        torch.cat((places(generated, vocab, at), newest)),
    )


def places(tokens: list[tuple[int, np.ndarray]], vocab: int, device: torch.device) -> Tensor:
    """Return the places of (row, tokens) pairs in logits of this vocabulary, int64."""
    return to_device(np.concatenate([row * vocab + some for row, some in tokens]), device)
