"""The rooms that a decode replica has open, and the pages that one of them promises to others.

Prompts that arrive together often begin alike. The first one's room *promises* its whole pages. A room with the same
beginning *awaits* it: it holds these pages too, and they are sent once. It is over when the rooms that it awaits are.

    room 1   promises | a b c |
    room 2   holds    | a b |, gets | d |      awaits room 1

A room awaits only rooms of the same links. There prefill computes and sends the earlier one first, so that nobody waits
longer than alone, and a link that goes down ends both. A promise is kept when its room is done: then its pages are
published like any others. Otherwise it is taken back. Rooms that await it are cancelled, and their requests return to
the router, which sends them again.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from disagg.control.messages import Member
from disagg.handoff.protocol import Cancel, Room, RoomEnded, RoomState
from disagg.handoff.receive_link import ReceiveLink
from disagg.scheduler import Scheduler, Sequence


@dataclass(eq=False)
class Incoming:
    """A request whose KV has not arrived yet."""

    sequence: Sequence
    prefill: list[Member]
    room: Room
    link: ReceiveLink | None = None  # from the moment it has its pages
    generation: int = 0  # of the link
    first: RoomEnded | None = None  # with the first token
    ended: RoomEnded | None = None  # of the link that ended the room last
    link_down: bool = False
    wanted: bool = True  # False once aborted, or once the router knows that it failed
    cancelled: bool = False
    promised: list[int] = field(default_factory=list)  # pages that others may count on
    awaits: list["Incoming"] = field(default_factory=list)
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def uid(self) -> int:
        return self.sequence.uid

    @property
    def is_good(self) -> bool:
        """Has its KV come, for a request that is wanted?"""
        return self.room.state == RoomState.DONE and self.wanted and not self.cancelled

    @property
    def is_over(self) -> bool:
        return self.room.may_release and not (self.is_good and self.awaits)

    def has_links_of(self, other: "Incoming") -> bool:
        return (self.prefill[0].id, self.generation) == (other.prefill[0].id, other.generation)


class Rooms:
    """Rooms by uid, in the order in which they were opened. A room awaits earlier ones only."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._rooms: dict[int, Incoming] = {}
        self._promises: dict[int, Incoming] = {}  # by page

    def __getitem__(self, uid: int) -> Incoming:
        return self._rooms[uid]

    def __contains__(self, uid: int) -> bool:
        return uid in self._rooms

    def __iter__(self) -> Iterator[Incoming]:
        return iter(self._rooms.values())

    def __len__(self) -> int:
        return len(self._rooms)

    def open(self, one: Incoming) -> bool:
        """Give a request its pages; some of them may be promised. Returns False if there are not enough now."""

        def may_await(page: int) -> bool:
            return self._promises[page].has_links_of(one)

        sequence = one.sequence
        if not self._scheduler.reserve(sequence, sequence.request.most_tokens, may_await):
            return False
        hits = sequence.pages[: sequence.hits]
        one.awaits = list(dict.fromkeys(self._promises[page] for page in hits if page in self._promises))
        one.promised = self._scheduler.promise(sequence)
        self._promises.update(dict.fromkeys(one.promised, one))
        self._rooms[one.uid] = one
        one.room.rise(RoomState.WAITING)
        return True

    def cancel(self, one: Incoming) -> None:
        """Ask for the end of a room. It keeps its pages until it has ended on every link."""
        assert one.link is not None
        if not one.cancelled:
            one.cancelled = True
            one.link.put(Cancel(one.uid))
            self.break_promise(one)

    def break_promise(self, one: Incoming) -> None:
        """Take back what a room promised, and cancel the rooms that await it."""
        others = [other for other in self if one in other.awaits]
        for other in reversed(others):  # first those that await others of them, so that no cancel leads to another one
            other.awaits.remove(one)
            self.cancel(other)
        for page in one.promised:
            del self._promises[page]
        self._scheduler.cache.retract(one.promised)
        one.promised = []

    def close(self, one: Incoming) -> None:
        """Take out a room that is over. If it is good, its promise is kept. Otherwise its pages are let go of."""
        if one.is_good:
            for page in one.promised:
                del self._promises[page]
            self._scheduler.cache.fulfil(one.promised)
            for other in self:
                if one in other.awaits:
                    other.awaits.remove(one)
        else:
            self.break_promise(one)
            one.sequence.computed = 0  # some of its hits may have been promised
            self._scheduler.release(one.sequence)
        del self._rooms[one.uid]
