"""Links: the threads that carry out the handoff's protocol (see `handoff.py`), two for each pair of ranks.

The link's own thread has its pipe and starts transfers; the mover sees them through, in their order, and does what is
to be done after each. So that the wire need not wait for either, the next transfer starts while one is under way:

    prefill   link   pack 0, announce | pack 1, announce | pack 2 ...
              wire            0 >>>>>>>>>>>>>| 1 >>>>>>>>>>>>>| 2 >>>
    decode    mover                          | unpack 0       | unpack 1, room done

Pages that become ready while the wire is busy share the next transfer, whatever rooms they are of: the wire then hides
what a transfer costs its two processes.

A link can go down by itself, or be stopped; either way its rooms end at once, with an error, and nothing is written to
the pool any more.
"""

import functools
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import zmq
from torch import Tensor

from disagg.control.ports import new_socket
from disagg.handoff.credits import Credits, Share
from disagg.handoff.pipe import Pipe
from disagg.handoff.protocol import Join, RoomEnded
from disagg.handoff.transport import Transfer, Transport


@functools.cache
def packing_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the threads of all links of a process, on which they allocate their buffers: what is freed is kept for
    the stream that it was allocated on."""
    return torch.cuda.Stream(device, priority=-1)  # never one of those that may wait for a peer


class Link(threading.Thread, ABC):
    """One end of a link. Its pipe and transport belong to its thread; the rank's loop calls `put` and `stop` only."""

    def __init__(
        self,
        key: str,
        connect: Callable[[str], tuple[Pipe, Transport]],
        pool: Tensor,
        events: Any,
        credits: Credits,
    ):
        """`connect(key)` runs in the thread, and may block or raise; `events` is a queue that the loop drains; the
        `credits` are those of all the process's links."""
        super().__init__(name=f"link {key}", daemon=True)
        self.key, self.pool = key, pool
        self.bytes_moved, self.seconds_moving = 0, 0.0
        self._connect, self._events = connect, events
        self._commands: deque = deque()
        self._writing = threading.Lock()  # held while the pool is written; a link goes down before or after that
        self._changed = threading.Condition()  # guards the next two
        self._rooms: set[int] = set()  # joined and not yet ended
        self._down: str | None = None  # why
        self._wake, self._woken = new_socket(zmq.PAIR), new_socket(zmq.PAIR)
        address = f"inproc://{uuid.uuid4().hex}"
        self._wake.bind(address)
        self._woken.connect(address)
        self.pipe: Pipe | None = None
        self.transport: Transport | None = None
        self._aborted = threading.Event()  # whoever took this down has done with the transport
        self._under_way: queue.SimpleQueue = queue.SimpleQueue()  # for the mover
        self._credits = Share(credits)
        self._stream = packing_stream(pool.device) if pool.is_cuda else None
        self._mover = threading.Thread(target=self._see_through, name=f"mover {key}", daemon=True)
        self._mover.start()
        self.start()

    def put(self, command: Any) -> None:
        with self._changed:
            if isinstance(command, Join):
                if self._down is not None:
                    self._events.put(RoomEnded(command.uid, self._down, link_down=True))
                else:
                    self._rooms.add(command.uid)
                    self._changed.notify()
            if self._down is None:
                self._commands.append(command)
                self._wake.send(b"", zmq.DONTWAIT)

    @property
    def is_down(self) -> bool:
        return self._down is not None

    def stop(self) -> None:
        """End the link; the peer may be dead. Its rooms end at once, and nothing is written to the pool any more.

        NCCL's transfer in flight ends too; gloo's goes on in the thread until it times out, into a buffer of its own.
        """
        self._go_down("stopped")

    def _go_down(self, error: str) -> bool:
        """End all rooms; False if they have been already."""
        with self._writing, self._changed:
            if self._down is not None:
                return False
            self._down = f"link {self.key}: {error}"
            for uid in self._rooms:
                self._events.put(RoomEnded(uid, self._down, link_down=True))
            self._rooms.clear()
            self._changed.notify()
            with suppress(zmq.Again):  # its thread saw `_down` already, and has gone
                self._wake.send(b"", zmq.DONTWAIT)
        try:
            if self.transport is not None:
                self.transport.abort()
        finally:  # only now, when the buffers go
            self._credits.close()
            self._aborted.set()
        return True

    def run(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_device(self.pool.device)
                torch.cuda.set_stream(self._stream)
            self.pipe, self.transport = self._connect(self.key)
            self.meet()
            self.transport.greet()
            self._loop()
        except Exception as broken:  # whatever broke it, the rooms must hear of it
            self._go_down(f"{type(broken).__name__}: {broken}")
        finally:
            if self.pipe is not None:
                self.pipe.close()  # first, for the peer to hear of the end here
            self._under_way.put(None)
            with self._changed:  # the one who said that it is down may still be waking this thread
                self._wake.close()
            self._woken.close()

    def then(self, then: Callable[[], None], transfer: Transfer | None = None) -> None:
        """Have the mover call this, once `transfer` is through, and all that came before."""
        self._under_way.put((transfer, then))

    def _see_through(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self.pool.device)
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # never one of those that may wait for a peer
        ended = 0.0
        while (started := self._under_way.get()) is not None:
            transfer, then = started
            moved = transfer is not None
            try:
                if moved:
                    transfer.wait()
                    began, ended = max(transfer.began, ended), time.perf_counter()
                    self.seconds_moving += ended - began
                    self.bytes_moved += transfer.x.nbytes
                then()
            except Exception as broken:
                self._go_down(f"{type(broken).__name__}: {broken}")
            transfer = started = then = None  # and with them the buffer, before there is another
            if moved:
                self._credits.give_back()
        self._aborted.wait()
        if self.transport is not None:
            self.transport.abort()  # it may have connected after the link went down
            self.transport = None  # and with it its sockets and threads go

    def meet(self) -> None:
        """Wait until the peer is at the pipe, at the end that puts it up. Raises if it does not come, or if this is
        stopped."""

    def look(self) -> None:
        """While this thread waits for a credit: raises if there is nothing to wait for any more."""
        if self._down is not None:
            raise RuntimeError(self._down)

    def _loop(self) -> None:
        poller = zmq.Poller()
        for sock in (self.pipe.sock, self.pipe.monitor, self._woken):
            poller.register(sock, zmq.POLLIN)
        while self._down is None:
            came = dict(poller.poll(0 if self._commands else self.pipe.patience_ms))
            gone = self.pipe.has_gone  # but it may still have said something
            if gone or self.pipe.sock in came:
                for message in self.pipe.poll():  # first, so that a Cancel overtakes sends that are still queued
                    self.handle(message)
            if gone:
                raise ConnectionError("the other end has gone")
            if self._woken in came:
                self._woken.recv()
            if self._commands:
                self.handle(self._commands.popleft())

    @abstractmethod
    def handle(self, item: Any) -> None:
        """A message from the peer or a command from the loop."""

    def page_ids(self, pages: list[int]) -> Tensor:
        """For a kernel, which checks no bounds."""
        if not 0 <= min(pages) <= max(pages) < self.pool.shape[1]:
            raise ValueError(f"{pages=} of a pool of {self.pool.shape[1]}")
        ids = torch.tensor(pages, dtype=torch.int64, pin_memory=self.pool.is_cuda)
        return ids.to(self.pool.device, non_blocking=True)

    def is_open(self, uid: int) -> bool:
        return uid in self._rooms

    def end(self, ended: RoomEnded) -> None:
        with self._changed:
            if ended.uid in self._rooms:
                self._rooms.remove(ended.uid)
                self._events.put(ended)
