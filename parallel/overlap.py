"""How layers run. A layer is a generator that yields at its communication points; see `model/moe.py`."""

from collections.abc import Callable, Generator
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def run(steps: Generator[None, None, Result]) -> Result:
    """Exhaust one generator: the plain path."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


class Beside:
    """A second stream, for work that is not on the way to what follows it. On a CPU there is none."""

    def __init__(self, device: torch.device):
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
