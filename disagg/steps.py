"""The two kinds of forward step: with prompt tokens, or decode only.

A decode step on the GPU has fixed inputs and one of a few sizes ("buckets"), each captured once as a CUDA graph:

    host:   token ids, positions, pages --copy--> FixedInputs
    graph:  ids of tokens in flight resolved -> model (attention, dispatch, experts, combine, head) -> argmax

In an overlapped step, sequences go to the two halves of the rows in turn. The ranks of a job agree on the bucket, so
all replay the same graph. Rows beyond a rank's own sequences are padding: they read and write the null page and route
nowhere. Without graphs (on a CPU, or with --graphs off) the same forward runs eagerly. So does a step in which a
request asks for its chosen experts. A graph that recorded them would do so in every step, asked or not.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from disagg.fixed_inputs import FixedInputs
from disagg.graphs import Graphs
from model.batch import Batch, Chunk, Decodes, pad, split
from model.prompt_logprobs import PromptLogprobs
from model.sampling import likeliest
from parallel.chosen_experts import ChosenExperts


def resolve(ids: Tensor, tokens: Tensor) -> Tensor:
    """Replace ids below 0: -1 - r stands for tokens[r], a token of the step before that only the GPU knows yet.

    The model goes on with token 0 after NO_TOKEN, until the host has seen it and ends the request.
    """
    return tokens[(-1 - ids).clamp(min=0)].clamp(min=0).where(ids < 0, ids)


# A batch, its halves if they overlap, where to record chosen experts and prompts' log probabilities -> logits
Forward = Callable[[Batch, tuple[Batch, Batch] | None, ChosenExperts | None, PromptLogprobs | None], Tensor]


class PromptStep:
    """A step with prompt tokens, and one token per decoding sequence. Some replay a graph of `prompt_graphs.py`."""

    def __init__(self, forward: Forward, tokens: Tensor, multiple: int) -> None:
        """`forward` returns the logits [N, V] of the rows that want them. `tokens` [rows]: the sampled tokens of the
        latest step, written in place. `multiple`: T is padded to a multiple of it (the attention TP size)."""
        self.forward, self.tokens, self.multiple = forward, tokens, multiple

    @torch.inference_mode()
    def run(
        self,
        decodes: Decodes,
        prompts: list[Chunk],
        overlapped: bool = False,
        chosen: ChosenExperts | None = None,
        scored: PromptLogprobs | None = None,
    ) -> Tensor:
        """Return the logits [N, V] of the rows that want them, decodes first. Writes their argmax to `tokens`.

        The batch's rows are the decodes, padding, and the prompts' tokens.
        """
        device = self.tokens.device
        chunks = pad(decodes.chunks(), prompts, self.multiple)
        halves = None
        if overlapped:
            first, second = split(chunks, prompts, self.multiple)
            halves = Batch.build(*first, device), Batch.build(*second, device)
        batch = Batch.build(chunks, prompts, device)
        batch = replace(batch, token_ids=resolve(batch.token_ids, self.tokens))
        logits = self.forward(batch, halves, chosen, scored)
        self.tokens[: logits.shape[0]] = likeliest(logits)
        return logits


def places(count: int, rows: int, overlapped: bool) -> np.ndarray:
    """Return the row of each of `count` sequences in a step of `rows` rows: in turns in its two halves, if it overlaps.

    So the halves have as many sequences.
    """
    i = np.arange(count)
    return i % 2 * (rows // 2) + i // 2 if overlapped else i


class DecodeStep:
    """A step in which every sequence has one token, in a bucket of rows."""

    def __init__(
        self,
        forward: Forward,
        tokens: Tensor,
        buckets: list[int],
        inputs: FixedInputs,
        graphs: Graphs,
        overlaps: Callable[[int], bool] = lambda rows: False,
    ) -> None:
        """`forward` returns logits [rows, V]. `tokens` [rows]: the sampled tokens of the latest step,
        written in place. `inputs`: of which ids and positions are the first two columns. `overlaps(rows)`: do steps of
        this size run as two halves?"""
        self.forward, self.tokens, self.buckets, self.overlaps = forward, tokens, buckets, overlaps
        self.inputs, self.graphs = inputs, graphs

    def bucket(self, count: int) -> int:
        """Return the rows of a step with `count` sequences."""
        return next(rows for rows in self.buckets if rows >= count)

    def run(self, decodes: Decodes, rows: int, eager: bool = False, chosen: ChosenExperts | None = None) -> Tensor:
        """Return the logits [rows, V], each sequence's at its place. Writes their argmax to `tokens`.

        `eager`: run no graph, which `chosen` needs.
        """
        assert eager or chosen is None, "a graph records no experts"
        at = places(len(decodes.pages), rows, self.overlaps(rows))
        self.inputs.stage((decodes.ids, decodes.positions), at, rows)
        self.inputs.stage_pages(decodes.pages, at, rows)
        return self.graphs.part(rows, partial(self._forward, rows, chosen), eager)

    @torch.inference_mode()
    def _forward(self, rows: int, chosen: ChosenExperts | None = None) -> Tensor:
        ids, positions = self.inputs.columns[:2, :rows]
        columns = resolve(ids, self.tokens), positions, self.inputs.page_table[:rows]
        halves = None
        if self.overlaps(rows):
            first, second = zip(*(column.chunk(2) for column in columns), strict=True)
            halves = Batch.decode(*first), Batch.decode(*second)
        logits = self.forward(Batch.decode(*columns), halves, chosen, None)
        self.tokens[:rows] = likeliest(logits)
        return logits
