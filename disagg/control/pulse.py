"""Pulse: how the router learns that a rank is frozen, or does not end a step.

Each rank has a beacon, a thread that tells the router every second which turn of its loop the rank has come to. A rank
that is stopped sends nothing. A rank that hangs, or waits for one that does, stays in its turn.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import zmq

from disagg.control.address import connect_to
from disagg.control.messages import Beat, Member, encode
from disagg.control.ports import new_socket
from disagg.control.session import Header

BEAT_S = 1.0


class Beacon(threading.Thread):
    """The loop counts up `turn`, and sets `waits` while it is in a collective."""

    def __init__(self, id: str, host: str, port: int):
        """ValueError if `host` is none."""
        super().__init__(name="beacon", daemon=True)
        self.turn, self.waits = 0, False
        self._id, self._ended = id, threading.Event()
        self._sock = new_socket(zmq.DEALER)
        self._sock.setsockopt_string(zmq.IDENTITY, f"beacon of {id}")
        self._sock.setsockopt(zmq.LINGER, 0)
        self._sock.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a router that is not there
        connect_to(self._sock, host, port)
        self.start()

    def run(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._sock.send_multipart(
                    (encode(Header("")), encode(Beat(self._id, self.turn, self.waits))), zmq.DONTWAIT
                )
            except zmq.Again:
                continue
        self._sock.close()

    def close(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Pulse:
    """The latest of one rank. Times are of time.monotonic."""

    heard_at: float
    turned_at: float
    turn: int = -1
    waits: bool = False


class Pulses:
    """Those of the ranks that are watched, by member id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Pulse] = {}

    def watch(self, members: Iterable[Member]) -> None:
        """From now on, as if each had just come to a new turn."""
        now = time.monotonic()
        for member in members:
            old = self._by_id.get(member.id, Pulse(now, now))
            self._by_id[member.id] = Pulse(now, now, old.turn, old.waits)

    def unwatch(self, members: Iterable[Member]) -> None:
        for member in members:
            self._by_id.pop(member.id, None)

    def beat(self, beat: Beat) -> None:
        """One that is not watched is a stranger."""
        pulse = self._by_id.get(beat.id)
        if pulse is not None:
            pulse.heard_at = now = time.monotonic()
            if beat.turn != pulse.turn:
                pulse.turned_at, pulse.turn = now, beat.turn
            pulse.waits = beat.waits

    def turn(self, member: Member) -> int:
        return self._by_id[member.id].turn

    def forgive(self) -> None:
        """It was the router that was away."""
        now = time.monotonic()
        for pulse in self._by_id.values():
            pulse.heard_at = pulse.turned_at = now

    def silent(self, members: Iterable[Member], limit_s: float) -> list[Member]:
        """Those that have not been heard for so long."""
        now = time.monotonic()
        return [member for member in members if now - self._by_id[member.id].heard_at > limit_s]

    def stuck(self, members: Iterable[Member], limit_s: float) -> list[Member]:
        """Those that have been in one turn for so long; if possible, those that do not wait there for another rank."""
        now = time.monotonic()
        late = [member for member in members if now - self._by_id[member.id].turned_at > limit_s]
        return [member for member in late if not self._by_id[member.id].waits] or late
