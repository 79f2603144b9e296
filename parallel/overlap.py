"""How layers run: one micro-batch alone, or two that take turns, so that one computes while the other communicates.

The layers of a micro-batch are one generator (`Transformer.moe_steps`), which yields the name of each stage when done:

    attention     norm, projections, KV written, attention itself, output projection, norm, gate
    dispatch      tokens sent to their experts' ranks; shared expert, if it does not run beside the gate
    arrival       tokens received
    experts       the experts
    combine       their results sent back
    return        results received: the layer's end

`run` exhausts one generator: the plain path. `run_two` lets two take turns, a stage each, with b four stages behind a.
Then each of a layer's four transfers has one of its four computations to hide behind, and there is never a second one
in flight, which DeepEP's low latency requires (each operation clears the other's buffer). a0, a1: a in layers 0, 1:

    compute   a0 attention | a0 experts | b0 attention | a1 attention | b0 experts  | a1 experts | b1 attention | ...
    network                |            | a0 combine   | b0 dispatch  | a1 dispatch | b0 combine | a1 combine   | ...

Turn by turn, from where both are at work (`>` is in flight from `dispatch>` to `>arrival`, `combine>` to `>return`):

    a0 combine> b0 attention a0 >return | b0 dispatch> a1 attention b0 >arrival | a1 dispatch> b0 experts a1 >arrival |
    b0 combine> a1 experts b0 >return | a1 combine> b1 attention a1 >return

(SGLang's five stages with b two behind hide transfers behind attention only: experts wait for them and they for it.)
A dispatch of prefill makes the host wait, in `arrival`, until its tokens are there; by then the other micro-batch's
next computation is enqueued, so that the GPU does not wait with it. And kernels that communicate in prefill hold SMs:
while two micro-batches run, the large products leave those to them.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Steps = Generator[str, None, Result]
FEW_ROWS, FEW_TOKENS = 128, 4096  # a rank's, from which on `auto` overlaps: of a decode step, of one with prompts
# And the rows that an expert must get, for each. In decode, with fewer, it takes as long as reading its weights does,
# which two halves do twice. That is an estimate: an H100 makes about 1,400 TFLOP/s of fp8 from 3 TB/s, 233 rows.
# Measured: a loss with 16 to 32 rows; simulated: a loss with 144, a gain with 288. In prefill four H200s lost with up
# to 512 rows, and broke even with 1,024; with 2,048 they gained 1 %.
DECODE_ROWS, PREFILL_ROWS = 256, 2048
STAGES = ("attention", "dispatch", "arrival", "experts", "combine", "return")
HEAD_START = 4  # stages that a is ahead


@dataclass(frozen=True)
class Rule:
    """Which steps run as two halves (--overlap). A function of what the ranks agreed on, so that all decide alike.

    `auto` leaves it where it does not pay: with one rank, in small steps, and where experts get few rows. The
    deployment's break-even in decode lay between 64 and 128 tokens a rank of 72: 144 to 288 rows an expert.
    """

    mode: str  # auto, on, off
    ep_size: int
    attn_tp: int
    share: float  # of the job's tokens that an expert gets (ModelConfig.expert_share)

    def in_decode(self, rows: int) -> bool:
        """`rows` of every replica, padding included; each half must divide over the attention group."""
        return self._wanted(rows, self._decode_from) and rows % (2 * self.attn_tp) == 0

    def row_multiple(self, rows: int) -> int:
        """What the rows of a decode step must be a multiple of, so that it can be divided as it should."""
        return (2 if self._wanted(rows, self._decode_from) else 1) * self.attn_tp

    def in_prefill(self, tokens: int) -> bool:
        """`tokens` of the fullest replica in a step with prompts."""
        return self._wanted(tokens, self._prefill_from)

    def _wanted(self, tokens: int, least: int) -> bool:
        if self.mode == "auto":
            return not self._never and tokens // self.attn_tp >= least
        return self.mode == "on"

    @property
    def _decode_from(self) -> int:
        """A rank's tokens from which on `auto` overlaps."""
        return self._least(FEW_ROWS, DECODE_ROWS)

    @property
    def _prefill_from(self) -> int:
        return self._least(FEW_TOKENS, PREFILL_ROWS)

    def _least(self, few: int, rows_an_expert: int) -> int:
        return few if self._never else max(few, math.ceil(rows_an_expert / (self.ep_size * self.share)))

    @property
    def _never(self) -> str:
        return "one rank" if self.ep_size == 1 else "" if self.share else "no experts"

    @property
    def why(self) -> str:
        """A line for the log."""
        if self.mode != "auto":
            return self.mode
        if self._never:
            return f"off: {self._never}"
        return (
            f"in decode from {self._decode_from} rows a rank, in prefill from {self._prefill_from} tokens a rank; "
            f"off below"
        )


def run(steps: Steps[Result]) -> Result:
    """Exhaust one generator."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def run_two(a: Steps[Result], b: Steps[Result]) -> tuple[Result, Result]:
    """Run both to their ends, in turns. Every rank must call this: collectives are in it."""
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
    """A second stream, for work that is not on the way to what follows it. On a CPU there is none."""

    def __init__(self, device: torch.device):
        # Of the default priority: at a higher one its kernels take SMs from the main stream's, and decode gets slower.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Do `work` beside what is enqueued from here on. Call what comes back to wait for its result.

        What `work` reads must be kept until then: its memory belongs to the other stream's order.
        """
        if self.stream is None:
            result = work()
            return lambda: result
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()

        def join() -> Tensor:
            torch.cuda.current_stream().wait_stream(self.stream)
            return result

        return join
