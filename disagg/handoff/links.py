"""A rank's links, by peer and generation."""

import queue
import time
from collections.abc import Callable, Iterable
from typing import Any

from disagg.control.messages import Member
from disagg.handoff.credits import Credits
from disagg.handoff.link import Link


class Links:
    """A rank's links, by peer and generation: after one went down, the next to that peer is a new one."""

    def __init__(self, make: Callable[[Member, int], Link]):
        self._make, self.credits = make, Credits()
        self.events: queue.SimpleQueue = queue.SimpleQueue()  # from the links' threads
        self._links: dict[tuple[str, int], Link] = {}
        self._dropped: dict[tuple[str, int], Link] = {}
        self.gone: set[str] = set()  # peers that have died

    def get(self, peer: Member, generation: int) -> Link:
        """One that was dropped stays so: its rooms end at once. Nor is one to a peer that has died waited for."""
        key = peer.id, generation
        if key in self._dropped:
            return self._dropped[key]
        if key not in self._links:
            self._drop(other for other in self._links if other[0] == peer.id and other[1] < generation)
            self._links[key] = link = self._make(peer, generation)
            if peer.id in self.gone:
                self._drop([key])
            return link
        return self._links[key]

    def drain(self) -> list[Any]:
        """What the links' threads have told since the last time."""
        told = []
        while not self.events.empty():
            told.append(self.events.get())
        return told

    def lose(self, ids: list[str]) -> None:
        """These peers have died."""
        self.gone |= set(ids)
        self._drop(key for key in self._links if key[0] in self.gone)

    def find(self, ids: list[str]) -> None:
        """These peers, which were lost, answer again. Their links that were dropped stay so; new ones can be made."""
        self.gone -= set(ids)

    @property
    def num_alive(self) -> int:
        return sum(not link.is_down for link in self._links.values())

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._links or key in self._dropped

    def _drop(self, keys: Iterable[tuple[str, int]]) -> None:
        for key in list(keys):
            self._dropped[key] = self._links.pop(key)
            self._dropped[key].stop()

    def stats(self) -> dict[str, float]:
        links = [*self._links.values(), *self._dropped.values()]
        return {
            "transfer_bytes": sum(link.bytes_moved for link in links),
            "transfer_seconds": sum(link.seconds_moving for link in links),
        }

    def close(self) -> None:
        """Stop them all and see their threads end, as far as that is quick."""
        self._drop(self._links)
        deadline = time.monotonic() + 3
        for link in self._dropped.values():
            link.join(max(0, deadline - time.monotonic()))
