"""Reports: a replica's statistics for the router's metrics, every few seconds while it serves.

    every rank   RankStats: what only this rank knows, for example its own links   --exchange of events-->
    first rank   the sums over the replica's ranks + what all of its ranks know alike -> Stats to the router

The load is not among them: it goes with the beats, because routing wants it fresh (`Load`).

The ranks exchange events in every turn anyway, so reports need no collective of their own. Statistics that are known
only by a collective (those of a recording) are not reported; the last message, Bye, has them.
"""

import time
from collections import Counter

import msgspec

from disagg.control.messages import Stats
from disagg.engine import Engine
from disagg.pipeline import Pipeline
from disagg.role import Role

REPORT_S = 5.0


class RankStats(msgspec.Struct, frozen=True, tag=True):
    """An event of the replica: the statistics that one of its ranks alone knows."""

    rank: int  # within the replica
    stats: dict[str, float]


def about(engine: Engine) -> dict[str, str]:
    """Return how this job runs, in words: settings that the metrics show with their reasons."""
    return {"overlap": engine.rule.mode, "overlap_rule": engine.rule.why, "graphs": engine.captures.why or "none"}


class Reports:
    """Makes a replica's reports. Every rank has one; only the first rank's `news` returns any."""

    def __init__(self, role: Role, pipeline: Pipeline) -> None:
        self._role, self._pipeline, self._engine = role, pipeline, role.engine
        self._rank = role.engine.mesh.attn.rank
        self._by_rank: dict[int, dict[str, float]] = {}
        self._next = time.monotonic() + REPORT_S
        self._ready = False  # has this rank's own event come back?

    def due(self) -> list[RankStats]:
        """Return this rank's event for the turn: one every REPORT_S, otherwise none."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + REPORT_S
        return [RankStats(self._rank, self._role.stats())]

    def hear(self, event: RankStats) -> None:
        self._by_rank[event.rank] = event.stats
        self._ready |= event.rank == self._rank == 0

    def news(self) -> Stats | None:
        """Return the report, if it is time for one. Other ranks' parts may be up to REPORT_S older."""
        if not self._ready:
            return None
        self._ready = False
        total: Counter[str] = Counter()
        for stats in self._by_rank.values():
            total.update(stats)
        return Stats({name: float(value) for name, value in {**self._known(), **total}.items()})

    def _known(self) -> dict[str, float]:
        """Return what every rank of the replica knows alike, without communication."""
        replays = {"graph_replays": self._engine.graph_replays}
        known = self._pipeline.stats | replays | self._engine.scheduler.cache.stats()
        rebalancer = self._engine.rebalancer
        return known if rebalancer is None else known | rebalancer.stats.copy() | rebalancer.ages()
