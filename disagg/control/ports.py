"""Ports: the router's and a replica's ends of their conversation, over ZeroMQ. `session.py` says what survives.

A message is two frames, the header of its session and its body. What is neither is dropped with a line.
"""

import secrets
import sys
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from disagg.control.address import bind, connect_to
from disagg.control.messages import Beat, Decoder, Forget, Hello, Ping, ToRouter, ToWorker, Welcome, encode
from disagg.control.session import Header, Session

HEARTBEAT_MS = 2_000  # ZeroMQ's own, answered by its I/O thread however long a step takes
DEAD_AFTER_MS = 10_000
LINGER_MS = 2_000
MOST_SOCKETS = 4_096  # of a process; ZeroMQ's own limit is 1,023, which 200 links would reach
MOST_BYTES = 16 * 2**20  # of a message; ZeroMQ ends a connection that announces more
MOST_POLLED = 256  # messages that one poll returns, unless they have
POLLED_BYTES = 4 * 2**20  # so many bytes

_to_worker, _to_router, _header = Decoder(ToWorker), Decoder(ToRouter), Decoder(Header)


def new_socket(kind: int, context: zmq.Context | None = None) -> zmq.Socket:
    context = context or zmq.Context.instance()
    context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)  # counts before a context's first socket
    sock = context.socket(kind)
    sock.setsockopt(zmq.LINGER, LINGER_MS)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)  # libzmq 4.3.5 aborts the process if a peer reconnects while its queue is full
    sock.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
    return sock


class RouterPort:
    """The router's end: talks to workers by their id, with each in a session that the router opens."""

    def __init__(self, host: str, port: int):
        self._context = zmq.Context()  # of its own, so that `close` can see its last messages off
        self._sock = new_socket(zmq.ROUTER, self._context)
        self._sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a process that is gone is an error
        self._sock.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who reconnects is heard, though the old connection still stands
        self.port = bind(self._sock, host, port)
        self._sessions: dict[str, Session] = {}

    def admit(self, worker: str) -> bool:
        """Open a new session with a worker. Whatever it holds of an older one, it drops."""
        self._sessions[worker] = Session(secrets.token_hex(8))
        return self._send(worker, self._sessions[worker].unnumbered, encode(Welcome()))

    def dismiss(self, worker: str) -> None:
        """End the session: nothing that this worker says counts any more, but for a Hello and a Beat."""
        self._sessions.pop(worker, None)

    def send(self, worker: str, message: ToWorker) -> bool:
        """False if that worker is not connected; should it come back in this session, it hears the message then."""
        body = encode(message)
        return self._send(worker, self._sessions[worker].number(body), body)

    def ping(self, worker: str) -> bool:
        """Is that worker connected?"""
        session = self._sessions.get(worker)
        return self._send(worker, session.unnumbered if session else Header(""), encode(Ping()))

    def _send(self, worker: str, header: Header, body: bytes) -> bool:
        try:
            self._sock.send_multipart((worker.encode(), encode(header), body))
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def poll(self, timeout_ms: int) -> list[tuple[str, ToRouter]]:
        """What has come, waiting up to `timeout_ms` for the first message."""
        messages, num_bytes = [], 0
        while len(messages) < MOST_POLLED and num_bytes < POLLED_BYTES:
            if not self._sock.poll(0 if num_bytes else timeout_ms):
                break
            name, *frames = self._sock.recv_multipart()
            num_bytes += 1 + sum(map(len, frames))
            if name.startswith(
                b"\0"
            ):  # no worker's: a connection that ZeroMQ named, or one whose worker has another now
                continue
            try:
                header, body = frames
                worker, header, message = name.decode(), _header(header), _to_router(body)
            except ValueError as error:
                print(f"router: dropped a message that is not a worker's ({error!s:.200})", file=sys.stderr)
                continue
            if self._counts(worker, header, message):
                messages.append((worker, message))
        return messages

    def _counts(self, worker: str, header: Header, message: ToRouter) -> bool:
        """Is it for the router to hear? It may be of another session, or have come before."""
        session = self._sessions.get(worker)
        in_session = session is not None and header.session == session.id
        if isinstance(message, Beat):
            return True
        if not in_session:
            return isinstance(message, Hello)
        is_next = session.hear(header)
        if isinstance(message, Hello):  # it has reconnected
            self._send(worker, session.unnumbered, encode(Welcome()))
            for unheard in session.again():
                self._send(worker, *unheard)
            return False
        return is_next

    def close(self) -> None:
        self._sock.close()
        self._context.term()


class WorkerPort:
    """A replica's end. It connects by itself whenever a router comes up at the address, and says Hello each time."""

    def __init__(self, hello: Hello, host: str, port: int):
        """ValueError if `host` is none."""
        self._context = zmq.Context()  # as the router's
        self._sock = new_socket(zmq.DEALER, self._context)
        self._sock.setsockopt_string(zmq.IDENTITY, hello.members[0].id)
        self._monitor = self._sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        connect_to(self._sock, host, port)
        self._hello, self._session = encode(hello), None
        self._lost_at: float | None = None
        self._poller = zmq.Poller()
        for sock in (self._sock, self._monitor):
            self._poller.register(sock, zmq.POLLIN)

    @property
    def welcomed(self) -> bool:
        """Has a router ever taken this replica in?"""
        return self._session is not None

    @property
    def lost_s(self) -> float:
        """How long the router that had welcomed this replica has been away, in seconds; 0 while it is there."""
        return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

    def send(self, message: ToRouter) -> None:
        """In the session there is. Without one, nobody is there to whom it could matter."""
        if self._session is not None:
            body = encode(message)
            header = self._session.number(body)
            if self._lost_at is None:
                self._send(header, body)

    def _send(self, header: Header, body: bytes) -> None:
        self._sock.send_multipart((encode(header), body))

    def poll(self, timeout_ms: int = 0) -> list[ToWorker | Forget]:
        """What has come, waiting up to `timeout_ms` for the first message."""
        if timeout_ms:
            self.wait(timeout_ms)
        messages: list[ToWorker | Forget] = []
        while len(messages) < MOST_POLLED and self._sock.poll(0):
            try:
                header, body = self._sock.recv_multipart()
                header, message = _header(header), _to_worker(body)
            except ValueError as error:
                print(f"dropped a message that is not the router's ({error!s:.200})", file=sys.stderr)
                continue
            if isinstance(message, Welcome):
                messages += self._welcomed(header)
            elif self._session is not None and header.session == self._session.id and self._session.hear(header):
                messages.append(message)
        self._watch()  # last: what was said before a connection ended is older than its end
        return messages

    def _watch(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_DISCONNECTED:
                if self._session is not None and self._lost_at is None:
                    self._lost_at = time.monotonic()
            else:
                self._send(self._session.unnumbered if self._session else Header(""), self._hello)

    def _welcomed(self, header: Header) -> list[Forget]:
        self._lost_at = None
        if self._session is not None and header.session == self._session.id:
            self._session.hear(header)
            for unheard in self._session.again():
                self._send(*unheard)
            return []
        forget = [Forget()] if self._session is not None else []
        self._session = Session(header.session)
        return forget

    def wait(self, timeout_ms: int) -> None:
        """Until there is something to poll, at most `timeout_ms`."""
        self._poller.poll(timeout_ms)

    def close(self) -> None:
        """Returns when everything that was sent has left, or cannot (2 s)."""
        self._sock.disable_monitor()
        self._monitor.close()
        self._sock.close()
        self._context.term()
