"""What the one-sided transports share: registered memory, locations, and sends that wait until they have been read.

A location says where pages lie in the sender's memory: the address of page 0, the distance from a layer to the next,
and the runs of pages to read.

A process registers the memory of all its credits once, because registering takes longer than many a transfer. It stays
registered as long as the process lives. So a peer that reads late finds memory, and its own room ends with the link.
"""

import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from disagg.handoff.credits import IN_FLIGHT, most_pages
from disagg.handoff.transport import Transfer

PAUSE_S = 0.0003  # between two questions to a library: has it completed?
WHERE = struct.Struct("<QIQ")  # of a location: the address of page 0, the device, and bytes from a layer to the next
PAGES = struct.Struct("<II")  # of a location, repeated: the first page of a run, and how many pages it has
MOST_ADDRESS = 2**64
Run = tuple[int, int, int]  # address here, address at the peer, bytes


class Staging:
    """The buffers of a process's transfers: one for each credit, `credits.buffer_bytes` in all."""

    def __init__(self, pool: Tensor) -> None:
        """`pool` [layers, pages, ..]: what is sent, or unpacked to."""
        page = pool[:, 0].nbytes
        self.memory = torch.empty(IN_FLIGHT, most_pages(page) * page, dtype=torch.uint8, device=pool.device)

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[credit, :nbytes].view(dtype).view(shape)


class Announced:
    """A send: it completes when the peer has read it."""

    def __init__(self, x: Tensor, nbytes: int, progress: Callable[[], None] | None) -> None:
        """`nbytes`: of x, so many. `progress`: called while waiting, if the library needs that to serve the peer."""
        self.x, self.nbytes, self.began, self._progress = x, nbytes, time.perf_counter(), progress
        self.was_read = False
        self.ended = threading.Event()

    def wait(self) -> None:
        while not self.ended.wait(None if self._progress is None else PAUSE_S):
            assert self._progress is not None  # otherwise the wait has no limit
            self._progress()
        if not self.was_read:
            raise RuntimeError("the link went down before the other end had read")


class OneSided(ABC):
    """One end of a link. A subclass reads."""

    one_sided = True
    in_place = False

    def __init__(self, staging: Staging, progress: Callable[[], None] | None = None) -> None:
        self._staging, self._progress = staging, progress
        self._lock = threading.Lock()  # guards the following
        self._unread: deque[Announced] = deque()
        self._aborted = False

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._staging.buffer(credit, shape, dtype)

    def send(self, x: Tensor, pages: list[int] | None = None) -> tuple[Transfer, bytes]:
        runs = [(0, x.shape[1])] if pages is None else runs_of(pages)
        transfer = Announced(x, sum(count for _, count in runs) * x[:, 0].nbytes, self._progress)
        with self._lock:
            if self._aborted:
                raise RuntimeError("the link is down")
            self._unread.append(transfer)
        where = WHERE.pack(x.data_ptr(), x.device.index or 0, x.stride(0) * x.itemsize)
        return transfer, where + b"".join(PAGES.pack(*run) for run in runs)

    def was_read(self) -> None:
        with self._lock:
            if not self._unread:
                raise ValueError("the other end says that it has read, and nothing was sent")
            oldest = self._unread.popleft()
        oldest.was_read = True
        oldest.ended.set()

    def recv(self, x: Tensor, location: bytes) -> Transfer:
        runs, device = parse_location(location, x)
        if self._aborted:
            raise RuntimeError("the link is down")
        return self._read(x, runs, device)

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            for transfer in self._unread:
                transfer.ended.set()
            self._unread.clear()

    @abstractmethod
    def _read(self, x: Tensor, runs: list[Run], device: int) -> Transfer:
        """Start to read `runs` from the peer's memory into `x`. Raises RuntimeError, if none will be written."""

    @abstractmethod
    def greet(self) -> None:
        """As in Transport."""


def runs_of(pages: list[int]) -> list[tuple[int, int]]:
    """Return `pages` as runs of pages that follow each other: (the first page, how many)."""
    runs = [(pages[0], 1)]
    for page in pages[1:]:
        first, count = runs[-1]
        if page == first + count:
            runs[-1] = first, count + 1
        else:
            runs.append((page, 1))
    return runs


def parse_location(location: bytes, x: Tensor) -> tuple[list[Run], int]:
    """Return what is to be read into x [layers, n, ..] contiguous, as long runs as possible, and the peer's device.

    Raises ValueError if the location does not name n pages.
    """
    layers, n = x.shape[:2]
    page = x[0, 0].nbytes
    if len(location) > WHERE.size + n * PAGES.size:  # before it takes time and memory
        raise ValueError(f"the other end sent a location of {len(location)} bytes, too many for {n} pages")
    try:
        address, device, stride = WHERE.unpack_from(location)
        pages = list(PAGES.iter_unpack(location[WHERE.size :]))
    except struct.error:
        raise ValueError(f"the other end sent a location of {len(location)} bytes, which is none") from None
    counts = [count for _, count in pages]
    if sum(counts) != n:
        raise ValueError(f"the other end sent a location of {sum(counts)} pages, and not of {n}")
    if not all(counts):
        raise ValueError(f"the other end sent a location of {n} pages, one run of none")
    if address + (layers - 1) * stride + max(first + count for first, count in pages) * page > MOST_ADDRESS:
        raise ValueError("the other end sent a location behind the last address")
    runs: list[Run] = []
    here = x.data_ptr()
    for layer in range(layers):
        for first, count in pages:
            there, size = address + layer * stride + first * page, count * page
            if runs and there == sum(runs[-1][1:]):
                runs[-1] = *runs[-1][:2], runs[-1][2] + size
            else:
                runs.append((here, there, size))
            here += size
    return runs, device
