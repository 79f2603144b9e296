"""Refusals: what ports have refused to hear, counted, and said in few lines however much comes."""

import sys
import threading
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

SAY_S = 60.0  # between two lines of a port about the same
FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Refusals:
    """The refusals of one port, or of several ports of one kind. Any thread may use it."""

    def __init__(self, port: str) -> None:
        """`port`: who speaks, at the beginning of each line."""
        self.count = 0
        self._port, self._lock = port, threading.Lock()
        self._unsaid: dict[str, int] = {}  # by what was refused
        self._next: dict[str, float] = {}

    def add(self, what: str, why: str) -> None:
        """Count a refusal. `what` is one of few names: each has its own line, at most one every SAY_S."""
        now = time.monotonic()
        with self._lock:
            self.count += 1
            if now < self._next.get(what, 0.0):
                self._unsaid[what] = self._unsaid.get(what, 0) + 1
                return
            self._next[what], unsaid = now + SAY_S, self._unsaid.pop(what, 0)
        more = f"; {unsaid:,} before it" if unsaid else ""
        shown = "".join(c if c.isprintable() else "?" for c in why[:300])  # a stranger may have written parts of it
        print(f"{self._port}: {what} was refused: {shown}{more}", file=sys.stderr, flush=True)

    def add_failed(self, monitor: zmq.Socket) -> bool:
        """Count the connections that failed to prove what they are, out of a monitor's events.

        Returns whether there was any other event.
        """
        other = False
        while monitor.poll(0):
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            if event & FAILED:
                self.add("a connection", "it is no job of this deployment, or has another secret")
            else:
                other = True
        return other
