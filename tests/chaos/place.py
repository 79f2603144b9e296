"""A deployment of several jobs per role behind an HTTP door, whose jobs a test can kill, stop, drain and replace."""

import json
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException

from prometheus_client.parser import text_string_to_metric_families

from scripts.tools.demo import free_port
from tests.chaos.left import listeners_of
from tests.chaos.load import HOST, Door
from tests.processes import Job
from tests.town import Town

AFTER_S = 0.5  # from a rank's death until its launcher kills the other ranks of the job, as torchrun does
BATCH = ("--max-batch", "128")  # one decode job can serve all streams
SHAPE = {
    "prefill": [(2, ()), (1, ())],
    "decode": [(2, ("--attn-tp", "2", *BATCH)), (1, BATCH)],
}  # (ranks, flags)
REPLICAS = {"prefill": 3, "decode": 2}
JOINED = "joined the router at"


@dataclass
class Slot:
    """A place for a job, and the job that has it."""

    role: str
    ranks: int
    flags: tuple[str, ...]
    job: Job

    def __str__(self) -> str:
        return f"{self.role} of {self.ranks}"


@dataclass
class Place:
    """`limit_s`: nothing takes longer than that."""

    town: Town
    flags: tuple[str, ...]  # of prefill and decode jobs
    limit_s: float
    slots: list[Slot] = field(default_factory=list)
    listened: set[tuple[int, str]] = field(default_factory=set)  # sockets where any of its processes has listened
    mismatches: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by decode rank
    transfers: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.door = Door(free_port(), self.limit_s)
        self.router = self.town.start("router", 1, "--router", self.town.address, "--http", f"{HOST}:{self.door.port}")
        for role, jobs in SHAPE.items():
            for ranks, flags in jobs:
                self.slots.append(Slot(role, ranks, flags, self._start(role, ranks, flags)))
        self.until_whole()

    def _start(self, role: str, ranks: int, flags: tuple[str, ...]) -> Job:
        return self.town.worker(role, ranks, *flags, *self.flags)

    def of(self, role: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.role == role]

    # ---- what is done to it

    def kill(self, slot: Slot) -> None:
        slot.job.signal(signal.SIGKILL)

    def kill_rank(self, slot: Slot, rank: int) -> None:
        slot.job.ranks[rank].signal(signal.SIGKILL)
        time.sleep(AFTER_S)
        for process in slot.job.ranks:
            if process.status is None:
                process.signal(signal.SIGKILL)

    def replace(self, slot: Slot) -> None:
        """Start a new job in the place of one that has ended."""
        self.town.until(lambda: None not in slot.job.statuses, self.limit_s)
        slot.job = self._start(slot.role, slot.ranks, slot.flags)

    # ---- what it says

    @property
    def said(self) -> str:
        return self.router.said

    def lost(self, role: str) -> int:
        """Return how many replicas of this role the router has given up so far."""
        return len(re.findall(rf"a {role} replica is lost", self.said))

    def look(self) -> None:
        """Note what is told while a job lives: where it listens, and what its transfers were like."""
        self.listened |= listeners_of(rank.pid for job in self.town.jobs for rank in job.ranks if rank.status is None)
        for name, labels, value in self.metrics():
            for metric, kept in (("mismatches", self.mismatches), ("", self.transfers)):
                if name == f"moesaic_transfer{f'_{metric}' if metric else 's'}_total":
                    key = f"{labels['job']} {labels['rank']}"
                    kept[key] = max(kept[key], value)

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        families = text_string_to_metric_families(self.door.get("/metrics").decode())
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def in_use(self) -> dict[str, float]:
        """Return the requests that the router has, and by replica the pages and transfers that it says it has."""
        names = ("moesaic_requests", "moesaic_kv_pages", "moesaic_transfers_in_flight")
        found: Counter[str] = Counter()
        for name, labels, value in self.metrics():
            if name in names and value:
                found[f"{name} {labels.get('role', '')} {labels.get('rank', '')}"] += value
        return dict(found)

    def is_whole(self) -> bool:
        """Whether every job has joined, and the router has all replicas. Their number alone may count a dead one."""
        if not all(JOINED in slot.job.said for slot in self.slots):
            return False
        with suppress(OSError, HTTPException):
            picture = json.loads(self.door.get("/deployment"))
            return Counter(card["role"] for card in picture["replicas"]) == REPLICAS
        return False

    def until_whole(self) -> float:
        """Wait until every job takes part. Returns how long that took."""
        began = time.monotonic()
        self.until(self.is_whole)
        self.look()
        return time.monotonic() - began

    def until(self, condition: Callable[[], bool]) -> None:
        self.town.until(condition, self.limit_s)
