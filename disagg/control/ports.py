"""Ports: the router's and a replica's ends of their conversation, over ZeroMQ. `session.py` handles lost connections.

A message has two frames: its session's header and its body. Anything else is refused, and counted (`refusals.py`).
"""

import secrets
import time
import uuid

import zmq
from zmq.utils.monitor import parse_monitor_message

from disagg.control.address import bind, connect_again, connect_to
from disagg.control.messages import Beat, Decoder, Forget, Hello, Ping, ToRouter, ToWorker, Welcome, encode
from disagg.control.refusals import FAILED, Refusals
from disagg.control.secret import Secret, stop_guarding
from disagg.control.session import Header, Session

HEARTBEAT_MS = 2_000  # of ZeroMQ; its I/O thread answers, however long a step takes
DEAD_AFTER_MS = 10_000
LINGER_MS = 2_000
FAILURES = 3  # handshakes in a row that broke off: one alone may, because its router has just ended
AGAIN_S = 1.0  # from a handshake that failed to the next one
MOST_SOCKETS = 4_096  # per process; ZeroMQ's default limit is 1,023, which 200 links would reach
MOST_BYTES = 16 * 2**20  # per message; ZeroMQ ends a connection that announces more
MOST_POLLED = 256  # messages that one poll returns; it also stops after
POLLED_BYTES = 4 * 2**20  # bytes
EVENTS = FAILED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

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


def watch(sock: zmq.Socket, events: int) -> zmq.Socket:
    """Return a socket that tells of these events of `sock`. End it with `unwatch`.

    Its queue has no limit, other than that of pyzmq's `get_monitor_socket`. At a limit ZeroMQ's I/O thread waits for a
    reader, and every connection of the context with it. Strangers who come and go could bring that about.
    """
    address = f"inproc://{uuid.uuid4().hex}"
    sock.monitor(address, events)
    monitor = sock.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(address)
    return monitor


def unwatch(sock: zmq.Socket, monitor: zmq.Socket) -> None:
    sock.monitor(None, 0)
    monitor.close()


class RouterPort:
    """The router's end. It addresses workers by their id. The router opens one session with each."""

    def __init__(self, host: str, port: int, secret: Secret | None = None) -> None:
        """`secret`: what workers must have. None: every process that reaches the port is heard."""
        self._context = zmq.Context()  # its own, so that `close` can wait until its last messages have left
        self._sock = new_socket(zmq.ROUTER, self._context)
        self._sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to an absent process is an error
        self._sock.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker may reconnect while its old connection still exists
        self._monitor = watch(self._sock, FAILED)
        self.refusals = Refusals("router")
        self.port = bind(self._sock, host, port, secret)
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
        self.refusals.add_failed(self._monitor)
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
                self.refusals.add("a message that is not a worker's", str(error))
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
        unwatch(self._sock, self._monitor)
        self._sock.close()
        stop_guarding(self._context)
        self._context.term()


class WorkerPort:
    """A replica's end. It connects whenever a router listens at the address, and sends Hello each time."""

    def __init__(self, hello: Hello, host: str, port: int, secret: Secret | None = None) -> None:
        """`secret`: the router's. Raises ValueError if `host` cannot be resolved."""
        self._context = zmq.Context()  # its own, as in RouterPort
        self._sock = new_socket(zmq.DEALER, self._context)
        self._sock.setsockopt_string(zmq.IDENTITY, hello.members[0].id)
        self._monitor = watch(self._sock, EVENTS)
        self._router = host, port
        connect_to(self._sock, host, port, secret)
        self._hello = encode(hello)
        self._session: Session | None = None
        self._lost_at: float | None = None
        self._failures = 0  # handshakes in a row that have failed
        self._again_at = float("inf")
        self.refusals = Refusals("this job")
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

    @property
    def shut_out(self) -> bool:
        """Has the process at the address another secret than this replica, which may have none?"""
        return self._failures >= FAILURES

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
                self.refusals.add("a message that is not the router's", str(error))
                continue
            if isinstance(message, Welcome):
                messages += self._welcomed(header)
            elif self._session is not None and header.session == self._session.id and self._session.hear(header):
                messages.append(message)
        self._watch()  # last, because messages come before the end of the connection that carried them
        return messages

    def _watch(self) -> None:
        if time.monotonic() >= self._again_at:
            self._again_at = float("inf")
            connect_again(self._sock, *self._router)
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_DISCONNECTED:
                if self._session is not None and self._lost_at is None:
                    self._lost_at = time.monotonic()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failures += 1
            elif event & FAILED:
                self._failures, self._again_at = FAILURES, time.monotonic() + AGAIN_S
            else:
                self._failures = 0
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
        unwatch(self._sock, self._monitor)
        self._sock.close()
        self._context.term()
