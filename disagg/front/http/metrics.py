"""The router's numbers and its replicas' reports in Prometheus' text form, made when they are asked for.

    router.metrics            counters and histograms of requests
    router.tracked            requests in progress, by state
    replica.load, .stats      what each replica has reported: its load every second, its statistics every few seconds

Names follow Prometheus' rules: base units, and `_total` for what only rises. A counter of a replica begins at 0 when
its job starts. A replica that leaves takes its series with it.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from disagg.front.histogram import TIMES, Histogram
from disagg.front.metrics import ROLE_PHASES, STEP_TOKENS, drafts_by_place
from disagg.front.replica import Replica
from disagg.front.router import Router
from disagg.front.tracked import STATES

REPLICA, JOB = ("role", "job", "rank"), ("role", "job")
ABOUT = ("overlap", "overlap_rule", "graphs")  # of `Hello.about`
JOB_LETTERS = 8  # of a job's random id: enough to tell jobs apart
# name -> (help, the replica's statistic). These three tables are of counters per replica, per phase, and per job.
REPLICA_COUNTERS = {
    "moesaic_transfers": ("Transfers of KV that this replica has received.", "transfers"),
    "moesaic_transfer_bytes": ("Bytes of KV that this replica has received.", "transfer_bytes"),
    "moesaic_transfer_seconds": ("Seconds in which a link of this replica was receiving KV.", "transfer_seconds"),
    "moesaic_transfer_failures": ("Requests whose KV did not arrive, cancelled ones aside.", "transfer_failures"),
    "moesaic_transfer_mismatches": (
        "Transfers of KV that did not have their checksum (--kv-checksum).",
        "transfer_mismatches",
    ),
    "moesaic_cache_hit_tokens": (
        "Prompt tokens whose KV came from the prefix cache: not computed, or on decode replicas not received.",
        "cache_hit_tokens",
    ),
    "moesaic_cache_evictions": ("Pages that the prefix cache gave up because others needed them.", "cache_evictions"),
    "moesaic_verifications": ("Steps of a request that verified drafts; each gives a token.", "verifications"),
    "moesaic_graph_replays": ("Steps that replayed a CUDA graph.", "graph_replays"),
}
DRAFTS = {
    "verified": "Drafts that were verified before a request's last token, by their place in a step.",
    "accepted": "Drafts that were right, by their place in a step. Each gives a token more.",
}
PHASE_COUNTERS = {
    "moesaic_steps": ("Steps. One in which any rank of the job has prompt tokens is a prefill step.", "{}_steps"),
    "moesaic_step_seconds": ("Seconds in steps.", "{}_seconds"),
    "moesaic_overlapped_steps": ("Steps that ran as two micro-batches in turns.", "{}_overlapped"),
}
JOB_COUNTERS = {
    "moesaic_expert_looks": ("Complete looks at the balance of the experts.", "rebalance_looks"),
    "moesaic_expert_moves": ("Complete moves of experts.", "rebalances_total"),
    "moesaic_expert_move_seconds": ("Seconds from the beginning to the end of complete moves.", "rebalance_seconds"),
    "moesaic_expert_failures": ("Looks and moves of experts that failed.", "rebalance_failures"),
}


class Families(Collector):
    """All metric families of a router, read from it whenever they are collected."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        replicas = list({_labels(replica): replica for replica in self._router.fleet.replicas.values()}.values())
        yield self._refusals(replicas)
        yield from _loads(replicas)
        yield from _steps(replicas)
        replicas.sort(key=lambda replica: bool(replica.stats))  # so that one that has reported speaks for its job
        yield from _jobs({_labels(replica)[:2]: replica for replica in replicas})

    def _requests(self) -> Iterator[Metric]:
        metrics, tracked = self._router.metrics, list(self._router.tracked)
        states, now = Counter(one.state for one in tracked), ((state,) for state in STATES)
        help = "Requests without their answer. waiting: in the router; queued: on a decode replica without pages yet."
        yield _gauge("moesaic_requests", help, ["state"], [(state, states[state[0]]) for state in now])
        ended = [((reason,), count) for reason, count in sorted(metrics.finished.items())]
        help = "Requests that have their answer, by finish_reason, or that were cancelled."
        yield _counter("moesaic_requests_ended", help, ["reason"], ended)
        prompt = metrics.prompt_tokens + sum(len(t.user.request.prompt) for t in tracked if t.first is not None)
        generated = metrics.generated_tokens + sum(len(t.stream.token_ids) for t in tracked)
        kinds = [(("prompt",), prompt), (("generated",), generated)]
        help = "Tokens of prompts whose first token is there, and generated tokens."
        yield _counter("moesaic_tokens", help, ["kind"], kinds)
        yield _counter("moesaic_retries", "Attempts that followed an earlier one.", [], [((), metrics.retries)])
        help = "Retries because a replica was lost: the request goes on elsewhere."
        yield _counter("moesaic_migrations", help, [], [((), metrics.migrations)])
        times = {
            "moesaic_time_to_first_token_seconds": ("From submission to the first token.", metrics.ttft),
            "moesaic_inter_token_seconds": ("Between two updates with tokens of one request.", metrics.inter_token),
            "moesaic_request_seconds": ("From submission to the end of a request.", metrics.latency),
        }
        for name, (help, histogram) in times.items():
            yield _histogram(name, help, [], {(): histogram})
        parts = {(part,): histogram for part, histogram in metrics.parts.items()}
        help = "Parts of the time to first token of requests whose prompt was computed elsewhere."
        yield _histogram("moesaic_first_token_part_seconds", help, ["part"], parts)

    def _refusals(self, replicas: list[Replica]) -> Metric:
        counts = [(_labels(r), r.stats["refusals"]) for r in replicas if "refusals" in r.stats]
        help = "Connections, messages, links and replicas that a port has refused; the router's own has no job."
        router = ("router", "", ""), self._router.port.refusals.count
        return _counter("moesaic_refusals", help, REPLICA, [router, *counts])


def _loads(replicas: list[Replica]) -> Iterator[Metric]:
    roles = Counter(replica.hello.role for replica in replicas)
    yield _gauge("moesaic_replicas", "Replicas in the fleet.", ["role"], [((role,), n) for role, n in roles.items()])
    given = [(_labels(r), len(r.prompts if r.hello.role == "prefill" else r.requests)) for r in replicas]
    help = "Requests that the router has given to this replica; on prefill replicas, prompts without a first token."
    yield _gauge("moesaic_given_requests", help, REPLICA, given)
    gauges = {
        "moesaic_running_requests": ("Requests in the batch.", "running"),
        "moesaic_waiting_requests": ("Requests that the replica has, and not in its batch.", "waiting"),
        "moesaic_queued_tokens": ("Prompt tokens that no step has computed.", "queued_tokens"),
        "moesaic_kv_pages": ("Pages of the KV pool that requests hold, of 64 tokens.", "kv_pages"),
    }
    for name, (help, field) in gauges.items():
        loads = [(_labels(r), getattr(r.load, field)) for r in replicas if r.load is not None]
        yield _gauge(name, help, REPLICA, loads)
    pools = [(_labels(r), r.capacity) for r in replicas]
    yield _gauge("moesaic_kv_pages_capacity", "Pages of the KV pool.", REPLICA, pools)
    idle = [(_labels(r), r.stats["cache_idle_pages"]) for r in replicas if "cache_idle_pages" in r.stats]
    help = "Pages of the prefix cache that no request holds. They are free for whoever needs them."
    yield _gauge("moesaic_cache_idle_pages", help, REPLICA, idle)
    flying = [(_labels(r), r.stats["transfers_in_flight"]) for r in replicas if "transfers_in_flight" in r.stats]
    yield _gauge("moesaic_transfers_in_flight", "Transfers of KV that are being received.", REPLICA, flying)


def _steps(replicas: list[Replica]) -> Iterator[Metric]:
    for name, (help, stat) in REPLICA_COUNTERS.items():
        yield _counter(name, help, REPLICA, [(_labels(r), r.stats[stat]) for r in replicas if stat in r.stats])
    for kind, help in DRAFTS.items():
        places = [(r, i, n) for r in replicas for i, n in enumerate(drafts_by_place(r.stats, kind), 1)]
        found = [((*_labels(r), str(i)), n) for r, i, n in places]
        yield _counter(f"moesaic_{kind}_drafts", help, (*REPLICA, "place"), found)
    phases = [(r, phase) for r in replicas for phase in ROLE_PHASES[r.hello.role]]
    for name, (help, pattern) in PHASE_COUNTERS.items():
        found = [((*_labels(r), phase), r.stats.get(pattern.format(phase), 0)) for r, phase in phases if r.stats]
        yield _counter(name, help, (*REPLICA, "phase"), found)
    found = [((*_labels(r), phase), r.stats.get(STEP_TOKENS[phase], 0)) for r, phase in phases if r.stats]
    help = "Tokens that steps computed: of prompts in prefill, generated by decode steps in decode."
    yield _counter("moesaic_step_tokens", help, (*REPLICA, "phase"), found)
    now = time.monotonic()
    ages = [(_labels(r), now - r.reported) for r in replicas if r.stats]
    yield _gauge("moesaic_report_age_seconds", "Since the replica's latest statistics came.", REPLICA, ages)


def _jobs(jobs: dict[tuple[str, str], Replica]) -> Iterator[Metric]:
    """Yield what all replicas of a job know alike: `jobs` has one replica per job."""
    texts = [((*job, *(r.hello.about.get(name, "") for name in ABOUT)), 1) for job, r in jobs.items()]
    help = "1. overlap: the mode; overlap_rule: when steps overlap, or why not; graphs: what runs in CUDA graphs."
    yield _gauge("moesaic_job_info", help, (*JOB, *ABOUT), texts)
    help = "Mean tokens per rank over those of the fullest rank, at the latest look."
    found = [(job, r.stats["balancedness"]) for job, r in jobs.items() if "balancedness" in r.stats]
    yield _gauge("moesaic_balancedness", help, JOB, found)
    for name, (help, stat) in JOB_COUNTERS.items():
        yield _counter(name, help, JOB, [(job, r.stats[stat]) for job, r in jobs.items() if stat in r.stats])
    now = time.monotonic()
    for what in ("look", "move"):
        name, stat = f"moesaic_expert_{what}_age_seconds", f"{what}_age_seconds"
        ages = [(job, r.stats[stat] + now - r.reported) for job, r in jobs.items() if stat in r.stats]
        yield _gauge(name, f"Since the latest complete {what} of the experts; missing before the first.", JOB, ages)


def _labels(replica: Replica) -> tuple[str, str, str]:
    """Return the values of the labels REPLICA. The rank is that of the replica's first member, within the job."""
    hello = replica.hello
    return hello.role, hello.job[:JOB_LETTERS], str(hello.members[0].rank)


Samples = Iterable[tuple[tuple[str, ...], float]]  # label values, value


def _gauge(name: str, help: str, labels: Iterable[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, help, labels=list(labels))
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, help: str, labels: Iterable[str], samples: Samples) -> Metric:
    """Without the `_total` of the samples, which the library adds."""
    family = CounterMetricFamily(name, help, labels=list(labels))
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(name: str, help: str, labels: Iterable[str], histograms: dict[tuple[str, ...], Histogram]) -> Metric:
    family = HistogramMetricFamily(name, help, labels=list(labels))
    for values, histogram in histograms.items():
        counts = [*histogram.up_to(TIMES), histogram.count]
        bounds = [*(f"{bound:g}" for bound in TIMES), "+Inf"]
        family.add_metric(values, list(zip(bounds, counts, strict=True)), histogram.sum)
    return family


def render(router: Router) -> bytes:
    """Return all metrics in Prometheus' text form. Call it in the router's thread: half a millisecond per replica."""
    registry = CollectorRegistry()  # of its own: nothing of this process or of Python is in it
    registry.register(Families(router))
    return generate_latest(registry)
