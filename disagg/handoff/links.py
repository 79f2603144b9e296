"""A rank's links, by peer and generation."""

import queue
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from disagg.control.messages import Member
from disagg.handoff.credits import Credits
from disagg.handoff.link import Link
from disagg.handoff.protocol import LinkEvent

L = TypeVar("L", bound=Link)


class Links(Generic[L]):
    """A rank's links, by peer and generation: after a link went down, the next to the same peer is a new one."""

    def __init__(self, make: Callable[[Member, int], L]) -> None:
        self._make, self.credits = make, Credits()
        self.events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()  # from the links' threads
        self._links: dict[tuple[str, int], L] = {}
        self._dropped: dict[tuple[str, int], L] = {}
        self.gone: set[str] = set()  # ids of peers that have died

    def get(self, peer: Member, generation: int) -> L:
        """Return the link to this peer and generation, and make it if there is none.

        A dropped link is never replaced: its rooms end at once. So do rooms on a link to a peer that has died. And so
        they do while a read from the peer goes on that an earlier link gave up: this one would get stuck as well.
        """
        key = peer.id, generation
        if key in self._dropped:
            return self._dropped[key]
        if key not in self._links:
            stuck = self._is_stuck(peer)
            self._drop(other for other in self._links if other[0] == peer.id and other[1] < generation)
            self._links[key] = link = self._make(peer, generation)
            if peer.id in self.gone or stuck:
                self._drop([key])
            return link
        return self._links[key]

    def _is_stuck(self, peer: Member) -> bool:
        links = [*self._links.items(), *self._dropped.items()]
        return any(link.is_down and link.in_flight for (id, _), link in links if id == peer.id)

    def drain(self) -> list[LinkEvent]:
        """Return the events from the links' threads since the last call."""
        events = []
        while not self.events.empty():
            events.append(self.events.get())
        return events

    def lose(self, ids: list[str]) -> None:
        """Drop all links to these peers, which have died."""
        self.gone |= set(ids)
        self._drop(key for key in self._links if key[0] in self.gone)

    def find(self, ids: list[str]) -> None:
        """Allow new links to these peers, which answer again. Their dropped links stay dropped."""
        self.gone -= set(ids)

    @property
    def num_alive(self) -> int:
        """Links that still have a thread. One that was dropped has one until the wait that it is in has ended."""
        return sum(link.is_alive() for link in (*self._links.values(), *self._dropped.values()))

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._links or key in self._dropped

    def _drop(self, keys: Iterable[tuple[str, int]]) -> None:
        for key in list(keys):
            self._dropped[key] = self._links.pop(key)
            self._dropped[key].stop()

    def stats(self) -> dict[str, float]:
        links = [*self._links.values(), *self._dropped.values()]
        return {
            "transfers": sum(link.transfers for link in links),
            "transfers_in_flight": sum(link.in_flight for link in links),
            "transfer_bytes": sum(link.bytes_moved for link in links),
            "transfer_mismatches": sum(link.mismatches for link in links),
            "transfer_seconds": sum(link.seconds_moving for link in links),
        }

    def close(self) -> None:
        """Stop all links, and wait at most 3 s for their threads to end."""
        self._drop(self._links)
        deadline = time.monotonic() + 3
        for link in self._dropped.values():
            link.join(max(0, deadline - time.monotonic()))
