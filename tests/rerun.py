"""Graphs that a CPU can replay: what was captured is called again, and its results go where the first ones are.

All parts put their logits into one buffer. Each begins by spoiling it, so whoever reads another part's finds NaN.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from disagg.buckets import PromptSize
from disagg.captures import Captures
from disagg.engine import Engine
from disagg.graphs import Graphs
from disagg.prompt_graphs import PromptGraphs
from disagg.warm_up import capture


class Rerun(Graphs):
    """Replays by calling again what was captured, and puts the results where they were the first time."""

    def __init__(self, logits: torch.Tensor) -> None:
        """`logits`: the buffer."""
        super().__init__()
        self.logits, self.reruns = logits, Counter[str]()

    def part(self, key: Hashable, call: Callable[[], Any], eager: bool = False) -> Any:
        self.logits.fill_(torch.nan)
        return super().part(key, call, eager)

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = call()

        def replay() -> None:
            self.reruns[call.func.__name__] += 1  # type: ignore[attr-defined]
            put(call(), result)

        return replay, result


@torch.inference_mode()
def put(new: Any, old: Any) -> None:
    """Copy all tensors of `new` into those at the same places of `old`."""
    if isinstance(old, torch.Tensor):
        old.copy_(new)
    elif is_dataclass(old):
        put([getattr(new, f.name) for f in fields(old)], [getattr(old, f.name) for f in fields(old)])
    elif isinstance(old, tuple | list):
        for one, other in zip(new, old, strict=True):
            put(one, other)
    else:
        assert new == old


def captured(engine: Engine, prompts: tuple[PromptSize, ...] = ()) -> Rerun:
    """Make an engine replay its decode steps, and steps of prompts in these sizes."""
    graphs = Rerun(engine.logits)
    engine.captures = Captures(engine.settings.decodes, prompts, "")
    engine.graphs = engine.decode.graphs = graphs
    engine.prompt_graphs = PromptGraphs(
        engine.model, engine.pool, engine.dispatchers.contiguous, graphs, engine.captures.prompts
    )
    if engine.speculation is not None:
        engine.speculation.graphs, engine.speculation.body = graphs, engine.prompt_graphs.body
        engine.speculation.late = None  # as on a GPU
    capture(engine)
    return graphs
