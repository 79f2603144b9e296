"""Small typed messages between processes: ZeroMQ carries them, msgspec encodes and checks them.

router  <-- Port (ROUTER) ... DEALER -->  the first rank of each attention replica
prefill rank <-- its door (PULL), a Link's own pipe (see handoff.py) --> decode rank
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec
import zmq

from disagg.address import bind, connect_to
from disagg.request import Request

HEARTBEAT_MS = 2_000  # ZeroMQ's own, answered by its I/O thread however long a step takes
DEAD_AFTER_MS = 10_000


class Member(msgspec.Struct, frozen=True):
    """How to reach one rank. A fresh `id` for each process: a restarted one is somebody else."""

    id: str
    host: str
    door: int = 0  # port of a prefill rank's door
    store: int = 0  # port of the TCPStore where its links meet


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router: I am here. `members` are its ranks, the sender first; `job` is the same for all replicas
    of a job, which cannot outlive one another."""

    role: Literal["unified", "prefill", "decode"]
    members: Annotated[list[Member], msgspec.Meta(min_length=1)]
    max_batch: Annotated[int, msgspec.Meta(ge=1)]
    kv_tokens: Annotated[int, msgspec.Meta(ge=1)]
    kv: str  # what is handed over: replicas that differ in it cannot serve together
    job: str


class Submit(msgspec.Struct, frozen=True, tag=True):
    """The router to a decode (or unified) replica: serve this, with the prefill done over there."""

    request: Request
    prefill: list[Member] | None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The router: nobody wants this any more."""

    uid: int


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The router: these processes have died."""

    ids: list[str]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The router: no more requests will come, or you are not wanted; stop."""

    error: str | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The router: nothing, but sending it finds out whether you are still connected."""


class Parts(msgspec.Struct, frozen=True):
    """Where the time to a handed-over request's first token went, in seconds."""

    queue: float  # until its first prefill step: for pages, for that step, and on the way there
    prefill: float  # until its first token
    transfer: float  # from there until its KV had arrived: what was not hidden behind the prefill
    join: float  # until the decode side took it up, between two of its steps


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """News of many requests: one more token each, and that is all."""

    by_uid: dict[int, int]


class Update(msgspec.Struct, frozen=True, tag=True):
    """News of one request."""

    uid: int
    tokens: list[int] = []
    logprobs: list[list[tuple[int, float]]] = []
    finish: str | None = None
    error: str | None = None
    retry: bool = False  # the error struck before any token: another prefill rank may do better
    parts: Parts | None = None  # with the first token, where it was handed over


class Updates(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router: all news of one step in one message."""

    updates: list[Update | Tokens]


def singly(updates: Iterable[Update | Tokens]) -> Iterator[Update]:
    """News of one request at a time, in order."""
    for one in updates:
        if isinstance(one, Tokens):
            yield from (Update(uid, [token]) for uid, token in one.by_uid.items())
        else:
            yield one


class Bye(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router, last of all: what it did."""

    stats: dict[str, float]


ToWorker = Submit | Abort | Gone | Finish | Ping
ToRouter = Hello | Updates | Bye

_encode = msgspec.msgpack.encode
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_to_router = msgspec.msgpack.Decoder(ToRouter)


def new_socket(kind: int, context: zmq.Context | None = None) -> zmq.Socket:
    sock = (context or zmq.Context.instance()).socket(kind)
    sock.setsockopt(zmq.LINGER, 2_000)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
    return sock


class RouterPort:
    """The router's end: talks to workers by their id."""

    def __init__(self, host: str, port: int):
        self._context = zmq.Context()  # of its own, so that `close` can see its last messages off
        self._sock = new_socket(zmq.ROUTER, self._context)
        self._sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a process that is gone is an error
        self.port = bind(self._sock, host, port)

    def send(self, worker: str, message: ToWorker) -> bool:
        """False if that worker is no longer connected."""
        try:
            self._sock.send_multipart((worker.encode(), _encode(message)))
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def poll(self, timeout_ms: int) -> list[tuple[str, ToRouter]]:
        """What has come, waiting up to `timeout_ms` for the first message."""
        messages = []
        while self._sock.poll(0 if messages else timeout_ms):
            try:
                worker, body = self._sock.recv_multipart()
                messages.append((worker.decode(), _to_router.decode(body)))
            except (ValueError, msgspec.MsgspecError) as error:
                print(f"router: dropped a message that is not a worker's ({error})", file=sys.stderr)
        return messages

    def close(self) -> None:
        self._sock.close()
        self._context.term()


class WorkerPort:
    """A replica's end. Connects by itself whenever the router comes up; `gone` once it was there and left."""

    def __init__(self, worker: str, host: str, port: int):
        self._context = zmq.Context()  # as the router's
        self._sock = new_socket(zmq.DEALER, self._context)
        self._sock.setsockopt_string(zmq.IDENTITY, worker)
        self._monitor = self._sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        connect_to(self._sock, host, port)

    def send(self, message: ToRouter) -> None:
        self._sock.send(_encode(message))

    def poll(self, timeout_ms: int = 0) -> list[ToWorker]:
        messages = []
        while self._sock.poll(0 if messages else timeout_ms):
            messages.append(_to_worker.decode(self._sock.recv()))
        return messages

    def wait(self, timeout_ms: int) -> None:
        """Until a message is here to be polled, at most `timeout_ms`."""
        self._sock.poll(timeout_ms)

    @property
    def gone(self) -> bool:
        return bool(self._monitor.poll(0))

    def close(self) -> None:
        """Returns when everything that was sent has left, or cannot (2 s)."""
        self._sock.disable_monitor()
        self._monitor.close()
        self._sock.close()
        self._context.term()


class Pipe:
    """One end of a link's private pipe, or of a door: whatever `kind` of messages, in order.

    watched: `monitor` can be polled for the other end's going. Make it so before the socket connects.
    """

    def __init__(self, sock: zmq.Socket, kind: Any, watched: bool = False):
        self.sock, self._decoder = sock, msgspec.msgpack.Decoder(kind)
        self.monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED) if watched else None

    def send(self, message: Any) -> None:
        """ConnectionError if the other end has gone (a blocking send would wait for its return)."""
        try:
            self.sock.send(_encode(message), zmq.DONTWAIT)
        except zmq.Again:
            raise ConnectionError("the other end has gone") from None

    def poll(self, timeout_ms: int = 0) -> list[Any]:
        """What has come. What is none of ours is dropped: a door is open to strangers."""
        messages = []
        while self.sock.poll(0 if messages else timeout_ms):
            with suppress(msgspec.MsgspecError):
                messages.append(self._decoder.decode(self.sock.recv()))
        return messages

    def close(self) -> None:
        if self.monitor is not None:
            self.sock.disable_monitor()
            self.monitor.close()
        self.sock.close()
