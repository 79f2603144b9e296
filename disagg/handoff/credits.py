"""Credits: the limit on transfers in flight per process, and the memory of their buffers."""

import threading
import time
from collections import deque
from collections.abc import Callable

IN_FLIGHT = 6  # transfers per process, from packing to unpacking: each has its own buffer
LOOK_S = 0.1  # between two calls of `check` while waiting
MOST_BYTES = 213 * 2**20  # per transfer, unless a single page is larger


def most_pages(page: int) -> int:
    """Pages per transfer, for pages of `page` bytes."""
    return max(1, MOST_BYTES // page)


def buffer_bytes(page: int) -> int:
    """GPU memory that a process's links take at most, for pages of `page` bytes."""
    return IN_FLIGHT * most_pages(page) * page


class Credits:
    """One credit per transfer in flight, shared by the links of a process. A credit is the number of its buffer.

    A link may take one more while more are free than it holds: a lone link three, and after it another two, and then
    one is left. So links whose peers are stuck, and keep what they have, stop the others only when there are three.

    No deadlock: a link that holds a credit waits for its peer, whose end needs a credit of its own process. Every
    holder of one of those is only waiting for bytes already sent.
    """

    def __init__(self) -> None:
        self.free = deque(range(IN_FLIGHT))
        self.changed = threading.Condition()  # guards `free`, and what each link holds


class Share:
    """The credits that one link holds."""

    def __init__(self, credits: Credits) -> None:
        self._credits = credits
        self._held: set[int] = set()
        self._closed = False

    @property
    def held(self) -> int:
        """Transfers of this link in flight."""
        return len(self._held)

    def take(self, check: Callable[[], None], limit_s: float) -> int:
        """Wait for a credit. `check()` is called every LOOK_S meanwhile, and may raise to stop waiting.

        Raises RuntimeError if this share is closed, TimeoutError if there is none within `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        while (credit := self.try_take(LOOK_S)) is None:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no buffer has become free in {limit_s:g} s: other peers are stuck")
        return credit

    def try_take(self, seconds: float) -> int | None:
        """Return a credit, or None if there is none for this link for so long. Raises RuntimeError like `take`."""
        with self._credits.changed:
            if not self._credits.changed.wait_for(lambda: self._closed or self._may_take, seconds):
                return None
            if self._closed:
                raise RuntimeError("closed")
            credit = self._credits.free.popleft()
            self._held.add(credit)
            return credit

    @property
    def _may_take(self) -> bool:
        return len(self._credits.free) > len(self._held)

    def give_back(self, credit: int) -> None:
        """Give a credit back, unless `close` has done so."""
        with self._credits.changed:
            if credit in self._held:
                self._held.remove(credit)
                self._credits.free.append(credit)
                self._credits.changed.notify_all()

    def shut(self) -> None:
        """Let no more credits be taken. Those that are held come back one by one."""
        with self._credits.changed:
            self._closed = True
            self._credits.changed.notify_all()

    def close(self, but: int | None = None) -> None:
        """Give all credits back, or all but one. No more can be taken."""
        self.shut()
        for credit in self._held - {but}:
            self.give_back(credit)
