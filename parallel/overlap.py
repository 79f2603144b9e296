"""Overlap: how layers run, one micro-batch alone, or two in turns, so that one computes while the other communicates.

The layers of a micro-batch are one generator (`Transformer.moe_steps`). It yields each stage's name when that is done:

    attention     norm, projections, KV written, attention itself, output projection, norm, gate
    dispatch      tokens sent to their experts' ranks; shared expert, if it does not run beside the gate
    arrival       tokens received
    experts       the experts
    combine       their results sent back
    return        results received: the layer's end

`run` exhausts one generator: the plain path. `run_two` lets two take turns, one stage each, with b four stages behind
a. In each layer, the two micro-batches have four transfers and four computations, so each transfer hides behind a
computation. There is never a second transfer in flight. DeepEP's low latency requires that, because each operation
clears the other's buffer. a0, a1: a in layers 0, 1:

    compute   a0 attention | a0 experts | b0 attention | a1 attention | b0 experts  | a1 experts | b1 attention | ...
    network                |            | a0 combine   | b0 dispatch  | a1 dispatch | b0 combine | a1 combine   | ...

Turn by turn, once both are running (a transfer is in flight from `dispatch>` to `>arrival`, `combine>` to `>return`):

    a0 combine> b0 attention a0 >return | b0 dispatch> a1 attention b0 >arrival | a1 dispatch> b0 experts a1 >arrival |
    b0 combine> a1 experts b0 >return | a1 combine> b1 attention a1 >return

(SGLang has five stages, with b two behind. There, transfers hide behind attention only, and experts wait for them.)

In prefill a dispatch makes the host wait until its tokens are there. With DeepEP that is in `arrival`. By then the
other micro-batch's next computation is enqueued, so the GPU does not wait. The all-to-all waits in `dispatch` already,
for all ranks' counts. Kernels that communicate in prefill hold SMs: while two micro-batches run, the large products
leave those SMs free.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

import torch

Result = TypeVar("Result")
Steps = Generator[str, None, Result]
STAGES = ("attention", "dispatch", "arrival", "experts", "combine", "return")
HEAD_START = 4  # stages by which a is ahead of b


def run(steps: Steps[Result]) -> Result:
    """Exhaust one generator and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def run_two(a: Steps[Result], b: Steps[Result]) -> tuple[Result, Result]:
    """Run both to their ends, in turns, and return their results. Collective."""
    results: dict[str, Result] = {}

    def turn(name: str, steps: Steps[Result]) -> None:
        if name not in results:
            try:
                next(steps)
            except StopIteration as stop:
                results[name] = stop.value

    for _ in range(HEAD_START):
        turn("a", a)
    while len(results) < 2:
        turn("a", a)
        turn("b", b)
    return results["a"], results["b"]


class Beside:
    """A second stream, for work whose result is needed only later. On a CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        # Default priority: at a higher one, its kernels take SMs from the main stream's and decode gets slower.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Do `work` beside the work that is enqueued from here on. Returns a function that waits for its result.

        Hazard: keep the tensors that `work` reads until then. The allocator could otherwise reuse their memory, because
        it only knows the order of the main stream.
        """
        stream = self.stream
        if stream is None:
            result = work()
            return lambda: result
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = work()

        def join() -> Result:
            torch.cuda.current_stream().wait_stream(stream)
            return result

        return join
