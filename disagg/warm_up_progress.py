"""How far the warm-up is: a bar on a terminal, elsewhere a line every few seconds. Kernels may compile for minutes."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from tqdm import tqdm

EVERY_S = 5.0  # between two lines
Size = TypeVar("Size")


class Shown(Protocol):
    def __call__(self, sizes: Iterable[Size], what: str) -> Iterable[Size]:
        """Return the sizes, to be worked through one after the other. `what`: the part of the warm-up that has them."""
        ...


def silent(sizes: Iterable[Size], what: str) -> Iterable[Size]:
    return sizes


class WarmUpProgress:
    """Shows people how far the warm-up is, and takes the time of its parts."""

    def __init__(self, say: Callable[[str], None], bar: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`say` is called with a line, if there is no bar. `bar`: show one, if this is a terminal."""
        self._say, self._clock, self._bar = say, clock, bar and sys.stderr.isatty()
        self._said = clock()
        self.seconds: dict[str, float] = {}  # by part

    def __call__(self, sizes: Iterable[Size], what: str) -> Iterator[Size]:
        began, sizes = self._clock(), list(sizes)
        for done, size in enumerate(tqdm(sizes, desc=f"warming up: {what}", disable=not self._bar)):
            if not self._bar and self._clock() - self._said >= EVERY_S:
                self._said = self._clock()
                self._say(f"warming up: {what}, {done} of {len(sizes)} done")
            yield size
        self.seconds[what] = self.seconds.get(what, 0.0) + self._clock() - began

    @property
    def summary(self) -> str:
        """Return the seconds, for the log; empty if nothing was warmed up."""
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}" if parts else ""
