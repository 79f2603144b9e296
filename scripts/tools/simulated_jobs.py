"""Simulated jobs of prefill and decode replicas, to which a routing gives requests (`routing_sim.py`). SIMULATED.

The engine's own scheduler, prefix cache and page allocator work off the requests, in simulated time.
"""

import argparse
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from disagg.catalogue import Catalogue
from disagg.control.messages import Hello, Load, Member, RoleName
from disagg.control.pulse import BEAT_S
from disagg.front.replica import Replica
from disagg.front.routing import Routing
from disagg.page_cache import PageCache
from disagg.request import Request
from disagg.role import tokens_left
from disagg.scheduler import Scheduler
from disagg.scheduler import Sequence as Running
from model.pages import PAGE, PageAllocator, pages_for

# SGLang's report of 2025-05-05: 52.3k prompt tokens per second on a node of 8 H100 are 153 us per token and rank. It
# has 22.3k output tokens per second on a node, with 256 sequences per rank: 92 ms per step. Smaller batches are faster.
TOKEN_S, STEP_S, DECODE_S = 153e-6, 0.03, 0.05
SAMPLE_S = 0.1
WARM_UP = 0.2  # the first part of the run, which does not count


@dataclass(frozen=True)
class Arrival:
    at: float
    request: Request
    conversation: int
    session_id: str | None


@dataclass
class Prefill:
    """A prefill replica: the router's view of it, and the scheduler that works off its prompts."""

    replica: Replica
    scheduler: Scheduler
    outgoing: dict[int, Running] = field(default_factory=dict)  # by uid: without a first token
    in_step: int = 0  # tokens of the running step

    @property
    def tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        return self.scheduler.queued_tokens + self.in_step


@dataclass
class Decode:
    """A decode replica: the router's view of it, and its pages."""

    replica: Replica
    allocator: PageAllocator
    queue: deque[tuple[Request, Prefill]] = field(default_factory=deque)  # waiting for pages
    pages: dict[int, list[int]] = field(default_factory=dict)  # by uid

    @property
    def used_pages(self) -> int:
        return self.allocator.capacity - self.allocator.num_free


@dataclass(frozen=True)
class Outcome:
    """Means over the samples, or over the requests."""

    queued: float  # prefill tokens: the fullest replica's over the mean of all
    kv: float  # the same for KV in use
    most_queued: float  # tokens, on the fullest prefill replica
    most_kv: float  # share of the KV in use, on the fullest decode replica
    ttft_s: float
    queued_floor: float  # the least that `queued` could be with these prompts: each is on one replica
    kv_floor: float
    per_decode: float  # requests with pages, per decode replica
    same_prefill: float  # share of the requests that went to the prefill replica of their conversation's latest one
    same_decode: float  # and to its decode replica


class Simulation:
    """Runs events in simulated time."""

    def __init__(self, args: argparse.Namespace, routing: Routing) -> None:
        self.routing, self.now = routing, 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: deque[Arrival] = deque()
        self._stepping = False
        self._ended = self._same_prefill = self._same_decode = 0
        self._latest: dict[int, tuple[str, str]] = {}  # by conversation: the replicas of its latest request
        self._arrived: dict[int, float] = {}
        self._ttfts: list[float] = []
        self._queued: list[list[int]] = []  # samples over time: tokens per prefill replica,
        self._used: list[list[float]] = []  # and share of the KV per decode replica
        self._largest: list[tuple[int, float]] = []  # the largest prompt's tokens left, and the largest request's share
        self._running: list[int] = []  # requests with pages
        kv_tokens = args.kv_tokens // PAGE * PAGE

        def replica(role: RoleName, i: int) -> Replica:
            name = f"{role}{i}"
            sizes = args.max_batch, args.step_tokens, kv_tokens
            return Replica(name, Hello(role, [Member(name, "")], *sizes, {}, role, caches=role == "prefill"))

        def scheduler() -> Scheduler:
            pages = PageCache(kv_tokens // PAGE + 1)
            pages.catalogue = Catalogue()
            return Scheduler(pages, min(args.max_batch, args.step_tokens), args.step_tokens, 2 * args.limit)

        self.prefills = [Prefill(replica("prefill", i), scheduler()) for i in range(args.prefills)]
        self.decodes = [Decode(replica("decode", i), PageAllocator(kv_tokens // PAGE + 1)) for i in range(args.decodes)]
        self._prefill_of = {one.replica.id: one for one in self.prefills}
        self._decode_of = {one.replica.id: one for one in self.decodes}

    def run(self, arrivals: list[Arrival]) -> Outcome:
        for arrival in arrivals:
            self._at(arrival.at, lambda arrival=arrival: self._arrive(arrival))
        self._at(BEAT_S, self._beat)
        begin, end = WARM_UP * arrivals[-1].at, arrivals[-1].at
        for i in range(1 + int((end - begin) / SAMPLE_S)):
            self._at(begin + i * SAMPLE_S, self._sample)
        while self._ended < len(arrivals):
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self._outcome()

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    # ---- the router

    def _arrive(self, arrival: Arrival) -> None:
        self._arrived[arrival.request.uid] = self.now
        self._waiting.append(arrival)
        self._assign()

    def _assign(self) -> None:
        """Hand out waiting requests in order, as the router does."""
        while self._waiting:
            request, session_id = self._waiting[0].request, self._waiting[0].session_id
            replicas = [one.replica for one in self.decodes], [one.replica for one in self.prefills]
            choice = self.routing.choose(request, session_id, *replicas)
            if choice is None:
                return
            names, conversation = (choice.decode.id, choice.prefill.id), self._waiting.popleft().conversation
            before = self._latest.get(conversation, ("", ""))
            self._same_decode += names[0] == before[0]
            self._same_prefill += names[1] == before[1]
            self._latest[conversation] = names
            decode, prefill = self._decode_of[names[0]], self._prefill_of[names[1]]
            choice.book(request)
            decode.queue.append((request, prefill))
            self._open(decode)

    # ---- the replicas

    def _open(self, decode: Decode) -> None:
        """Give pages to the requests of a decode replica, in order, and have their prompts computed."""
        while decode.queue:
            request, prefill = decode.queue[0]
            pages = decode.allocator.alloc(pages_for(request.most_tokens))
            if pages is None:
                return
            decode.queue.popleft()
            decode.pages[request.uid] = pages
            sequence = prefill.outgoing[request.uid] = Running(request)
            prefill.scheduler.add(sequence)
            self._at(self.now, self._step)

    def _step(self) -> None:
        """Launch a step of the prefill job, unless one is running."""
        if self._stepping:
            return
        plans = [one.scheduler.schedule(reserve_output=False) for one in self.prefills]
        longest = max(plan.num_prefill_tokens for plan in plans)
        if not longest:
            return
        self._stepping, computed = True, []
        for one, plan in zip(self.prefills, plans, strict=True):
            one.in_step = plan.num_prefill_tokens
            for sequence in plan.advance():
                one.scheduler.remove(sequence)
                computed.append((one, sequence))
        self._at(self.now + STEP_S + TOKEN_S * longest, lambda: self._end_step(computed))

    def _end_step(self, computed: list[tuple[Prefill, Running]]) -> None:
        self._stepping = False
        for one in self.prefills:
            one.in_step = 0
        for prefill, sequence in computed:
            uid = sequence.uid
            prefill.scheduler.release(sequence)
            del prefill.outgoing[uid]
            prefill.replica.end_prompt(uid)
            self._ttfts.append(self.now - self._arrived[uid])
            decode = next(one for one in self.decodes if uid in one.pages)
            generated = sequence.request.max_tokens - 1
            self._at(self.now + generated * DECODE_S, lambda uid=uid, decode=decode: self._finish(decode, uid))
        self._step()
        self._assign()

    def _finish(self, decode: Decode, uid: int) -> None:
        decode.allocator.free(decode.pages.pop(uid))
        decode.replica.end_request(uid)
        self._ended += 1
        self._open(decode)
        self._assign()

    def _beat(self) -> None:
        for one in self.prefills:
            left = tokens_left(one.outgoing.values())
            waiting, running = len(one.scheduler.waiting), len(one.scheduler.running)
            one.replica.hear(Load(one.scheduler.queued_tokens, 0, running, waiting, left))
            assert one.scheduler.cache.catalogue is not None
            for kept in one.scheduler.cache.catalogue.news():
                one.replica.kept.hear(kept)
        self._at(self.now + BEAT_S, self._beat)

    # ---- what is seen

    def _sample(self) -> None:
        self._queued.append([one.tokens for one in self.prefills])
        self._used.append([one.used_pages / one.allocator.capacity for one in self.decodes])
        prompts = [sequence for one in self.prefills for sequence in one.outgoing.values()]
        left = max((len(one.request.prompt) - one.computed for one in prompts), default=0)
        shares = [len(pages) / one.allocator.capacity for one in self.decodes for pages in one.pages.values()]
        self._largest.append((left, max(shares, default=0.0)))
        self._running.append(len(shares))

    def _outcome(self) -> Outcome:
        count, requests = len(self._queued), len(self._ttfts)
        most_queued, most_kv = (sum(map(max, loads)) / count for loads in (self._queued, self._used))
        queued, kv = (sum(map(fmean, loads)) / count for loads in (self._queued, self._used))
        floors = [
            sum(max(fmean(one), largest[i]) for one, largest in zip(loads, self._largest, strict=True)) / count
            for i, loads in enumerate((self._queued, self._used))
        ]
        return Outcome(
            queued=most_queued / queued,
            kv=most_kv / kv,
            queued_floor=floors[0] / queued,
            kv_floor=floors[1] / kv,
            per_decode=fmean(self._running) / len(self.decodes),
            most_queued=most_queued,
            most_kv=most_kv,
            ttft_s=fmean(self._ttfts),
            same_prefill=self._same_prefill / requests,
            same_decode=self._same_decode / requests,
        )
