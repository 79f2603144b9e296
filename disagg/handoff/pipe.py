"""Pipe: one end of the private pipe that a link's two ends speak over.

The prefill end listens and the decode end connects, under a name that both know. Messages are numbered: a gap, or
anything that is no message, ends the link, because what it says of pages must be believed or not heard at all. A
stranger at the port is neither heard nor spoken to, and its coming and going ends nothing.
"""

import time
from typing import Any

import zmq

from disagg.control.address import bind, connect_to
from disagg.control.messages import Decoder, encode
from disagg.control.ports import MOST_POLLED, new_socket

DOUBT_S = 1.0  # after somebody has left: ZeroMQ may take a moment to say who
DOUBT_MS = 20  # how often to look meanwhile
PROBE = b""  # says nothing; sending it finds out whether the other end is there


class Pipe:
    """Made by `listen` or `connect`. One thread uses it."""

    def __init__(self, sock: zmq.Socket, events: int, kind: Any, name: str, port: int = 0):
        self.sock, self.port, self._decode = sock, port, Decoder(kind)
        self.monitor = sock.get_monitor_socket(events)
        self._to = [name.encode()] if sock.type == zmq.ROUTER else []  # the frames before a message
        self._said = self._heard = 0
        self._doubt_until = 0.0

    @classmethod
    def listen(cls, host: str, name: str, kind: Any) -> "Pipe":
        """At any free port, for the peer of that name, who says messages of this kind."""
        sock = new_socket(zmq.ROUTER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        pipe = cls(sock, zmq.EVENT_DISCONNECTED, kind, name)
        pipe.port = bind(sock, host)
        return pipe

    @classmethod
    def connect(cls, host: str, port: int, name: str, kind: Any) -> "Pipe":
        sock = new_socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, name.encode())
        pipe = cls(sock, zmq.EVENT_DISCONNECTED, kind, name, port)
        connect_to(sock, host, port)
        pipe._send(PROBE)  # the other end waits for a word
        return pipe

    def send(self, message: Any) -> None:
        """ConnectionError if the other end has gone (a blocking send would wait for its return)."""
        self._said += 1
        self._send(self._said.to_bytes(8, "little"), encode(message))

    def _send(self, *frames: bytes) -> None:
        try:
            self.sock.send_multipart([*self._to, *frames], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise ConnectionError("the other end has gone") from None
            raise

    def poll(self, timeout_ms: int = 0) -> list[Any]:
        """What has come, waiting up to `timeout_ms` for the first. ConnectionError if the peer cannot be followed."""
        messages = []
        while len(messages) < MOST_POLLED and self.sock.poll(0 if messages else timeout_ms):
            frames = self.sock.recv_multipart()
            if frames[: len(self._to)] == self._to and frames[len(self._to) :] != [PROBE]:
                messages.append(self._next(frames[len(self._to) :]))
        return messages

    def _next(self, frames: list[bytes]) -> Any:
        self._heard += 1
        if len(frames) != 2 or int.from_bytes(frames[0], "little") != self._heard:
            raise ConnectionError(f"message {self._heard} of the other end is missing")
        try:
            return self._decode(frames[1])
        except ValueError as error:
            raise ConnectionError(f"message {self._heard} of the other end: {error!s:.200}") from None

    @property
    def is_met(self) -> bool:
        """Is the other end there? For the end that listens."""
        try:
            self._send(PROBE)
        except ConnectionError:
            return False
        return True

    @property
    def has_gone(self) -> bool:
        """Has the other end left? To learn it in time, look when `monitor` can be read, and every `patience_ms`."""
        left = bool(self.monitor.poll(0))
        while self.monitor.poll(0):
            self.monitor.recv_multipart()
        if not self._to:
            return left
        if left:
            self._doubt_until = time.monotonic() + DOUBT_S
        return self.patience_ms is not None and not self.is_met

    @property
    def patience_ms(self) -> int | None:
        """None: for ever."""
        return DOUBT_MS if time.monotonic() < self._doubt_until else None

    def close(self) -> None:
        self.sock.disable_monitor()
        self.monitor.close()
        self.sock.close()
