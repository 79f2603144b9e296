"""Credits: the limit on transfers in flight per process, and the memory of their buffers."""

import threading
from collections.abc import Callable

IN_FLIGHT = 4  # transfers per process, from packing to unpacking: each has its own buffer
OF_A_LINK = 3  # of these per link, at most: one stuck peer must not stop the other links
LOOK_S = 0.1  # between two calls of `check` while waiting
MOST_BYTES = 320 * 2**20  # per transfer, unless a single page is larger


def most_pages(page: int) -> int:
    """Pages per transfer, for pages of `page` bytes."""
    return max(1, MOST_BYTES // page)


def buffer_bytes(page: int) -> int:
    """GPU memory that a process's links take at most, for pages of `page` bytes."""
    return IN_FLIGHT * most_pages(page) * page


class Credits:
    """One credit per transfer in flight, shared by the links of a process.

    No deadlock: a link that holds a credit waits for its peer, whose end needs a credit of its own process. Every
    holder of one of those is only waiting for bytes already sent.
    """

    def __init__(self) -> None:
        self.free = threading.Semaphore(IN_FLIGHT)


class Share:
    """The credits that one link holds."""

    def __init__(self, credits: Credits) -> None:
        self._credits, self._lock = credits, threading.Lock()
        self._mine = threading.Semaphore(OF_A_LINK)
        self._held, self._closed = 0, False

    @property
    def held(self) -> int:
        """Transfers of this link in flight."""
        return self._held

    def take(self, check: Callable[[], None]) -> None:
        """Wait for a credit. `check()` is called every LOOK_S meanwhile, and may raise to stop waiting.

        Raises RuntimeError if this share is closed.
        """
        for free in (self._mine, self._credits.free):
            while not free.acquire(timeout=LOOK_S):
                check()
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
        """Give all credits back. No more can be taken."""
        with self._lock:
            self._closed = True
            for _ in range(self._held):
                self._release()
            self._held = 0

    def _release(self) -> None:
        self._mine.release()
        self._credits.free.release()
