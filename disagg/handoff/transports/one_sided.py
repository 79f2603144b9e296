"""What the one-sided transports share: registered buffers, locations, and sends that wait until they have been read.

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
LOCATION = struct.Struct("<QI")  # address and device


class Staging:
    """The buffers of a process's transfers: one for each credit, `credits.buffer_bytes` in all."""

    def __init__(self, page: int, device: torch.device) -> None:
        """`page`: bytes of a page over all layers."""
        self.memory = torch.empty(IN_FLIGHT, most_pages(page) * page, dtype=torch.uint8, device=device)

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[credit, :nbytes].view(dtype).view(shape)


class Announced:
    """A send: it completes when the peer has read it."""

    def __init__(self, x: Tensor, progress: Callable[[], None] | None) -> None:
        """`progress`: called repeatedly while waiting, if the library needs that to serve the peer."""
        self.x, self.began, self._progress = x, time.perf_counter(), progress
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

    def __init__(self, staging: Staging, progress: Callable[[], None] | None = None) -> None:
        self._staging, self._progress = staging, progress
        self._lock = threading.Lock()  # guards the following
        self._unread: deque[Announced] = deque()
        self._aborted = False

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._staging.buffer(credit, shape, dtype)

    def send(self, x: Tensor) -> tuple[Transfer, bytes]:
        transfer = Announced(x, self._progress)
        with self._lock:
            if self._aborted:
                raise RuntimeError("the link is down")
            self._unread.append(transfer)
        return transfer, LOCATION.pack(x.data_ptr(), x.device.index or 0)

    def was_read(self) -> None:
        with self._lock:
            if not self._unread:
                raise ValueError("the other end says that it has read, and nothing was sent")
            oldest = self._unread.popleft()
        oldest.was_read = True
        oldest.ended.set()

    def recv(self, x: Tensor, location: bytes) -> Transfer:
        try:
            address, device = LOCATION.unpack(location)
        except struct.error:
            raise ValueError(f"the other end sent a location of {len(location)} bytes, not {LOCATION.size}") from None
        if self._aborted:
            raise RuntimeError("the link is down")
        return self._read(x, address, device)

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            for transfer in self._unread:
                transfer.ended.set()
            self._unread.clear()

    @abstractmethod
    def _read(self, x: Tensor, address: int, device: int) -> Transfer:
        """Start to read the peer's bytes at this address into `x`. Raises RuntimeError, if none will be written."""

    @abstractmethod
    def greet(self) -> None:
        """As in Transport."""
