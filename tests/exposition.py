"""A router over a real port with two replicas that have reported, and its metrics as a scraper gets them."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from disagg.control.messages import Hello, Load, Member, Parts, Stats, Submit, Update, Updates
from disagg.control.ports import RouterPort, WorkerPort
from disagg.control.pulse import Beacon
from disagg.front.http.metrics import render
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.request import Request
from tests.conftest import eventually

HOST = "127.0.0.1"
OVERLAP_RULE = 'in decode from 128 rows a rank; "off" below\n'
PREFILL_STATS = {"prefill_steps": 4, "prefill_seconds": 2.0, "prompt_tokens": 400, "prefill_overlapped": 1}
DECODE_STATS = {
    "decode_steps": 50,
    "decode_seconds": 1.5,
    "decode_step_tokens": 90,
    "decode_overlapped": 0,
    "graph_replays": 48,
    "verifications": 30,
    "verified_drafts_1": 30,
    "verified_drafts_2": 20,
    "accepted_drafts_1": 12,
    "accepted_drafts_2": 4,
    "cache_hit_tokens": 640,
    "cache_evictions": 3,
    "cache_idle_pages": 2,
    "transfers": 3,
    "transfer_bytes": 3e6,
    "transfer_seconds": 0.25,
    "transfer_failures": 1,
    "transfer_mismatches": 2,
    "transfers_in_flight": 2,
    "refusals": 6,
    "rebalance_looks": 7,
    "rebalances_total": 2,
    "rebalance_failures": 1,
    "rebalance_seconds": 0.5,
    "balancedness": 0.875,
    "look_age_seconds": 3.0,
    "move_age_seconds": 40.0,
}


class Keeper:
    """A client that does nothing."""

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None: ...

    def deliver(self, answer: Any) -> None: ...


class Scene:
    """Four requests: one has ended, one decodes, one is in prefill, one waits because decode has no room for it."""

    def __init__(self, port: RouterPort) -> None:
        self.router = Router(port, None, 4096, lambda: False)
        self.port = port
        self.workers: dict[str, WorkerPort] = {}
        self.beacons: list[Beacon] = []

    def join(self, name: str, role: str, rank: int = 0, **fields: Any) -> None:
        hello = Hello(role, [Member(name, HOST, rank=rank)], 1, 64, 64 * 8, {}, f"job-of-{role}")
        worker = WorkerPort(msgspec.structs.replace(hello, **fields), HOST, self.port.port)
        self.workers[name] = worker

        def joined() -> bool:
            worker.poll(1)
            self.router.turn(None, 1)
            return worker.welcomed

        assert eventually(joined)
        self.beacons.append(Beacon(name, HOST, self.port.port))

    def submit(self, prompt: list[int], max_tokens: int) -> None:
        self.router.submit(UserRequest("x", Request(0, prompt, max_tokens), []), Keeper())
        self.router.turn(None, 0)

    def serve(self) -> None:
        """Bring the scene about."""
        about = {"overlap": "auto", "overlap_rule": OVERLAP_RULE, "graphs": "in CUDA graphs"}
        self.join("p", "prefill")
        self.join("d", "decode", rank=3, about=about)
        decode = self.workers["d"]
        uids: list[int] = []

        def given(count: int) -> bool:
            self.router.turn(None, 1)
            uids.extend(m.request.uid for m in decode.poll(1) if isinstance(m, Submit))
            return len(uids) == count

        self.submit([4] * 5, 1)
        assert eventually(lambda: given(1))
        decode.send(Updates([Update(uids[0], [8], finish="length")], begun=uids))
        assert eventually(lambda: given(1) and not self.router.tracked)
        for prompt in ([5] * 10, [6] * 20, [7] * 30):
            self.submit(prompt, 40)
        assert eventually(lambda: given(3))
        _, first, second = uids
        decode.send(Updates([Update(first, [9], parts=Parts(0.5, 0.25, 0.125, 0.0625))], begun=[first, second]))
        decode.send(Updates([Update(first, [9, 9, 9])]))
        decode.send(Stats(DECODE_STATS))
        self.workers["p"].send(Stats(PREFILL_STATS))
        self.beacons[1].load = Load(queued_tokens=0, kv_pages=5, running=1, waiting=1)

        def reported() -> bool:
            self.router.turn(None, 1)
            replicas = self.router.fleet.replicas.values()
            return all(r.stats for r in replicas) and any(r.load is not None for r in replicas)

        assert eventually(reported)


@contextmanager
def scene() -> Iterator[Scene]:
    made = Scene(RouterPort(HOST, 0))
    try:
        yield made
    finally:
        for one in (*made.beacons, *made.workers.values(), made.port):
            one.close()


@functools.cache
def families(text: bytes) -> dict[str, Metric]:
    """As Prometheus reads them. A counter's family has no `_total`."""
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.name not in found, f"{family.name} comes twice"
        found[family.name] = family
    return found


def value(text: bytes, name: str, **labels: str) -> float:
    """Of the one sample with this name and at least these labels."""
    samples = [sample for family in families(text).values() for sample in family.samples if sample.name == name]
    (found,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    return found


def rendered() -> bytes:
    with scene() as made:
        made.serve()
        return render(made.router)
