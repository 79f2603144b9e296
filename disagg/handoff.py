"""The KV handoff: rooms (one request's place in it) and links (one prefill rank paired with one decode rank).

    router --Submit--> decode --Open(request, pages)--> prefill        decode allocates BEFORE prefill computes
                       decode <--Sending(pages), bytes-- prefill       for each chunk, while prefill computes the next
                       decode <--Last(first token)------ prefill       the room is done: the request joins the batch

Bytes go over the link's transport, messages over its pipe, in one order. Every send is announced by `Sending`, so
decode never posts a receive that nobody will match. On each link a room ends exactly once, with `Last` or `Closed`
(or with the link itself); only when it has ended on every link may its pages be freed, because until then a transfer
may still write them. An abort therefore only ASKS (`Cancel`) and waits for `Closed`.

With attention TP on either side, decode rank j is linked to prefill rank j % t: KV is the same on all ranks of a
replica, so each decode rank takes a copy from one of them.
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import zmq
from torch import Tensor

from disagg.control import Member, Pipe, bind, new_socket
from disagg.request import Request
from disagg.transport.torch_dist import TIMEOUT, TorchTransport


class RoomState(IntEnum):
    FAILED = 0
    BOOTSTRAPPING = 1  # waiting for pages on the decode side
    WAITING = 2  # both sides know of it
    TRANSFERRING = 3
    DONE = 4


class Room:
    """A state that only rises, or fails; and a count of the link ends that may still touch the pages."""

    def __init__(self, links: int):
        self.state = RoomState.BOOTSTRAPPING
        self.open_links = links
        self.error: str | None = None

    def rise(self, state: RoomState) -> None:
        assert state > RoomState.FAILED, "use fail()"
        if self.state != RoomState.FAILED:
            assert state >= self.state, f"a room only rises: {self.state.name} -> {state.name}"
            self.state = state

    def fail(self, error: str) -> None:
        assert self.state != RoomState.DONE, "a room that is done cannot fail"
        if self.state != RoomState.FAILED:
            self.state, self.error = RoomState.FAILED, error

    def end_link(self, error: str | None) -> None:
        """One link has ended this room. The last one to end it well makes it done."""
        assert self.open_links > 0, "a link ended a room twice"
        self.open_links -= 1
        if error is not None:
            self.fail(error)
        elif self.open_links == 0:
            self.rise(RoomState.DONE)

    @property
    def may_release(self) -> bool:
        return self.open_links == 0


# What passes over a link's pipe.


class Knock(msgspec.Struct, frozen=True, tag=True):
    """decode -> the prefill rank's door: make a link with me."""

    decode: Member


class Open(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill: compute this prompt; its KV goes to these pages, on all these decode ranks."""

    request: Request
    pages: list[int]
    decode: list[Member]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill: send nothing more for this room, and say when that is so."""

    uid: int


class Sending(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: the next bytes on the transport are these pages of yours."""

    uid: int
    pages: list[int]


class Last(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: that was all; this is the first token."""

    uid: int
    token: int
    logprobs: list[tuple[int, float]]


class Closed(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: nothing more will come for this room."""

    uid: int
    error: str


# What the rank's loop tells a link's thread, and what it hears back.


class Join(msgspec.Struct, frozen=True):
    """This rank knows the room now; `opening` is what to tell the peer of it, if it is for this link to tell."""

    uid: int
    opening: Open | None = None


class SendPages(msgspec.Struct, frozen=True):
    """Copy pages of my pool to pages of the peer's. `ready`: the CUDA event after which mine are written."""

    uid: int
    mine: list[int]
    theirs: list[int]
    ready: Any = None


class RoomEnded(msgspec.Struct, frozen=True):
    """This link will not touch the room's pages any more. Exactly once for each joined room on each link."""

    uid: int
    error: str | None = None
    token: int = -1
    logprobs: list[tuple[int, float]] = []


class Link(threading.Thread):
    """One end of a link. Its pipe and transport belong to its thread; the rank's loop calls `put` and `stop` only."""

    def __init__(self, key: str, connect: Callable[[str], tuple[Pipe, TorchTransport]], pool: Tensor, events: Any):
        """`connect(key)` runs in the thread, and may block or raise; `events` is a queue that the loop drains."""
        super().__init__(name=f"link {key}", daemon=True)
        self.key, self.pool = key, pool
        self.bytes_moved, self.seconds_moving = 0, 0.0
        self._connect, self._events = connect, events
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the next two, and the pool against a link that is down
        self._rooms: set[int] = set()  # joined and not yet ended
        self._down: str | None = None  # why
        self._wake, self._woken = new_socket(zmq.PAIR), new_socket(zmq.PAIR)
        address = f"inproc://{uuid.uuid4().hex}"
        self._wake.bind(address)
        self._woken.connect(address)
        self.pipe: Pipe | None = None
        self.transport: TorchTransport | None = None
        self.start()

    def put(self, command: Any) -> None:
        with self._changed:
            if isinstance(command, Join):
                if self._down is not None:
                    self._events.put(RoomEnded(command.uid, self._down))
                else:
                    self._rooms.add(command.uid)
                    self._changed.notify()
            if self._down is None:
                self._commands.put(command)
                self._wake.send(b"")

    def stop(self) -> None:
        """End the link; the peer may be dead. Its rooms end at once, and nothing is written to the pool any more.

        NCCL's transfer in flight ends too; gloo's goes on in the thread until it times out, into a buffer of its own.
        """
        if self._go_down("stopped") and self.transport is not None:
            self.transport.abort()

    def _go_down(self, error: str) -> bool:
        """End all rooms; False if they have been already."""
        with self._changed:
            if self._down is not None:
                return False
            self._down = f"link {self.key}: {error}"
            for uid in self._rooms:
                self._events.put(RoomEnded(uid, self._down))
            self._rooms.clear()
            self._changed.notify()
            self._wake.send(b"")
            return True

    def run(self) -> None:
        try:
            if self.pool.is_cuda:
                torch.cuda.set_device(self.pool.device)
                torch.cuda.set_stream(torch.cuda.Stream())
            self.pipe, self.transport = self._connect(self.key)
            self._loop()
        except Exception as broken:  # whatever broke it, the rooms must hear of it
            self._go_down(f"{type(broken).__name__}: {broken}")
        if self.pipe is not None:
            self.pipe.close()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self.pipe.sock, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while self._down is None:
            poller.poll()
            for message in self.pipe.poll():  # first, so that a Cancel overtakes sends that are still queued
                self.handle(message)
            if self._woken.poll(0):
                self._woken.recv()
                with suppress(queue.Empty):  # the link went down
                    self.handle(self._commands.get_nowait())

    def handle(self, item: Any) -> None:
        """A message from the peer or a command from the loop."""
        raise NotImplementedError

    def is_open(self, uid: int) -> bool:
        return uid in self._rooms

    def end(self, ended: RoomEnded) -> None:
        with self._changed:
            if ended.uid in self._rooms:
                self._rooms.remove(ended.uid)
                self._events.put(ended)


class SendLink(Link):
    """The prefill rank's end."""

    def __init__(self, *args: Any):
        self._cancelled: set[int] = set()  # cancelled before this rank's loop joined the room
        super().__init__(*args)

    def handle(self, item: Any) -> None:
        match item:
            case Open():
                self._events.put(item)
            case Join(uid) if uid in self._cancelled:
                self._cancelled.remove(uid)
                self._close(uid, "cancelled")
            case Cancel(uid) if not self.is_open(uid):
                self._cancelled.add(uid)
            case Cancel(uid):
                self._close(uid, "cancelled")
            case SendPages(uid, mine, theirs, ready) if self.is_open(uid):
                self._send(uid, mine, theirs, ready)
            case Last(uid) if self.is_open(uid):
                self.pipe.send(item)
                self.end(RoomEnded(uid))
            case Closed(uid, error) if self.is_open(uid):
                self._close(uid, error)

    def _send(self, uid: int, mine: list[int], theirs: list[int], ready: Any) -> None:
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
        packed = self.pool[:, mine]  # [layers, pages, 64, C + R], contiguous
        self.pipe.send(Sending(uid, theirs))
        start = time.perf_counter()
        self.transport.send(packed)
        self.seconds_moving += time.perf_counter() - start
        self.bytes_moved += packed.nbytes

    def _close(self, uid: int, error: str) -> None:
        self.pipe.send(Closed(uid, error))
        self.end(RoomEnded(uid, error))


class ReceiveLink(Link):
    """The decode rank's end."""

    def handle(self, item: Any) -> None:
        match item:
            case Join(_, Open() as opening):
                self.pipe.send(opening)
            case Cancel(uid) if self.is_open(uid):
                self.pipe.send(item)
            case Sending(uid, pages):
                self._receive(uid, pages)
            case Last(uid, token, logprobs):
                self._await(uid)
                self.end(RoomEnded(uid, None, token, logprobs))
            case Closed(uid, error):
                self._await(uid)
                self.end(RoomEnded(uid, error))

    def _receive(self, uid: int, pages: list[int]) -> None:
        self._await(uid)
        layers, _, *page = self.pool.shape
        packed = self.pool.new_empty(layers, len(pages), *page)
        start = time.perf_counter()
        self.transport.recv(packed)
        self.seconds_moving += time.perf_counter() - start
        self.bytes_moved += packed.nbytes
        with self._changed:
            if self._down is None:  # else the room has ended, and the pages may be somebody else's
                self.pool[:, pages] = packed
                if packed.is_cuda:
                    torch.cuda.current_stream().synchronize()  # Last must not overtake the copy

    def _await(self, uid: int) -> None:
        """Until this rank's own loop has joined the room: another rank of the replica may have opened it earlier."""
        with self._changed:
            joined = self._changed.wait_for(
                lambda: self.is_open(uid) or self._down is not None, timeout=TIMEOUT.total_seconds()
            )
        if not joined:
            raise TimeoutError(f"this rank never joined room {uid}")


def listen(store: dist.Store, host: str, device: torch.device) -> Callable[[str], tuple[Pipe, TorchTransport]]:
    """The prefill end's `connect`: put up a pipe and tell its port through the store that this rank hosts."""

    def connect(key: str) -> tuple[Pipe, TorchTransport]:
        sock = new_socket(zmq.DEALER)
        store.set(f"{key}/pipe", str(bind(sock, host)))
        transport = TorchTransport(dist.PrefixStore(key, store), 0, device)
        if not sock.poll(TIMEOUT.total_seconds() * 1000, zmq.POLLOUT):  # this end may be the first to speak
            raise TimeoutError("nobody came to the pipe")
        return Pipe(sock, Open | Cancel), transport

    return connect


def dial(prefill: Member, me: Member, device: torch.device) -> Callable[[str], tuple[Pipe, TorchTransport]]:
    """The decode end's `connect`: knock at the prefill rank's door, then meet it in its store."""

    def connect(key: str) -> tuple[Pipe, TorchTransport]:
        door = Pipe(new_socket(zmq.PUSH), Knock)
        door.sock.connect(f"tcp://{prefill.host}:{prefill.door}")
        door.send(Knock(me))
        door.close()
        store = dist.TCPStore(prefill.host, prefill.store, is_master=False, timeout=TIMEOUT)
        sock = new_socket(zmq.DEALER)
        sock.connect(f"tcp://{prefill.host}:{store.get(f'{key}/pipe').decode()}")
        return Pipe(sock, Sending | Last | Closed), TorchTransport(dist.PrefixStore(key, store), 1, device)

    return connect


def link_key(prefill: Member, decode: Member) -> str:
    return f"{prefill.id}/{decode.id}"
