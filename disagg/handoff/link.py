"""Link: one end of the handoff between two ranks (see `protocol.py`), with two threads.

The link's own thread owns the pipe and starts transfers. The second thread, the mover, waits for each transfer in turn
and does the work that follows it. The next transfer starts while one is in flight, so the wire waits for neither:

    prefill   link   pack 0, announce | pack 1, announce | pack 2 ...
              wire            0 >>>>>>>>>>>>>| 1 >>>>>>>>>>>>>| 2 >>>
    decode    mover                          | unpack 0       | unpack 1, room done

Pages that become ready while the wire is busy share the next transfer, across rooms. So the two processes' cost per
transfer is hidden behind the wire. A transport that is `in_place` needs neither packing nor unpacking.

A link can fail or be stopped. Either way its rooms fail at once. It fails also when its oldest transfer has taken
TIMEOUT, because not every library has a limit of its own. A receive that the library cannot cancel goes on in the
mover, and keeps its credit.

Whoever may write the pages of a room has a *claim* on it: a receive in place from its start, another one while it is
unpacked. A room that is claimed when its link goes down has failed, and ends when the last claim is let go of. Its
pages stay its own until then.
"""

import functools
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import zmq
from torch import Tensor

from disagg.control.ports import new_socket
from disagg.handoff.credits import Credits, Share
from disagg.handoff.pipe import Pipe
from disagg.handoff.protocol import AllRead, Cancel, Command, Join, LinkEvent, Message, Read, RoomEnded, RoomFailed
from disagg.handoff.transport import TIMEOUT, Transfer, Transport

CHECK_MS = 500  # between two looks whether a transfer is stuck


class Task(NamedTuple):
    """For the mover: what to do when a transfer has completed, and everything given to it before."""

    then: Callable[[], None]
    transfer: Transfer | None = None
    credit: int | None = None  # of the transfer, to be given back after `then()`
    claimed: Sequence[int] = ()  # rooms, to be let go of after `then()`


@functools.cache
def packing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all links of a process allocate their buffers.

    Shared, because torch's allocator keeps freed memory for the stream that it was allocated on.
    """
    return torch.cuda.Stream(device, priority=-1)  # not a priority whose streams may wait for a peer


class Link(threading.Thread, ABC):
    """One end of a link. Only its thread uses its pipe and transport. The rank's loop calls only `put` and `stop`."""

    def __init__(
        self,
        key: str,
        connect: Callable[[str], tuple[Pipe, Transport]],
        pool: Tensor,
        events: queue.SimpleQueue[LinkEvent],
        credits: Credits,
    ) -> None:
        """`connect(key)` runs in the thread, and may block or raise. `events`: the queue that the rank's loop drains.
        `credits`: shared by all links of the process."""
        super().__init__(name=f"link {key}", daemon=True)
        self.key, self.pool = key, pool
        self.transfers, self.bytes_moved, self.seconds_moving = 0, 0, 0.0
        self.mismatches = 0  # transfers that did not have their checksum, by the sender's last word on a room
        self._connect, self._events = connect, events
        self._commands: deque[Command] = deque()
        self._words: deque[Read | AllRead | Cancel] = deque()  # from the mover; they must not wait behind commands
        self._changed = threading.Condition()  # guards what follows, up to _down
        self._rooms: dict[int, frozenset[int]] = {}  # joined and not yet ended: the pages to which its KV may come
        self._claims: Counter[int] = Counter()  # by room: how many may be writing its pages
        self._failed: set[int] = set()  # rooms that end when they are let go of
        self._down: str | None = None  # the reason, once it is down
        self._wake, self._woken = new_socket(zmq.PAIR), new_socket(zmq.PAIR)
        address = f"inproc://{uuid.uuid4().hex}"
        self._wake.bind(address)
        self._woken.connect(address)
        self._pipe: Pipe | None = None
        self._transport: Transport | None = None
        self._aborted = threading.Event()  # set when `_go_down` does not need the transport any more
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()  # for the mover; None ends it
        self._credits = Share(credits)
        self._credit: int | None = None  # of the transfer that the mover sees through
        self._stream = packing_stream(pool.device) if pool.is_cuda else None
        self._awaited_since: float | None = None  # time.monotonic() when the mover began to wait for a transfer
        self._mover = threading.Thread(target=self._see_through, name=f"mover {key}", daemon=True)
        self._mover.start()
        self.start()

    @property
    def pipe(self) -> Pipe:
        """Valid in this link's thread, once it has connected."""
        assert self._pipe is not None
        return self._pipe

    @property
    def transport(self) -> Transport:
        """Valid in this link's thread, once it has connected."""
        assert self._transport is not None
        return self._transport

    def put(self, command: Command) -> None:
        """Queue a command for the link's thread. A room joined after the link went down ends at once, with an error."""
        with self._changed:
            if isinstance(command, Join):
                if self._down is not None:
                    self._events.put(RoomEnded(command.uid, self._down, link_down=True))
                else:
                    self._rooms[command.uid] = frozenset(command.pages)
                    self._changed.notify()
            if self._down is None:
                self._commands.append(command)
                self._wake.send(b"", zmq.DONTWAIT)

    @property
    def in_flight(self) -> int:
        """Transfers that have begun and are not complete."""
        return self._credits.held

    @property
    def is_down(self) -> bool:
        return self._down is not None

    def stop(self) -> None:
        """End the link; the peer may be dead. Its rooms fail at once, and end when nobody writes their pages.

        With NCCL, a transfer in flight ends too. Otherwise a receive stays in the mover: with gloo until its time-out,
        with a one-sided library until that is done with it.
        """
        self._go_down("stopped")

    def _go_down(self, error: str) -> None:
        """Fail all rooms, and end those that nobody has claimed. Then abort the transport. Only the first call does."""
        with self._changed:
            if self._down is not None:
                return
            self._down = f"link {self.key}: {error}"
            for uid in self._rooms:
                if uid in self._claims:
                    self._failed.add(uid)
                    self._events.put(RoomFailed(uid, self._down))
                else:
                    self._events.put(RoomEnded(uid, self._down, link_down=True))
            self._rooms.clear()
            unpacking = self._credit if self._claims else None
            self._changed.notify()
            with suppress(zmq.Again):  # its thread saw `_down` already, and has ended
                self._wake.send(b"", zmq.DONTWAIT)
        try:
            if self._transport is not None:
                self._transport.abort()
        finally:  # only after the abort, which frees the buffers, but for one that is being unpacked
            if self._transport is not None and self._transport.one_sided:
                self._credits.shut()  # the mover gives back each credit, when its buffer is free
            else:
                self._credits.close(but=unpacking)
            self._aborted.set()

    def run(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_device(self.pool.device)
                torch.cuda.set_stream(self._stream)
            self._pipe, self._transport = self._connect(self.key)
            self.meet()
            self.transport.greet()
            self._loop()
        except Exception as broken:  # any failure ends the rooms
            self._go_down(f"{type(broken).__name__}: {broken}")
        finally:
            if self._pipe is not None:
                self._pipe.close()  # first, so that the peer learns of the end
            self._tasks.put(None)
            with self._changed:  # `_go_down` may still be waking this thread
                self._wake.close()
            self._woken.close()

    def then(
        self,
        then: Callable[[], None],
        transfer: Transfer | None = None,
        credit: int | None = None,
        claimed: Sequence[int] = (),
    ) -> None:
        """Have the mover call `then()` as a `Task`."""
        self._tasks.put(Task(then, transfer, credit, claimed))

    def tell(self, word: Read | AllRead | Cancel) -> None:
        """Have the link's thread handle a word of the mover."""
        with self._changed:
            if self._down is None:
                self._words.append(word)
                self._wake.send(b"", zmq.DONTWAIT)

    def _see_through(self) -> None:
        """The mover's thread."""
        if self._stream is not None:
            torch.cuda.set_device(self.pool.device)
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # not a priority whose streams may wait for a peer
        ended = 0.0
        while (task := self._tasks.get()) is not None:
            then, transfer, credit, claimed = task
            self._credit = credit
            try:
                try:
                    if transfer is not None:
                        self._awaited_since = time.monotonic()
                        transfer.wait()
                        self._awaited_since = None
                        began, ended = max(transfer.began, ended), time.perf_counter()
                        self.seconds_moving += ended - began
                        self.bytes_moved += transfer.nbytes
                        self.transfers += 1
                    then()
                finally:
                    self.let_go(claimed)
            except Exception as broken:
                self._go_down(f"{type(broken).__name__}: {broken}")
            task = transfer = then = None  # free the buffer before giving back its credit
            if credit is not None:
                self._credits.give_back(credit)
        self._aborted.wait()
        if self._transport is not None:
            self._transport.abort()  # it may have connected after the link went down
            self._transport = None  # frees its sockets and threads
        self._credits.close()  # one may have been taken for a transfer that never began

    def meet(self) -> None:
        """Wait until the peer is at the pipe. Only the end that opened the pipe needs to.

        Raises if the peer does not come, or if the link goes down meanwhile.
        """

    def check(self) -> None:
        """Raise if there is nothing to wait for any more, or if a transfer is stuck. Called while this thread waits."""
        if self._down is not None:
            raise RuntimeError(self._down)
        since = self._awaited_since
        if since is not None and time.monotonic() - since > TIMEOUT.total_seconds():
            raise TimeoutError(f"a transfer took over {TIMEOUT.total_seconds():g} s")

    def _loop(self) -> None:
        while self._down is None:
            self.check()
            look = CHECK_MS if self.in_flight else None
            self.attend(0 if self._commands else self.pipe.patience_ms or look)
            if self._commands:  # after messages: a Cancel must overtake sends that are still queued
                self.handle(self._commands.popleft())

    def attend(self, timeout_ms: int | None) -> None:
        """Handle the peer's messages and the mover's words, after waiting for one or for a command.

        Raises ConnectionError if the peer has left.
        """
        poller = zmq.Poller()
        for sock in (self.pipe.sock, self.pipe.monitor, self._woken):
            poller.register(sock, zmq.POLLIN)
        came = dict(poller.poll(timeout_ms))
        gone = self.pipe.has_gone  # its last messages may still be unread
        if gone or self.pipe.sock in came:
            for message in self.pipe.poll():
                self.handle(message)
        if gone:
            raise ConnectionError("the other end has gone")
        if self._woken in came:
            self._woken.recv()
        while self._words:
            self.handle(self._words.popleft())

    @abstractmethod
    def handle(self, item: Message | Command | AllRead) -> None:
        """Handle a message from the peer, a command from the loop, or a word of the mover."""

    def buffer(self, credit: int, num_pages: int) -> Tensor:
        """Return an empty tensor for packed pages: [layers, pages, 64, C + R]."""
        layers, _, *page = self.pool.shape
        return self.transport.buffer(credit, (layers, num_pages, *page), self.pool.dtype)

    def page_ids(self, pages: list[int]) -> Tensor:
        """Return `pages` on the pool's device. Checks their range, because kernels do not."""
        if not 0 <= min(pages) <= max(pages) < self.pool.shape[1]:
            raise ValueError(f"{pages=} of a pool of {self.pool.shape[1]}")
        ids = torch.tensor(pages, dtype=torch.int64, pin_memory=self.pool.is_cuda)
        return ids.to(self.pool.device, non_blocking=True)

    def is_open(self, uid: int) -> bool:
        return uid in self._rooms

    def claim(self, uids: Sequence[int]) -> bool:
        """Keep rooms from ending with the link until `let_go`, to write their pages. Returns False if it is down."""
        with self._changed:
            if self._down is None:
                self._claims.update(uids)
            return self._down is None

    def let_go(self, uids: Sequence[int]) -> None:
        """End the writing of a claim. The last one of a room that has failed ends the room."""
        with self._changed:
            self._claims.subtract(uids)
            self._claims = +self._claims
            for uid in self._failed.intersection(uids) - self._claims.keys():
                self._failed.remove(uid)
                self._events.put(RoomEnded(uid, self._down, link_down=True))

    def end(self, ended: RoomEnded) -> None:
        """End a room, unless it has ended already, with the link."""
        with self._changed:
            if ended.uid in self._rooms:
                del self._rooms[ended.uid]
                self._events.put(ended)
