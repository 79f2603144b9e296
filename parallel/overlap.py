"""How layers run. A layer is a generator that yields at its communication points; see `model/moe.py`."""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")


def run(steps: Generator[None, None, Result]) -> Result:
    """Exhaust one generator: the plain path."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
