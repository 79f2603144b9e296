"""Pulse: how the router learns that a rank is frozen, or stuck in a step.

Each rank has a beacon: a thread that tells the router every second which turn the rank's loop is in. A stopped process
sends nothing. A rank that hangs, or waits for one that hangs, stays in its turn.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import zmq

from disagg.control.address import connect_again, connect_to
from disagg.control.messages import Beat, Load, Member, encode
from disagg.control.ports import new_socket, unwatch, watch
from disagg.control.refusals import FAILED
from disagg.control.secret import Secret
from disagg.control.session import Header

BEAT_S = 1.0


class Beacon(threading.Thread):
    """Sends a Beat every second.

    The loop counts up `turn`, and sets `waits` while it is in a collective. On a replica's first rank it sets `load`.
    """

    def __init__(self, id: str, host: str, port: int, secret: Secret | None = None) -> None:
        """`secret`: the router's. Raises ValueError if `host` cannot be resolved."""
        super().__init__(name="beacon", daemon=True)
        self.turn, self.waits = 0, False
        self.load: Load | None = None
        self._id, self._ended = id, threading.Event()
        self._sock = new_socket(zmq.DEALER)
        self._sock.setsockopt_string(zmq.IDENTITY, f"beacon of {id}")
        self._sock.setsockopt(zmq.LINGER, 0)
        self._sock.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing while no router is connected
        self._monitor, self._router = watch(self._sock, FAILED), (host, port)
        connect_to(self._sock, host, port, secret)
        self.start()

    def run(self) -> None:
        while not self._ended.wait(BEAT_S):
            if self._monitor.poll(0):
                self._monitor.recv_multipart()
                connect_again(self._sock, *self._router)
            beat = Beat(self._id, self.turn, self.waits, self.load)
            try:
                self._sock.send_multipart((encode(Header("")), encode(beat)), zmq.DONTWAIT)
            except zmq.Again:
                continue
        unwatch(self._sock, self._monitor)
        self._sock.close()

    def close(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Pulse:
    """The latest beat of one rank. Times are time.monotonic()."""

    heard_at: float
    turned_at: float
    turn: int = -1
    waits: bool = False


class Pulses:
    """The pulses of the watched ranks, by member id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Pulse] = {}

    def watch(self, members: Iterable[Member]) -> None:
        """Watch these ranks, as if each had just begun a new turn."""
        now = time.monotonic()
        for member in members:
            old = self._by_id.get(member.id, Pulse(now, now))
            self._by_id[member.id] = Pulse(now, now, old.turn, old.waits)

    def unwatch(self, members: Iterable[Member]) -> None:
        for member in members:
            self._by_id.pop(member.id, None)

    def beat(self, beat: Beat) -> None:
        """Record a beat. Ignores ranks that are not watched."""
        pulse = self._by_id.get(beat.id)
        if pulse is not None:
            pulse.heard_at = now = time.monotonic()
            if beat.turn != pulse.turn:
                pulse.turned_at, pulse.turn = now, beat.turn
            pulse.waits = beat.waits

    def turn(self, member: Member) -> int:
        return self._by_id[member.id].turn

    def forgive(self) -> None:
        """Restart all clocks, because the router itself was stopped."""
        now = time.monotonic()
        for pulse in self._by_id.values():
            pulse.heard_at = pulse.turned_at = now

    def silent(self, members: Iterable[Member], limit_s: float) -> list[Member]:
        """Return the members without a beat for `limit_s`."""
        now = time.monotonic()
        return [member for member in members if now - self._by_id[member.id].heard_at > limit_s]

    def stuck(self, members: Iterable[Member], limit_s: float) -> list[Member]:
        """Return the members that have been in one turn for `limit_s`.

        If possible, return only the culprits: members that do not wait in a collective.
        """
        now = time.monotonic()
        late = [member for member in members if now - self._by_id[member.id].turned_at > limit_s]
        return [member for member in late if not self._by_id[member.id].waits] or late
