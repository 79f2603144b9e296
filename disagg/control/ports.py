"""Ports: the router's and a replica's ends of their conversation, over ZeroMQ. `session.py` handles lost connections.

A message has two frames: its session's header and its body. Anything else is dropped, with a line on stderr.
"""

import secrets
import sys
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from disagg.control.address import bind, connect_to
from disagg.control.messages import Beat, Decoder, Forget, Hello, Ping, ToRouter, ToWorker, Welcome, encode
from disagg.control.session import Header, Session

HEARTBEAT_MS = 2_000  # of ZeroMQ; its I/O thread answers, however long a step takes
DEAD_AFTER_MS = 10_000
LINGER_MS = 2_000
MOST_SOCKETS = 4_096  # per process; ZeroMQ's default limit is 1,023, which 200 links would reach
MOST_BYTES = 16 * 2**20  # per message; ZeroMQ ends a connection that announces more
MOST_POLLED = 256  # messages that one poll returns; it also stops after
POLLED_BYTES = 4 * 2**20  # bytes

_to_worker = Decoder[ToWorker](ToWorker)
_to_router = Decoder[ToRouter](ToRouter)
_header = Decoder[Header](Header)


def new_socket(kind: int, context: zmq.Context | None = None) -> zmq.Socket:
    context = context or zmq.Context.instance()
    context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)  # has an effect only before a context's first socket
    sock = context.socket(kind)
    sock.setsockopt(zmq.LINGER, LINGER_MS)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)  # libzmq 4.3.5 aborts the process if a peer reconnects while its queue is full
    sock.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
    return sock


class RouterPort:
    """The router's end. It addresses workers by their id. The router opens one session with each."""

    def __init__(self, host: str, port: int) -> None:
        self._context = zmq.Context()  # its own, so that `close` can wait until its last messages have left
        self._sock = new_socket(zmq.ROUTER, self._context)
        self._sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to an absent process is an error
        self._sock.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker may reconnect while its old connection still exists
        self.port = bind(self._sock, host, port)
        self._sessions: dict[str, Session] = {}

    def admit(self, worker: str) -> bool:
        """Open a new session with a worker, which drops everything that belongs to an older one.

        Returns False if the worker is not connected.
        """
        self._sessions[worker] = Session(secrets.token_hex(8))
        return self._send(worker, self._sessions[worker].unnumbered, encode(Welcome()))

    def dismiss(self, worker: str) -> None:
        """End the session. From now on only a Hello or a Beat of this worker is accepted."""
        self._sessions.pop(worker, None)

    def send(self, worker: str, message: ToWorker) -> bool:
        """Send a message. Returns False if the worker is not connected; if it reconnects, it receives it then."""
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
        """Return the received messages as (worker, message), after waiting up to `timeout_ms` for the first."""
        messages, num_bytes = [], 0
        while len(messages) < MOST_POLLED and num_bytes < POLLED_BYTES:
            if not self._sock.poll(0 if num_bytes else timeout_ms):
                break
            name, *frames = self._sock.recv_multipart()
            num_bytes += 1 + sum(map(len, frames))
            if name.startswith(b"\0"):  # ZeroMQ's own name: not a worker, or one that has reconnected meanwhile
                continue
            try:
                head, body = frames
                worker, header, message = name.decode(), _header(head), _to_router(body)
            except ValueError as error:
                print(f"router: dropped a message that is not a worker's ({error!s:.200})", file=sys.stderr)
                continue
            if self._counts(worker, header, message):
                messages.append((worker, message))
        return messages

    def _counts(self, worker: str, header: Header, message: ToRouter) -> bool:
        """Should the router see this message? It may belong to another session, or be a repetition."""
        session = self._sessions.get(worker)
        if isinstance(message, Beat):
            return True
        if session is None or header.session != session.id:
            return isinstance(message, Hello)
        is_next = session.hear(header)
        if isinstance(message, Hello):  # it has reconnected
            self._send(worker, session.unnumbered, encode(Welcome()))
            for unheard in session.again():
                self._send(worker, *unheard)
            return False
        return is_next

    @property
    def descriptor(self) -> int:
        """A file descriptor for an event loop. It shows changes only, so ask `has_messages` before waiting for it."""
        return self._sock.fileno()

    @property
    def has_messages(self) -> bool:
        return bool(self._sock.poll(0))

    def close(self) -> None:
        self._sock.close()
        self._context.term()


class WorkerPort:
    """A replica's end. It connects whenever a router listens at the address, and sends Hello each time."""

    def __init__(self, hello: Hello, host: str, port: int) -> None:
        """Raises ValueError if `host` cannot be resolved."""
        self._context = zmq.Context()  # its own, as in RouterPort
        self._sock = new_socket(zmq.DEALER, self._context)
        self._sock.setsockopt_string(zmq.IDENTITY, hello.members[0].id)
        self._monitor = self._sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        connect_to(self._sock, host, port)
        self._hello = encode(hello)
        self._session: Session | None = None
        self._lost_at: float | None = None
        self._poller = zmq.Poller()
        for sock in (self._sock, self._monitor):
            self._poller.register(sock, zmq.POLLIN)

    @property
    def welcomed(self) -> bool:
        """Has a router ever admitted this replica?"""
        return self._session is not None

    @property
    def lost_s(self) -> float:
        """Seconds since the connection to the router that admitted this replica broke; 0 while it is connected."""
        return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

    def send(self, message: ToRouter) -> None:
        """Send a message in the current session. Without a session, drop it: no router has given this replica work."""
        if self._session is not None:
            body = encode(message)
            header = self._session.number(body)
            if self._lost_at is None:
                self._send(header, body)

    def _send(self, header: Header, body: bytes) -> None:
        self._sock.send_multipart((encode(header), body))

    def poll(self, timeout_ms: int = 0) -> list[ToWorker | Forget]:
        """Return the received messages, after waiting up to `timeout_ms` for the first."""
        if timeout_ms:
            self.wait(timeout_ms)
        messages: list[ToWorker | Forget] = []
        while len(messages) < MOST_POLLED and self._sock.poll(0):
            try:
                head, body = self._sock.recv_multipart()
                header, message = _header(head), _to_worker(body)
            except ValueError as error:
                print(f"dropped a message that is not the router's ({error!s:.200})", file=sys.stderr)
                continue
            if isinstance(message, Welcome):
                messages += self._welcomed(header)
            elif self._session is not None and header.session == self._session.id and self._session.hear(header):
                messages.append(message)
        self._watch()  # last, because messages come before the end of the connection that carried them
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
        """Wait until there is something to poll, at most `timeout_ms`."""
        self._poller.poll(timeout_ms)

    def close(self) -> None:
        """Close the port. Returns when all sent messages have left, or after LINGER_MS."""
        self._sock.disable_monitor()
        self._monitor.close()
        self._sock.close()
        self._context.term()
