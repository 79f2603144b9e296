"""Graphs: the parts of steps on the device, each captured once as a CUDA graph, all in one memory pool.

A decode step of a drafting job has several parts, because the host may choose tokens between them; any other decode
step is one. The layers of a step of prompts are one, too (`prompt_graphs.py`). What a part returns stays where it is:
each replay writes it anew. So the next part, and the host's choice, find it there.

Its logits stay only until the next part. All parts write theirs into one buffer of the engine, because they are large:
330 MB for 640 rows of DeepSeek-V3. So whatever chooses from them is launched before the next part, on the same stream.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from disagg.warm_up_progress import Shown, silent

Result = TypeVar("Result")
Size = TypeVar("Size", bound=Any)


class Graphs:
    """The captured parts, by key. Without any, as on a CPU, parts run as they are."""

    def __init__(self) -> None:
        self.captured: dict[Hashable, tuple[Callable[[], None], Any]] = {}  # a part's replay, and what it returned
        self.replays = 0  # of parts
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._capturing = False

    def part(self, key: Hashable, call: Callable[[], Result], eager: bool = False) -> Result:
        """Run a part: replay its graph if there is one, otherwise call it.

        `call` must do the same for equal keys, from tensors that stay in place. `eager`: replay nothing. All ranks of a
        job must agree on that: NCCL requires that a collective is captured on all ranks or on none.
        """
        if eager:
            return call()
        if self._capturing and key not in self.captured:
            self.captured[key] = self.record(call)
            return self.captured[key][1]
        if key not in self.captured:
            return call()
        replay, result = self.captured[key]
        replay()
        self.replays += 1
        return result

    def record(self, call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Capture a call. Returns what replays it, and what it returned, which nothing has computed yet."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graphs[0].pool() if self._graphs else None):
            result = call()
        self._graphs.append(graph)
        return graph.replay, result

    def capture(
        self, step: Callable[[Size], object], sizes: Sequence[Size], what: str, progress: Shown = silent
    ) -> None:
        """Collective. Capture the parts of `step(size)`, for every size. All their kernels must be loaded already.

        The largest comes first, so that the others fit into its memory.
        """
        for size in progress(sorted(sizes, reverse=True), what):
            self._capturing = True
            step(size)
            self._capturing = False

    def reset(self) -> None:
        """Free the graphs. Call it before the process groups end: destroying a group that a graph uses hangs."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self.captured.clear()
