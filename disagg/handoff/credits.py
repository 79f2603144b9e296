"""Credits: the limit on transfers in flight per process, and the memory of their buffers."""

import queue
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
    """One credit per transfer in flight, shared by the links of a process. A credit is the number of its buffer.

    No deadlock: a link that holds a credit waits for its peer, whose end needs a credit of its own process. Every
    holder of one of those is only waiting for bytes already sent.
    """

    def __init__(self) -> None:
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for credit in range(IN_FLIGHT):
            self.free.put(credit)


class Share:
    """The credits that one link holds."""

    def __init__(self, credits: Credits) -> None:
        self._credits, self._lock = credits, threading.Lock()
        self._mine = threading.Semaphore(OF_A_LINK)
        self._held: set[int] = set()
        self._closed = False

    @property
    def held(self) -> int:
        """Transfers of this link in flight."""
        return len(self._held)

    def take(self, check: Callable[[], None]) -> int:
        """Wait for a credit. `check()` is called every LOOK_S meanwhile, and may raise to stop waiting.

        Raises RuntimeError if this share is closed.
        """
        while (credit := self.try_take(LOOK_S)) is None:
            check()
        return credit

    def try_take(self, seconds: float) -> int | None:
        """Return a credit, or None if none is free for so long, or twice that. Raises RuntimeError like `take`."""
        if not self._mine.acquire(timeout=seconds):
            return None
        try:
            credit = self._credits.free.get(timeout=seconds)
        except queue.Empty:
            self._mine.release()
            return None
        with self._lock:
            if not self._closed:
                self._held.add(credit)
                return credit
        self._release(credit)
        raise RuntimeError("closed")

    def give_back(self, credit: int) -> None:
        """Give a credit back, unless `close` has done so."""
        with self._lock:
            if credit in self._held:
                self._held.remove(credit)
                self._release(credit)

    def shut(self) -> None:
        """Let no more credits be taken. Those that are held come back one by one."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Give all credits back. No more can be taken."""
        with self._lock:
            self._closed = True
            for credit in self._held:
                self._release(credit)
            self._held.clear()

    def _release(self, credit: int) -> None:
        self._mine.release()
        self._credits.free.put(credit)
