"""The decode role: unified, except that a prompt's KV arrives from a prefill rank instead of being computed here.

queue --(all its pages)--> room --(KV and first token)--> scheduler --> tokens
"""

import queue
from collections import deque
from dataclasses import dataclass
from typing import Any

from disagg.control import Abort, Gone, Member, Submit, Update
from disagg.engine import Engine
from disagg.handoff import Cancel, Join, Open, ReceiveLink, Room, RoomEnded, RoomState, dial, link_key
from disagg.scheduler import Plan, Sequence
from disagg.unified import Unified


@dataclass(eq=False)
class Arrival:
    """A request on its way here."""

    sequence: Sequence
    prefill: list[Member]
    room: Room
    link: ReceiveLink | None = None  # once it has its pages
    first: tuple[int, list[tuple[int, float]]] | None = None  # token, logprobs
    wanted: bool = True  # False once aborted


class Decode(Unified):
    def __init__(self, engine: Engine, members: list[Member]):
        """`members`: the ranks of this replica, in order."""
        super().__init__(engine)
        self.members = members
        self.rank = engine.mesh.attn.rank
        self.queue: deque[Arrival] = deque()  # no pages yet
        self.arrivals: dict[int, Arrival] = {}  # pages, KV on its way
        self.links: dict[str, ReceiveLink] = {}  # by the prefill rank's id
        self.events: queue.SimpleQueue = queue.SimpleQueue()  # from the links' threads
        self.lost_links: list[ReceiveLink] = []

    def collect(self) -> list[Any]:
        events = []
        while not self.events.empty():
            events.append(self.events.get())
        return events

    def handle(self, event: Any) -> None:
        match event:
            case Submit(request, prefill):
                try:
                    self.scheduler.check_fits(len(request.prompt) + request.max_tokens)
                except ValueError as error:
                    self.updates.append(Update(request.uid, error=str(error)))
                else:
                    self.queue.append(Arrival(Sequence(request), prefill, Room(len(self.members))))
            case RoomEnded(uid):
                self.room_ended(uid, event)
            case Abort(uid) if uid in self.arrivals:
                self.arrivals[uid].wanted = False
                self.arrivals[uid].link.put(Cancel(uid))
            case Abort(uid):
                self.queue = deque(a for a in self.queue if a.sequence.request.uid != uid)
                super().handle(event)
            case Gone(ids):
                for gone in self.links.keys() & set(ids):
                    self.lost_links.append(self.links.pop(gone))
                    self.lost_links[-1].stop()

    def plan(self) -> Plan:
        while self.queue and self.open(self.queue[0]):
            self.queue.popleft()
        return super().plan()

    def open(self, arrival: Arrival) -> bool:
        """Give the request its pages, then ask for its KV; False if the pages have to wait."""
        sequence, request = arrival.sequence, arrival.sequence.request
        if not self.scheduler.reserve(sequence, len(request.prompt) + request.max_tokens):
            return False
        self.arrivals[request.uid] = arrival
        arrival.room.rise(RoomState.WAITING)
        opening = Open(request, sequence.pages, self.members) if self.rank == 0 else None
        arrival.link = self.link(arrival.prefill[self.rank % len(arrival.prefill)])
        arrival.link.put(Join(request.uid, opening))
        return True

    def link(self, prefill: Member) -> ReceiveLink:
        me = self.members[self.rank]
        if prefill.id not in self.links:
            connect = dial(prefill, me, self.engine.pool.device)
            self.links[prefill.id] = ReceiveLink(link_key(prefill, me), connect, self.engine.pool, self.events)
        return self.links[prefill.id]

    def room_ended(self, uid: int, ended: RoomEnded) -> None:
        arrival = self.arrivals[uid]
        arrival.room.end_link(ended.error)
        if ended.error is None:
            arrival.first = (ended.token, ended.logprobs)
        if not arrival.room.may_release:
            return
        del self.arrivals[uid]
        sequence = arrival.sequence
        if arrival.room.state == RoomState.DONE and arrival.wanted:
            sequence.computed = len(sequence.tokens)
            self.sequences[uid] = sequence
            if not self.emit(sequence, *arrival.first):
                self.scheduler.add(sequence)
            return
        self.scheduler.release(sequence)
        if arrival.wanted:
            self.updates.append(Update(uid, error=arrival.room.error, retry=True))

    @property
    def in_flight(self) -> bool:
        return bool(self.arrivals)

    def stats(self) -> dict[str, float]:
        links = [*self.links.values(), *self.lost_links]
        return {
            "transfer_bytes": sum(link.bytes_moved for link in links),
            "transfer_seconds": sum(link.seconds_moving for link in links),
        }

    def close(self) -> None:
        for link in self.links.values():
            link.stop()
        for link in self.links.values():
            link.join(timeout=5)  # a thread inside gloo while the process ends would crash it
