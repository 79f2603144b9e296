"""What can happen to a deployment, in an order that a seed decides: first each kind once, then any."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg.front.fleet import GRACE_S
from tests.chaos.cut import cut, cut_between
from tests.chaos.load import Load
from tests.chaos.place import Place, Slot

LOSS_S = 30.0  # a job that is stopped for good is noticed within this time
BACK_S = 20.0  # a job that goes on is taken back within this time


@dataclass(frozen=True)
class Times:
    """In seconds. They depend on the limits that the deployment has."""

    short: float = 3.0  # a stop that nobody notices
    router: float = 5.0  # a stop of the router: longer than `fleet.PAUSE_S`
    missing: float = 36.0  # without any job of a role: longer than `missing_roles.REPLACEMENT_S`
    calm: tuple[float, float] = (1.0, 5.0)  # between two faults


@dataclass(frozen=True)
class Stop:
    """From `began` to `ended` this was stopped: a job of a role, by its ranks, or the router (0)."""

    role: str
    ranks: int
    began: float
    ended: float


@dataclass
class Faults:
    place: Place
    load: Load
    rng: random.Random
    times: Times
    say: Callable[[str], None]
    can_cut: bool
    happened: list[tuple[str, float, float]] = field(default_factory=list)  # kind, and from when until when
    stops: list[Stop] = field(default_factory=list)
    without: list[tuple[float, float]] = field(default_factory=list)  # when there was no job of a role, by our doing
    backs: list[float] = field(default_factory=list)  # seconds from SIGCONT until a lost job was taken back

    @property
    def kinds(self) -> dict[str, Callable[[], str]]:
        cuts = {"cut a job from the router": self.cut_router, "cut links": self.cut_links, "cut all": self.cut_all}
        return {
            "kill a decode job": lambda: self.kill("decode"),
            "kill a prefill job": lambda: self.kill("prefill"),
            "kill a decode rank": lambda: self.kill_rank("decode"),
            "kill a prefill rank": lambda: self.kill_rank("prefill"),
            **(cuts if self.can_cut else {}),
            "stop a decode rank": lambda: self.stop("decode"),
            "stop a prefill rank": lambda: self.stop("prefill"),
            "stop a decode rank until it is lost": lambda: self.stop_long("decode"),
            "stop a prefill rank until it is lost": lambda: self.stop_long("prefill"),
            "stop a decode job until it is lost": lambda: self.stop_long("decode", whole=True),
            "stop a prefill job until it is lost": lambda: self.stop_long("prefill", whole=True),
            "stop the router": self.stop_router,
            "drain a decode job": lambda: self.drain("decode"),
            "drain a prefill job": lambda: self.drain("prefill"),
            "kill all prefill jobs": lambda: self.kill_all("prefill"),
        }

    def run(self, until: float) -> None:
        """Let each kind happen once, and then any until that time."""
        first = list(self.kinds)
        self.rng.shuffle(first)
        while first or time.monotonic() < until:
            kind = first.pop() if first else self.rng.choice([k for k in self.kinds if k != "kill all prefill jobs"])
            self.happen(kind)

    def during(self, began: float, ended: float) -> str:
        """Return what happened in that time.

        After a stop of its own, the router takes all replicas for alive a while, and so notices a death later.
        """
        kinds = [kind for kind, a, b in self.happened if a < ended and began < b]
        routers = [stop.ended for stop in self.stops if stop.role == "router"]
        if any(began < end + GRACE_S and end < ended for end in routers):
            kinds.append("after a stop of the router")
        return ", ".join(kinds)

    def happen(self, kind: str) -> None:
        """Let one happen, and wait until the deployment is whole again and every request that met it has gone on.

        So no request loses three of its places, or two jobs as it begins, which would be enough to give it up.
        """
        began = time.monotonic()
        what = self.kinds[kind]()
        took = self.place.until_whole()
        now = time.monotonic()
        self.place.until(lambda: self.load.went_on(now))
        self.happened.append((kind, began, time.monotonic()))
        self.say(f"{kind}: {what}; {now - began:.1f} s, whole after {took:.1f} s")
        time.sleep(self.rng.uniform(*self.times.calm))

    def _slot(self, role: str, ranks: int = 1) -> Slot:
        return self.rng.choice([slot for slot in self.place.of(role) if slot.ranks >= ranks])

    def kill(self, role: str) -> str:
        slot = self._slot(role)
        self.place.kill(slot)
        time.sleep(self.rng.random())
        self.place.replace(slot)
        return str(slot)

    def kill_rank(self, role: str) -> str:
        slot = self._slot(role, 2)
        rank = self.rng.randrange(slot.ranks)
        self.place.kill_rank(slot, rank)
        self.place.replace(slot)
        return f"rank {rank} of {slot}"

    def lacked_prefill(self, now: float) -> bool:
        """Whether there was a time without prefill jobs then. It lasts until the deployment is whole again."""
        return any(began <= now <= ended for began, ended in self.without)

    def kill_all(self, role: str) -> str:
        began = time.monotonic()
        for slot in self.place.of(role):
            self.place.kill(slot)
        time.sleep(self.times.missing)
        for slot in self.place.of(role):
            self.place.replace(slot)
        self.place.until_whole()
        self.without.append((began, time.monotonic()))
        return f"none for {self.times.missing:g} s"

    def stop(self, role: str) -> str:
        slot = self._slot(role)
        what, go_on = self._stop(slot, whole=False)
        time.sleep(self.times.short)
        go_on()
        return f"{what} for {self.times.short:g} s"

    def _stop(self, slot: Slot, whole: bool) -> tuple[str, Callable[[], None]]:
        """Stop one rank of a job, or the whole of it. Returns what was stopped, and what lets it go on."""
        number = self.rng.randrange(slot.ranks)
        ranks = slot.job.ranks if whole else [slot.job.ranks[number]]
        began = time.monotonic()
        for rank in ranks:
            rank.signal(signal.SIGSTOP)

        def go_on() -> None:
            for rank in ranks:
                rank.signal(signal.SIGCONT)
            self.stops.append(Stop(slot.role, slot.ranks, began, time.monotonic()))

        return str(slot) if whole else f"rank {number} of {slot}", go_on

    def stop_long(self, role: str, whole: bool = False) -> str:
        """Until the router has given it up, and a moment longer."""
        slot, before, began = self._slot(role), self.place.lost(role), time.monotonic()
        what, go_on = self._stop(slot, whole)
        self.place.town.until(lambda: self.place.lost(role) > before, LOSS_S)
        noticed = time.monotonic() - began
        time.sleep(2 * self.rng.random())
        go_on()
        goes_on = time.monotonic()
        self.place.town.until(self.place.is_whole, BACK_S)
        self.backs.append(time.monotonic() - goes_on)
        return f"{what}, lost after {noticed:.1f} s, back after {self.backs[-1]:.1f} s"

    def stop_router(self) -> str:
        began = time.monotonic()
        self.place.router.signal(signal.SIGSTOP)
        time.sleep(self.times.router)
        self.place.router.signal(signal.SIGCONT)
        self.stops.append(Stop("router", 0, began, time.monotonic()))
        return f"for {self.times.router:g} s"

    def drain(self, role: str) -> str:
        slot = self._slot(role)
        slot.job.signal(signal.SIGTERM)
        self.place.until(lambda: None not in slot.job.statuses)
        assert set(slot.job.statuses) == {0}, self.place.town.said
        self.place.replace(slot)
        return str(slot)

    def cut_router(self) -> str:
        slot = self._slot(self.rng.choice(("prefill", "decode")))
        return f"{self._cut_router(slot)} connections of {slot}"

    def _cut_router(self, slot: Slot) -> int:
        return sum(cut(rank.pid, lambda peer: peer[1] == self.place.town.port) for rank in slot.job.ranks)

    def cut_links(self) -> str:
        """All links between a decode and a prefill job, as soon as any two have some."""
        cuts: list[str] = []

        def found() -> bool:
            decode, prefill = self._slot("decode"), self._slot("prefill")
            ends = [(one.pid, other.pid) for one in decode.job.ranks for other in prefill.job.ranks]
            if count := sum(cut_between(one, other) for one, other in ends):
                cuts.append(f"{count} connections between {decode} and {prefill}")
            return bool(cuts)

        self.place.until(found)
        return cuts[0]

    def cut_all(self) -> str:
        """All connections to the router at once."""
        return f"{sum(map(self._cut_router, self.place.slots))} connections"
