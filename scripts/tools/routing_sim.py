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
import random
from collections.abc import Sequence

from disagg.front.replica import Replica
from disagg.front.routing import Choice, Routing
from disagg.request import Request
from model.pages import PAGE
from scripts.bench.lib.flags import fraction, natural, new_file, positive
from scripts.bench.lib.measurements import Measurement, save
from scripts.tools.simulated_jobs import Arrival, Outcome, Simulation

TURNS = 4  # requests per conversation, on average
RANDOM = "replicas chosen at random"


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
