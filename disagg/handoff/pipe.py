"""Pipe: one end of the private message channel between a link's two ends.

The prefill end listens and the decode end connects, under a name that both know. Messages are numbered. A gap, or
anything that is not a message, ends the link, because a message about pages must never be lost or misread. A stranger
at the port is ignored, and its connecting and disconnecting ends nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType

import zmq

from disagg.control.address import bind, connect_to
from disagg.control.messages import Decoder, encode
from disagg.control.ports import MOST_POLLED, new_socket, unwatch, watch
from disagg.control.refusals import FAILED, Refusals
from disagg.control.secret import Secret
from disagg.handoff.protocol import Message

DOUBT_S = 1.0  # after a peer has disconnected: ZeroMQ may take a moment to tell which one
DOUBT_MS = 20  # between two checks meanwhile
NOBODY = zmq.EVENT_CONNECT_RETRIED  # where the other end listened before it told its port
PROBE = b""  # an empty message: sending it shows whether the other end is connected


class Pipe:
    """Made by `listen` or `connect`, and used by one thread only."""

    def __init__(self, sock: zmq.Socket, kind: type | UnionType, name: str, refusals: Refusals, port: int = 0) -> None:
        self.sock, self.port = sock, port
        self._decode, self._refusals = Decoder[Message](kind), refusals
        self._to = [name.encode()] if sock.type == zmq.ROUTER else []  # the frames before a message
        self.monitor = watch(sock, FAILED | zmq.EVENT_DISCONNECTED | (0 if self._to else NOBODY))
        self._said = self._heard = 0
        self.has_come = False  # has anything of the other end arrived?
        self._doubt_until = 0.0

    @classmethod
    def listen(
        cls,
        host: str,
        name: str,
        kind: type | UnionType,
        secret: Secret | None = None,
        refusals: Refusals | None = None,
    ) -> "Pipe":
        """Listen on any free port for the peer called `name`, which sends messages of the types `kind`.

        `secret`: what it must have. `refusals`: where strangers are counted.
        """
        sock = new_socket(zmq.ROUTER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        with closed_on_error(cls(sock, kind, name, refusals or Refusals("a link"))) as pipe:
            pipe.port = bind(sock, host, 0, secret)
        return pipe

    @classmethod
    def connect(cls, host: str, port: int, name: str, kind: type | UnionType, secret: Secret | None = None) -> "Pipe":
        """Connect as the peer called `name`. The end that listens sends messages of the types `kind`."""
        sock = new_socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, name.encode())
        with closed_on_error(cls(sock, kind, name, Refusals("a link"), port)) as pipe:
            connect_to(sock, host, port, secret)
            pipe._send(PROBE)  # the other end waits for a first message
        return pipe

    def send(self, message: Message) -> None:
        """Raises ConnectionError if the other end has gone. (A blocking send would wait for its return.)"""
        self._said += 1
        self._send(self._said.to_bytes(8, "little"), encode(message))

    def _send(self, *frames: bytes) -> None:
        try:
            self.sock.send_multipart([*self._to, *frames], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise ConnectionError("the other end has gone") from None
            raise

    def poll(self, timeout_ms: int = 0) -> list[Message]:
        """Return the received messages, after waiting up to `timeout_ms` for the first.

        Raises ConnectionError if a message is missing or invalid.
        """
        messages = []
        while len(messages) < MOST_POLLED and self.sock.poll(0 if messages else timeout_ms):
            frames = self.sock.recv_multipart()
            if frames[: len(self._to)] != self._to:
                self._refusals.add("a message", "it is not the peer's")
                continue
            self.has_come = True
            if frames[len(self._to) :] != [PROBE]:
                messages.append(self._next(frames[len(self._to) :]))
        return messages

    def _next(self, frames: list[bytes]) -> Message:
        self._heard += 1
        if len(frames) != 2 or int.from_bytes(frames[0], "little") != self._heard:
            raise ConnectionError(f"message {self._heard} of the other end is missing")
        try:
            return self._decode(frames[1])
        except ValueError as error:
            raise ConnectionError(f"message {self._heard} of the other end: {error!s:.200}") from None

    @property
    def is_met(self) -> bool:
        """Is the other end connected? For the end that listens."""
        try:
            self._send(PROBE)
        except ConnectionError:
            return False
        return True

    @property
    def has_gone(self) -> bool:
        """Has the other end left? Check it whenever `monitor` is readable, and every `patience_ms`."""
        left = self._refusals.add_failed(self.monitor)
        if not self._to:
            return left
        if left:
            self._doubt_until = time.monotonic() + DOUBT_S
        return self.patience_ms is not None and not self.is_met

    @property
    def patience_ms(self) -> int | None:
        """Milliseconds until the next check of `has_gone`. None: no check is due until `monitor` is readable."""
        return DOUBT_MS if time.monotonic() < self._doubt_until else None

    def close(self) -> None:
        unwatch(self.sock, self.monitor)
        self.sock.close()


@contextmanager
def closed_on_error(pipe: Pipe) -> Iterator[Pipe]:
    """Close the pipe if the body raises.

    Left to the garbage collector, its monitor may be closed while the socket lives. At the socket's next event ZeroMQ's
    I/O thread waits for a reader for ever, and all other connections with it: the router hears no beats any more.
    """
    try:
        yield pipe
    except BaseException:
        pipe.close()
        raise
