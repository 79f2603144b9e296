"""What the one-sided transports share: registered memory, locations, and sends that wait until they have been read.

A location says where pages lie in the sender's memory: the address of page 0, the distance from a layer to the next,
and the runs of pages to read. The router has compared both sides' models, so a page has the same layers and bytes here.

A process registers memory once, because registering takes longer than many a transfer. In place, that is its pool,
otherwise the buffers of all its credits. It stays registered as long as the process lives. So a peer that reads late
finds memory, and its own room ends with the link.
"""

import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

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

    def __init__(self, staging: Staging | None, progress: Callable[[], None] | None = None) -> None:
        """`staging`: None if it reads in place. `progress`: as in `Announced`."""
        self._staging, self._progress = staging, progress
        self._lock = threading.Lock()  # guards the following
        self._unread: deque[Announced] = deque()
        self._aborted = False

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self._staging is not None, "pages go from pool to pool"
        return self._staging.buffer(credit, shape, dtype)

    def send(self, x: Tensor, pages: list[int] | None = None) -> tuple[Transfer, bytes]:
        runs = [(0, x.shape[1])] if pages is None else [(first, count) for first, _, count in runs_of(pages, pages)]
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

    def recv(self, x: Tensor, location: bytes, pages: list[int] | None = None) -> Transfer:
        runs, device = parse_location(location, x, pages)
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
        """Start to read `runs` from the peer's memory into `x`. Raises RuntimeError if nothing will be written."""

    @abstractmethod
    def greet(self) -> None:
        """As in Transport."""


def parse_location(location: bytes, x: Tensor, pages: list[int] | None = None) -> tuple[list[Run], int]:
    """Return what is to be read into `pages` of x [layers, n, ..], and the peer's device. Runs are as long as possible.

    None: into all n, and x is contiguous. Raises ValueError if the location does not name as many pages.
    """
    layers, page, here, stride = x.shape[0], x[0, 0].nbytes, x.data_ptr(), x.stride(0) * x.itemsize
    mine = range(x.shape[1]) if pages is None else pages
    if len(location) > WHERE.size + len(mine) * PAGES.size:  # before it takes time and memory
        raise ValueError(f"the other end sent a location of {len(location)} bytes, too many for {len(mine)} pages")
    try:
        there, device, their_stride = WHERE.unpack_from(location)
        named = list(PAGES.iter_unpack(location[WHERE.size :]))
    except struct.error:
        raise ValueError(f"the other end sent a location of {len(location)} bytes, which is none") from None
    counts = [count for _, count in named]
    if sum(counts) != len(mine):
        raise ValueError(f"the other end sent a location of {sum(counts)} pages, and not of {len(mine)}")
    if not all(counts):
        raise ValueError(f"the other end sent a location of {len(mine)} pages, one run of none")
    if there + (layers - 1) * their_stride + max(first + count for first, count in named) * page > MOST_ADDRESS:
        raise ValueError("the other end sent a location behind the last address")
    theirs = [one for first, count in named for one in range(first, first + count)]
    runs = [(here + a * page, there + b * page, count * page) for a, b, count in runs_of(mine, theirs)]
    if len(runs) == 1 and runs[0][2] == stride == their_stride:  # no gap between two layers
        return [(*runs[0][:2], layers * stride)], device
    return [(a + i * stride, b + i * their_stride, size) for i in range(layers) for a, b, size in runs], device


def runs_of(pages: Sequence[int], others: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return pages that follow each other in both lists as one run: (its first page, its first other one, how many)."""
    runs = [(pages[0], others[0], 1)]
    for page, other in zip(pages[1:], others[1:], strict=True):
        first, first_other, count = runs[-1]
        if (page, other) == (first + count, first_other + count):
            runs[-1] = first, first_other, count + 1
        else:
            runs.append((page, other, 1))
    return runs
