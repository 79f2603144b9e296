"""Credits: how many transfers the links of a process have under way at once, and what their buffers take."""

import threading
from collections.abc import Callable

IN_FLIGHT = 4  # transfers of a process, on the wire, before it or behind it: each has a buffer of its own
OF_A_LINK = 3  # of these, at most: one peer that is stuck must not stop the others
LOOK_S = 0.1
MOST_BYTES = 320 * 2**20  # of a transfer, unless a page has more


def most_pages(page: int) -> int:
    """Of a transfer, with pages of so many bytes."""
    return max(1, MOST_BYTES // page)


def buffer_bytes(page: int) -> int:
    """What a process's links take at most of its GPU's memory, with pages of so many bytes."""
    return IN_FLIGHT * most_pages(page) * page


class Credits:
    """One for each transfer under way, shared by the links of a process.

    No circle of links can wait for one another: a link with a credit waits for its peer, whose end needs a credit of
    its own process, and who has that one waits for bytes that are on their way.
    """

    def __init__(self) -> None:
        self.free = threading.Semaphore(IN_FLIGHT)


class Share:
    """The credits that one link holds."""

    def __init__(self, credits: Credits):
        self._credits, self._lock = credits, threading.Lock()
        self._mine = threading.Semaphore(OF_A_LINK)
        self._held, self._closed = 0, False

    def take(self, look: Callable[[], None]) -> None:
        """Wait for one. `look` is called now and then meanwhile, and may raise; RuntimeError if this is closed."""
        for free in (self._mine, self._credits.free):
            while not free.acquire(timeout=LOOK_S):
                look()
        with self._lock:
            if not self._closed:
                self._held += 1
                return
        self._release()
        raise RuntimeError("closed")

    def give_back(self) -> None:
        with self._lock:
            if not self._closed:
                self._held -= 1
                self._release()

    def close(self) -> None:
        """Give all back, and take no more."""
        with self._lock:
            self._closed = True
            for _ in range(self._held):
                self._release()
            self._held = 0

    def _release(self) -> None:
        self._mine.release()
        self._credits.free.release()
