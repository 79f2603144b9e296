"""The traffic of `ends.py`: prompts whose pages lie scattered over one pool are sent to scattered pages of another."""

import queue
import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from disagg.control.messages import Member
from disagg.handoff.link import Link
from disagg.handoff.protocol import Join, Open, RoomEnded, SendLast, SendPages
from disagg.handoff.transport import TIMEOUT
from disagg.request import Request
from model.pages import pages_for

AHEAD = 16  # prompts in flight at once


def content(pool: Tensor) -> Tensor:
    """Return numbers [layers, pages, 64, W] in int16 that identify layer, page and place. Both ends compute them."""
    layers, pages, *page = pool.shape
    which = torch.arange(layers * pages, device=pool.device).view(layers, pages, 1, 1) * 257
    word = torch.arange(page[0] * page[1], device=pool.device).view(1, 1, *page)
    return torch.stack([(one + word).remainder(2**15).to(torch.int16)[0] for one in which])


def shuffled(num_pages: int) -> list[int]:
    """Return all of a pool's pages in a random order that both ends can compute."""
    return random.Random(0).sample(range(1, num_pages), num_pages - 1)


def source_pages(pages: list[int], uid: int, count: int) -> list[int]:
    """Return a prompt's pages at their source. This must be quick, because it must not delay the links' threads."""
    first = uid * 7919 % (len(pages) - count + 1)
    return pages[first : first + count]


class Source(threading.Thread):
    """Sends scattered pages to every room that opens: at once or, if `paced`, when a prompt has been computed."""

    def __init__(self, link: Link, events: queue.SimpleQueue) -> None:
        """Fill the link's pool. `events`: the link's."""
        super().__init__(name="source", daemon=True)
        self.link, self.events, self.put_at = link, events, {}
        link.pool.view(torch.int16).copy_(content(link.pool))
        self.pages = shuffled(link.pool.shape[1])
        self.paced, self.computed = False, queue.SimpleQueue()  # per prompt a CUDA event, or None
        self.start()

    def run(self) -> None:
        while True:
            match self.events.get():
                case Open(request, pages):
                    uid = request.uid
                    self.link.put(Join(uid))
                    from_pages = source_pages(self.pages, uid, len(pages))
                    ready = self.computed.get() if self.paced else None
                    self.put_at[uid] = time.perf_counter()
                    self.link.put(SendPages(uid, from_pages, pages, ready))
                    self.link.put(SendLast(uid, 0, []))
                case RoomEnded(uid, error) if error is not None:
                    raise RuntimeError(f"room {uid}: {error}")


class Sink:
    """Opens rooms, and notes the time at which each is full."""

    def __init__(self, link: Link, events: queue.SimpleQueue, me: Member) -> None:
        self.link, self.events, self.me = link, events, me
        self.uid, self.full_at = 0, {}
        pages = shuffled(link.pool.shape[1])
        each = len(pages) // AHEAD
        self.places = [pages[i * each : (i + 1) * each] for i in range(AHEAD)]

    def take(self, tokens: int, ahead: int, enough: Callable[[int], bool]) -> list[int]:
        """Have prompts of `tokens` tokens sent, `ahead` at once, until `enough(rooms)`. Return the rooms in order."""
        free, place_of, done = list(range(ahead)), {}, []
        while True:
            while free and not enough(len(done) + len(place_of)):
                place = free.pop()
                place_of[self.uid] = place
                request = Request(self.uid, [1])
                pages = self.places[place][: pages_for(tokens)]
                self.link.put(Join(self.uid, Open(request, pages, [self.me]), pages=pages))
                self.uid += 1
            if not place_of:
                return done
            ended = self.events.get(timeout=TIMEOUT.total_seconds())
            if ended.error is not None:
                raise RuntimeError(f"room {ended.uid}: {ended.error}")
            self.full_at[ended.uid] = ended.at
            done.append(ended.uid)
            place = place_of.pop(ended.uid)
            free.append(place)
            self.latest = ended.uid, self.places[place][: pages_for(tokens)]

    def check(self) -> None:
        """Compare the latest prompt's pages with the sent ones, bit for bit. Raises RuntimeError if they differ."""
        uid, pages = self.latest
        pool = self.link.pool
        theirs = source_pages(shuffled(pool.shape[1]), uid, len(pages))
        ids, source = (torch.tensor(p, device=pool.device) for p in (pages, theirs))
        arrived, sent = pool.view(torch.int16)[:, ids], content(pool)[:, source]
        if not arrived.equal(sent):
            raise RuntimeError(f"room {uid}: other bytes arrived than were sent")
