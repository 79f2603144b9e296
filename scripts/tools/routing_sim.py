"""Simulate routing: how evenly requests lie over prefill and decode replicas, beside choosing at random. SIMULATED.

python -m scripts.tools.routing_sim                                                # 3/4 of what the prefill can compute
python -m scripts.tools.routing_sim --rate 15                                      # half of it
python -m scripts.tools.routing_sim --rate 8                                       # a quarter
python -m scripts.tools.routing_sim --output 1000 --kv-tokens 1048576 --out a.json # 150 requests per decode replica

The router's own code chooses (`disagg/front/routing.py`), and the engine's own scheduler and page allocator do what it
says. Time is simulated. Prompts and outputs are log-normal, and requests arrive at random times. A prefill step takes
as long as that of its fullest replica, because all replicas of a job step together. A decode step always takes the same
time. Messages take no time, and prefill replicas report their load and their cache every second.

    chance              any replica, at random
    chance, with room   any replica that has room by the router's limits, at random
    routing             the router's choice; no two prompts are alike
    routing, sessions   the same, and the requests belong to conversations: a common prefix, and one session_id

The default lengths are those of Azure's conversations: 179 requests in a row of its public trace of November 2023
(AzureLLMInferenceTrace_conv) have medians of 1,044 and 101 tokens, and sigmas of 1.02 and 0.82.

A load is sampled over time, after a warm-up. "Over mean" is the fullest replica's mean load over that of all replicas.
Many requests per replica are nearly even by chance. "Floor" is what no router can go below: a request is on one
replica, so the fullest one has at least the mean, and at least the largest request in the system. "Same replica again"
counts requests that went where the latest request of their conversation went. Prefill replicas have the prefix cache,
and report what is in it; decode replicas have none.
"""

import argparse
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from disagg.catalogue import Catalogue
from disagg.control.messages import Hello, Load, Member, RoleName
from disagg.control.pulse import BEAT_S
from disagg.front.replica import Replica
from disagg.front.routing import Choice, Routing
from disagg.page_cache import PageCache
from disagg.request import Request
from disagg.role import tokens_left
from disagg.scheduler import Scheduler
from disagg.scheduler import Sequence as Running
from model.pages import PAGE, PageAllocator, pages_for
from scripts.bench.lib.flags import fraction, natural, new_file, positive
from scripts.bench.lib.measurements import Measurement, save

# SGLang's report of 2025-05-05: 52.3k prompt tokens per second on a node of 8 H100 are 153 us per token and rank. It
# has 22.3k output tokens per second on a node, with 256 sequences per rank: 92 ms per step. Smaller batches are faster.
TOKEN_S, STEP_S, DECODE_S = 153e-6, 0.03, 0.05
SAMPLE_S = 0.1
TURNS = 4  # requests per conversation, on average
RANDOM = "replicas chosen at random"
WARM_UP = 0.2  # the first part of the run, which does not count


class Chance(Routing):
    """Chooses at random."""

    def __init__(self, rng: random.Random, with_room: bool = False) -> None:
        """`with_room`: only among the replicas that have room by the router's limits."""
        super().__init__()
        self._rng, self._with_room = rng, with_room

    def choose(
        self, request: Request, session_id: str | None, decodes: Sequence[Replica], prefills: Sequence[Replica]
    ) -> Choice | None:
        if self._with_room:
            return super().choose(request, session_id, decodes, prefills)
        return self._pick(request, session_id, decodes, prefills, set())

    def _pick(
        self,
        request: Request,
        session_id: str | None,
        decodes: Sequence[Replica],
        prefills: Sequence[Replica] | None,
        apart: set[tuple[str, str]],
    ) -> Choice:
        assert prefills is not None
        return Choice(self._rng.choice(decodes), self._rng.choice(prefills), len(request.prompt))


@dataclass(frozen=True)
class Arrival:
    at: float
    request: Request
    conversation: int
    session_id: str | None


def draw_arrivals(args: argparse.Namespace, sessions: bool) -> list[Arrival]:
    """Draw the requests: the same times and lengths for the same seed, with sessions or without."""
    rng, at, made = random.Random(args.seed), 0.0, []
    for uid in range(args.requests):
        at += rng.expovariate(args.rate)
        tokens, output = (
            min(args.limit, max(1, round(median * rng.lognormvariate(0, args.sigma))))
            for median in (args.prompt, args.output)
        )
        conversation = rng.randrange(max(1, args.requests // TURNS))
        prompt = [conversation if sessions else uid] * tokens
        session_id = str(conversation) if sessions else None
        made.append(Arrival(at, Request(uid, prompt, output), conversation, session_id))
    return made


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


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prefills", type=positive, default=8, help="prefill replicas of one rank (8)")
    add("--decodes", type=positive, default=8, help="decode replicas of one rank (8)")
    add("--requests", type=positive, default=4000, help="(4000)")
    add("--rate", type=fraction, default=22, help="requests per second (22)")
    add("--prompt", type=positive, default=1000, help="median prompt tokens (1000)")
    add("--output", type=positive, default=100, help="median generated tokens (100)")
    add("--sigma", type=fraction, default=1.0, help="of the logarithm of both (1)")
    add("--limit", type=positive, default=32768, help="the longest prompt, and the longest output (32768)")
    add("--step-tokens", type=positive, default=4096, help="--max-tokens-per-step (4096)")
    add("--max-batch", type=positive, default=256, help="(256)")
    add("--kv-tokens", type=positive, default=262144, help="per replica (262144)")
    add("--seed", type=natural, default=0, help="(0)")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args(words)
    if args.rate == 0 or args.sigma > 5:
        parser.error("--rate must be over 0, and --sigma at most 5")
    if args.kv_tokens // PAGE * PAGE < 2 * args.limit:
        parser.error(
            f"--kv-tokens ({args.kv_tokens}) must hold a prompt and an output of --limit ({args.limit}) "
            f"in pages of {PAGE}"
        )
    return args


def compare(args: argparse.Namespace) -> dict[str, Outcome]:
    """Serve the same requests with each kind of routing."""
    arrivals, with_sessions = draw_arrivals(args, False), draw_arrivals(args, True)
    runs = {
        "chance": (Chance(random.Random(args.seed)), arrivals),
        "chance, with room": (Chance(random.Random(args.seed), with_room=True), arrivals),
        "routing": (Routing(), arrivals),
        "routing, sessions": (Routing(), with_sessions),
    }
    return {name: Simulation(args, routing).run(requests) for name, (routing, requests) in runs.items()}


def figures(found: dict[str, Outcome], load: str) -> list[Measurement]:
    chance = found["chance"]
    made = []
    for kind in ("routing", "routing, sessions"):
        one = found[kind]
        for name, value, reference, unit in (
            ("queued prefill tokens, fullest over mean", one.queued, chance.queued, ""),
            ("queued prefill tokens, fullest over mean, floor", one.queued_floor, chance.queued, ""),
            ("queued prefill tokens, fullest", one.most_queued, chance.most_queued, "tokens"),
            ("KV, fullest over mean", one.kv, chance.kv, ""),
            ("KV, fullest over mean, floor", one.kv_floor, chance.kv, ""),
            ("KV, excess of the fullest over the mean", one.kv - 1, chance.kv - 1, ""),
            ("TTFT, mean", one.ttft_s, chance.ttft_s, "s"),
            ("requests per decode replica", one.per_decode, None, ""),
        ):
            reference, source = (None, "") if reference is None else (round(reference, 4), RANDOM)
            made.append(
                Measurement(f"{kind}, {load}: {name}", round(value, 4), unit, "lower", reference, source, "simulated")
            )
    return made


def main() -> None:
    args = parse()
    found = compare(args)
    load = f"{args.prefills} + {args.decodes} replicas, {args.rate:g}/s of {args.prompt} + {args.output} tokens"
    print(f"{load} (medians), sigma {args.sigma:g}; simulated")
    print(f"{found['routing'].per_decode:.1f} requests per decode replica on average")
    print(f"{'':18} {'queued prefill tokens':>24} {'KV':>27} {'TTFT':>7} {'same replica again':>20}")
    print(f"{'':18} {'fullest':>9} {'over mean':>9} {'floor':>6} {'fullest':>8} {'over mean':>11} {'floor':>6}", end="")
    print(f" {'mean':>7} {'prefill':>12} {'decode':>7}")
    for name, o in found.items():
        loads = f"{o.most_queued:9,.0f} {o.queued:9.3f} {o.queued_floor:6.3f} {o.most_kv:8.1%} {o.kv:11.3f}"
        print(f"{name:18} {loads} {o.kv_floor:6.3f} {o.ttft_s:5.2f} s {o.same_prefill:12.1%} {o.same_decode:7.1%}")
    if args.out is not None:
        save(figures(found, load), args.out)


if __name__ == "__main__":
    main()
