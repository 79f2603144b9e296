"""What passes over a link in `handoff_ends.py`: prompts' pages from all over one pool to all over another."""

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
from disagg.handoff.transports.torch_dist import TIMEOUT
from disagg.request import Request
from model.kv_cache import pages_for

AHEAD = 16  # prompts under way at once


def content(pool: Tensor) -> Tensor:
    """Numbers that tell layer, page and place, [layers, pages, 64, W] int16; anybody can make them again."""
    layers, pages, *page = pool.shape
    which = torch.arange(layers * pages, device=pool.device).view(layers, pages, 1, 1) * 257
    word = torch.arange(page[0] * page[1], device=pool.device).view(1, 1, *page)
    return torch.stack([(one + word).remainder(2**15).to(torch.int16)[0] for one in which])


def shuffled(num_pages: int) -> list[int]:
    """All of a pool's pages, in an order that anybody can make again."""
    return random.Random(0).sample(range(1, num_pages), num_pages - 1)


def source_pages(pages: list[int], uid: int, count: int) -> list[int]:
    """Where a prompt's pages are at their source: quick to say, for it must not hold up the links' threads."""
    first = uid * 7919 % (len(pages) - count + 1)
    return pages[first : first + count]


class Source(threading.Thread):
    """Answers every room that opens with pages from all over the pool: at once, or, while it is paced, when a prompt
    has been computed."""

    def __init__(self, link: Link, events: queue.SimpleQueue):
        """Fills the link's pool; `events` are the link's."""
        super().__init__(name="source", daemon=True)
        self.link, self.events, self.put_at = link, events, {}
        link.pool.view(torch.int16).copy_(content(link.pool))
        self.pages = shuffled(link.pool.shape[1])
        self.paced, self.computed = False, queue.SimpleQueue()  # an event for each prompt, or None
        self.start()

    def run(self) -> None:
        while True:
            match self.events.get():
                case Open(request, pages):
                    uid = request.uid
                    self.link.put(Join(uid))
                    mine = source_pages(self.pages, uid, len(pages))
                    ready = self.computed.get() if self.paced else None
                    self.put_at[uid] = time.perf_counter()
                    self.link.put(SendPages(uid, mine, pages, ready))
                    self.link.put(SendLast(uid, 0, []))
                case RoomEnded(uid, error) if error is not None:
                    raise RuntimeError(f"room {uid}: {error}")


class Sink:
    """Opens rooms, and notes when each is full."""

    def __init__(self, link: Link, events: queue.SimpleQueue, me: Member):
        self.link, self.events, self.me = link, events, me
        self.uid, self.full_at = 0, {}
        pages = shuffled(link.pool.shape[1])
        each = len(pages) // AHEAD
        self.places = [pages[i * each : (i + 1) * each] for i in range(AHEAD)]

    def take(self, tokens: int, ahead: int, enough: Callable[[int], bool]) -> list[int]:
        """Have prompts of so many tokens sent, `ahead` at once, until `enough(rooms)`. The rooms, in their order."""
        free, place_of, done = list(range(ahead)), {}, []
        while True:
            while free and not enough(len(done) + len(place_of)):
                place = free.pop()
                place_of[self.uid] = place
                request = Request(self.uid, [1])
                opening = Open(request, self.places[place][: pages_for(tokens)], [self.me])
                self.link.put(Join(self.uid, opening))
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
        """The latest prompt's pages, bit by bit."""
        uid, pages = self.latest
        pool = self.link.pool
        theirs = source_pages(shuffled(pool.shape[1]), uid, len(pages))
        ids, source = (torch.tensor(p, device=pool.device) for p in (pages, theirs))
        arrived, sent = pool.view(torch.int16)[:, ids], content(pool)[:, source]
        if not arrived.equal(sent):
            raise RuntimeError(f"room {uid}: other bytes arrived than were sent")
