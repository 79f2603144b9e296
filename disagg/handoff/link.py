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
from disagg.handoff.credits import Credits, Share, most_pages
from disagg.handoff.pipe import Pipe
from disagg.handoff.protocol import Cancel, Closed, Join, Last, Open, RoomEnded, Sending, SendLast, SendPages
from disagg.handoff.transports.torch_dist import TIMEOUT, Passage, TorchTransport
from kernels import ref
from model.kv_cache import pages_for


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
        connect: Callable[[str], tuple[Pipe, TorchTransport]],
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
        self.transport: TorchTransport | None = None
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

    def after(self, then: Callable[[], None], passage: Passage | None = None) -> None:
        """Have the mover call this, once `passage` is through, and all that came before."""
        self._under_way.put((passage, then))

    def _see_through(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self.pool.device)
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # never one of those that may wait for a peer
        ended = 0.0
        while (started := self._under_way.get()) is not None:
            passage, then = started
            moved = passage is not None
            try:
                if moved:
                    passage.wait()
                    began, ended = max(passage.began, ended), time.perf_counter()
                    self.seconds_moving += ended - began
                    self.bytes_moved += passage.x.nbytes
                then()
            except Exception as broken:
                self._go_down(f"{type(broken).__name__}: {broken}")
            passage = started = then = None  # and with them the buffer, before there is another
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


class SendLink(Link):
    """The prefill rank's end."""

    def __init__(self, *args: Any, pack_pages: Callable[[Tensor, Tensor], Tensor] = ref.pack_pages):
        self._cancelled: set[int] = set()  # cancelled before this rank's loop joined the room
        self._sending: set[int] = set()  # rooms of which neither Last nor Closed has been said
        self._pack_pages = pack_pages
        super().__init__(*args)

    def meet(self) -> None:
        """It may come later to the pipe than to the transport, and this end be the first to speak."""
        poller, deadline = zmq.Poller(), time.monotonic() + TIMEOUT.total_seconds()
        poller.register(self.pipe.sock, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while self._down is None:
            came = dict(poller.poll(1000 * max(0, deadline - time.monotonic())))
            if self.pipe.sock in came:
                for message in self.pipe.poll():
                    self.handle(message)
                if self.pipe.is_met:
                    return
            if self._woken in came:
                self._woken.recv()
            if time.monotonic() >= deadline:
                raise TimeoutError("nobody came to the pipe")
        raise RuntimeError(self._down)

    def look(self) -> None:
        """The credits may be held by transfers to this very peer, which its leaving alone does not end."""
        super().look()
        if self.pipe.has_gone:
            raise ConnectionError("the other end has gone")

    def handle(self, item: Any) -> None:
        match item:
            case Open(request, pages):
                if len(pages) < pages_for(len(request.prompt)):
                    raise ValueError(
                        f"the other end opened a room of {len(pages)} pages for {len(request.prompt)} tokens"
                    )
                self._events.put(item)
            case Join(uid):
                self._sending.add(uid)
                if uid in self._cancelled:
                    self._cancelled.remove(uid)
                    self._conclude(Closed(uid, "cancelled"), RoomEnded(uid, "cancelled"))
            case Cancel(uid) if uid not in self._sending:
                self._cancelled.add(uid)
            case Cancel(uid):
                self._conclude(Closed(uid, "cancelled"), RoomEnded(uid, "cancelled"))
            case SendPages(uid) if uid in self._sending:
                self._send(item)
            case SendLast(uid, token, logprobs, prefill, sampled) if uid in self._sending:
                waited = time.perf_counter() - sampled
                self._conclude(Last(uid, token, logprobs, prefill, waited), RoomEnded(uid))
            case Closed(uid, error) if uid in self._sending:
                self._conclude(item, RoomEnded(uid, error))

    def _send(self, first: SendPages) -> None:
        """Start the next transfer: of these pages, and of what is ready behind them."""
        if first.ready is not None:
            first.ready.synchronize()
        self._credits.take(self.look)
        self._commands.appendleft(first)
        uids, mine, theirs, last_words = self._gather(most_pages(self.pool[:, 0].nbytes))
        packed = self._pack_pages(self.pool, self.page_ids(mine))  # [layers, pages, 64, C + R]
        # Behind the packing, and so where that had room on this GPU. The receive, which occupies the peer's until it
        # has the bytes, is asked for after both.
        passage = self.transport.send(packed)
        if packed.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.pipe.send(Sending(uids, theirs))
        self.after(lambda: None, passage)
        for word in last_words:
            self.handle(word)

    def _gather(self, most: int) -> tuple[list[int], list[int], list[int], list[SendLast | Closed]]:
        """At most so many pages from the commands that wait: their rooms, and where they are here and go there. With
        them what ends one of these rooms, which is to be handled behind its pages."""
        uids, mine, theirs, last_words = [], [], [], []
        while self._commands and len(mine) < most:
            match self._commands.popleft():
                case SendPages(uid, here, there, ready) as item if uid in self._sending:
                    if ready is not None and not ready.query():
                        self._commands.appendleft(item)
                        break
                    space = most - len(mine)
                    uids.append(uid)
                    mine += here[:space]
                    theirs += there[:space]
                    if len(here) > space:
                        self._commands.appendleft(SendPages(uid, here[space:], there[space:]))
                case SendLast(uid) | Closed(uid) as word if uid in uids:
                    last_words.append(word)
                case item:
                    self.handle(item)
        return uids, mine, theirs, last_words

    def _conclude(self, word: Last | Closed, ended: RoomEnded) -> None:
        """Say the last word of a room, which the peer takes behind the bytes; here it ends when they have left."""
        self._sending.remove(word.uid)
        self.pipe.send(word)
        self.after(lambda: self.end(ended))


class ReceiveLink(Link):
    """The decode rank's end. It does not `meet`: its side of the pipe can be written to at once. And it greets even if
    it was stopped before, for the peer may be in its own greeting already, which nothing else ends."""

    def __init__(self, *args: Any, unpack_pages: Callable[[Tensor, Tensor, Tensor], None] = ref.unpack_pages):
        self._unpack_pages = unpack_pages
        super().__init__(*args)

    def handle(self, item: Any) -> None:
        match item:
            case Join(_, Open() as opening):
                self.pipe.send(opening)
            case Cancel(uid) if self.is_open(uid):
                self.pipe.send(item)
            case Sending(uids, pages):
                self._receive(uids, pages)
            case Last(uid):
                self._await(uid)
                came = time.perf_counter()
                self.after(lambda: self._done(item, came))
            case Closed(uid, error):
                self._await(uid)
                self.after(lambda: self.end(RoomEnded(uid, error)))

    def _receive(self, uids: list[int], pages: list[int]) -> None:
        for uid in uids:
            self._await(uid)
        self._credits.take(self.look)
        layers, _, *page = self.pool.shape
        packed, ids = self.pool.new_empty(layers, len(pages), *page), self.page_ids(pages)  # there before the bytes are
        self.after(lambda: self._unpack(packed, ids), self.transport.recv(packed))

    def _unpack(self, packed: Tensor, ids: Tensor) -> None:
        with self._writing:
            if self._down is None:  # else the room has ended, and the pages may be somebody else's
                self._unpack_pages(packed, self.pool, ids)
                if packed.is_cuda:
                    torch.cuda.current_stream().synchronize()  # the room's end must not overtake the copy

    def _done(self, last: Last, came: float) -> None:
        now = time.perf_counter()
        transfer = last.waited + now - came
        self.end(RoomEnded(last.uid, None, last.token, last.logprobs, False, last.prefill, transfer, now))

    def _await(self, uid: int) -> None:
        """Until this rank's own loop has joined the room: another rank of the replica may have opened it earlier."""
        with self._changed:
            joined = self._changed.wait_for(
                lambda: self.is_open(uid) or self._down is not None, timeout=TIMEOUT.total_seconds()
            )
        if not joined:
            raise TimeoutError(f"this rank never joined room {uid}")
