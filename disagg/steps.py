"""The two kinds of forward step: with prompt tokens, or decode only.

A decode step on the GPU has fixed inputs and one of a few sizes ("buckets"), each captured once as a CUDA graph:

    host:   token ids, positions, pages --copy--> inputs [2, rows], page_table [rows, P]
    graph:  ids of tokens in flight resolved -> model (attention, dispatch, experts, combine, head) -> argmax

In an overlapped step, sequences go to the two halves of the rows in turn. The ranks of a job agree on the bucket, so
all replay the same graph. Rows beyond a rank's own sequences are padding: they read and write the null page and route
nowhere. Without graphs (on a CPU, or with --graphs off) the same forward runs eagerly. So does a step in which a
request asks for its chosen experts. A graph that recorded them would do so in every step, asked or not.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model.batch import NO_DECODES, Batch, Chunk, Decodes, pad, page_rows, split
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
    """A step with prompt tokens, and one token per decoding sequence. Shapes vary too much to capture them."""

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


class DecodeStep:
    """A step in which every sequence has one token, in a bucket of rows."""

    def __init__(
        self,
        forward: Forward,
        tokens: Tensor,
        buckets: list[int],
        max_pages: int,
        overlaps: Callable[[int], bool] = lambda rows: False,
    ) -> None:
        """`forward` returns logits [rows, V]. `tokens` [rows]: the sampled tokens of the latest step,
        written in place. `overlaps(rows)`: do steps of this size run as two halves?"""
        self.forward, self.tokens, self.buckets, self.overlaps = forward, tokens, buckets, overlaps
        device, max_rows = tokens.device, buckets[-1]
        on_gpu = device.type == "cuda"
        self.inputs = torch.zeros(2, max_rows, dtype=torch.int64, device=device)
        self.page_table = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=device)
        # Two buffers, used in turn: the copy out of one may not have begun when the next step is prepared.
        self._staging = [torch.zeros(2, max_rows, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self._staged: tuple | None = None  # the rows, and the pages in page_table
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.replays = 0  # of a graph

    def bucket(self, count: int) -> int:
        """Return the rows of a step with `count` sequences."""
        return next(rows for rows in self.buckets if rows >= count)

    def places(self, count: int, rows: int) -> np.ndarray:
        """Return the row of each of `count` sequences, in a step of `rows` rows."""
        i = np.arange(count)
        return i % 2 * (rows // 2) + i // 2 if self.overlaps(rows) else i

    def run(self, decodes: Decodes, rows: int, eager: bool = False, chosen: ChosenExperts | None = None) -> Tensor:
        """Return the logits [rows, V], each sequence's at its place. Writes their argmax to `tokens`.

        `eager`: run no graph, which `chosen` needs. All ranks of a job must agree on it: NCCL requires that a
        collective is captured on all ranks or on none.
        """
        self._stage(decodes, rows)
        if rows in self._graphs and not eager:
            assert chosen is None, "a graph records no experts"
            graph, logits = self._graphs[rows]
            graph.replay()
            self.replays += 1
            return logits
        return self._forward(rows, chosen)

    @torch.inference_mode()
    def _forward(self, rows: int, chosen: ChosenExperts | None = None) -> Tensor:
        ids, positions = self.inputs[:, :rows]
        columns = resolve(ids, self.tokens), positions, self.page_table[:rows]
        halves = None
        if self.overlaps(rows):
            first, second = zip(*(column.chunk(2) for column in columns), strict=True)
            halves = Batch.decode(*first), Batch.decode(*second)
        logits = self.forward(Batch.decode(*columns), halves, chosen, None)
        self.tokens[:rows] = likeliest(logits)
        return logits

    def _stage(self, decodes: Decodes, rows: int) -> None:
        staging = self._staging[0]
        self._staging.reverse()
        host = staging.numpy()
        places = self.places(len(decodes.pages), rows)
        host[:, :rows] = 0
        host[0, places] = decodes.ids
        host[1, places] = decodes.positions
        self.inputs.copy_(staging, non_blocking=True)
        if self._staged != (rows, decodes.pages):
            table = np.zeros((rows, self.page_table.shape[1]), np.int32)
            table[places] = page_rows(decodes.pages, table.shape[1])
            host_table = torch.from_numpy(table)
            if self.tokens.is_cuda:
                host_table = host_table.pin_memory()
            self.page_table[:rows].copy_(host_table, non_blocking=True)
            self._staged = rows, decodes.pages

    def capture(self, progress: Callable[[Iterable[int]], Iterable[int]]) -> None:
        """Collective. Run every bucket, so that kernels compile, then capture it.

        The largest comes first, so that the others fit into its memory pool.
        """
        pool = None
        for rows in progress(self.buckets[::-1]):
            for _ in range(2):
                self.run(NO_DECODES, rows)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._forward(rows)
            pool = graph.pool()
            self._graphs[rows] = graph, logits

    def reset(self) -> None:
        """Free the graphs. Call it before the process groups end: destroying a group that a graph uses hangs."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
