"""Progress: one readable line per job on stderr while a router serves (--log-interval).

    router: 3 waiting, 0 queued, 5 in prefill, 31 in decode; 1,204 ended
    router: prefill job of 4 replicas: 5 running, 2 waiting, prefill 24,310 tok/s, KV 34 %
    router: decode job of 8 replicas: 31 running, 0 waiting, decode 1,234 tok/s, KV 41 %, balancedness 0.930

The numbers of a job are those that its replicas have reported, so they are up to a few seconds old. Rates are those
between two reports.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from tqdm import tqdm

from disagg.front.metrics import ROLE_PHASES, STEP_TOKENS
from disagg.front.replica import Replica
from disagg.front.tracked import STATES, Tracked

Report = tuple[float, dict[str, float]]  # when it came, the statistics


class Progress:
    """Prints lines every `interval` seconds; with 0, never. A line that has not changed is not repeated."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = time.monotonic() + interval if interval else float("inf")
        self._reports: dict[str, list[Report]] = {}  # by replica: the last two reports that lines were made of
        self._said: list[str] = []

    def tick(self, replicas: Iterable[Replica], tracked: Collection[Tracked], ended: int) -> None:
        """Print the lines, if it is time. Call it repeatedly. `ended`: requests that have ended so far."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval
        lines = self.lines(list(replicas), tracked, ended)
        for line in lines:
            if line not in self._said:
                tqdm.write(f"router: {line}", file=sys.stderr)  # beside a batch's bar, not into it
        self._said = lines

    def lines(self, replicas: list[Replica], tracked: Collection[Tracked], ended: int) -> list[str]:
        """Return the router's line, and one per job."""
        states = Counter(one.state for one in tracked)
        waiting, queued, prefill, decode = (states[state] for state in STATES)
        found = [f"{waiting} waiting, {queued} queued, {prefill} in prefill, {decode} in decode; {ended:,} ended"]
        self._remember(replicas)
        jobs: dict[tuple[str, str], list[Replica]] = defaultdict(list)
        for replica in replicas:
            jobs[replica.hello.role, replica.hello.job].append(replica)
        found += [self._job(role, members) for (role, _), members in sorted(jobs.items())]
        return found

    def _remember(self, replicas: list[Replica]) -> None:
        """Keep the reports that are new. A replica that has left is forgotten."""
        kept = {replica.id: self._reports.get(replica.id, []) for replica in replicas}
        for replica in replicas:
            if replica.stats and (not kept[replica.id] or kept[replica.id][-1][0] != replica.reported):
                kept[replica.id] = [*kept[replica.id][-1:], (replica.reported, replica.stats)]
        self._reports = kept

    def _job(self, role: str, replicas: list[Replica]) -> str:
        loads = [replica.load for replica in replicas if replica.load is not None]
        count = "1 replica" if len(replicas) == 1 else f"{len(replicas)} replicas"
        parts = [f"{sum(load.running for load in loads)} running", f"{sum(load.waiting for load in loads)} waiting"]
        for phase in ROLE_PHASES[role]:
            rates = [self._rate(replica, STEP_TOKENS[phase]) for replica in replicas]
            if known := [rate for rate in rates if rate is not None]:
                parts.append(f"{phase} {sum(known):,.0f} tok/s")
        capacity = sum(replica.capacity for replica in replicas)
        parts.append(f"KV {sum(load.kv_pages for load in loads) / capacity:.0%}".replace("%", " %"))
        balanced = [replica.stats["balancedness"] for replica in replicas if "balancedness" in replica.stats]
        parts += [f"balancedness {balanced[0]:.3f}"] if balanced else []  # all replicas of a job know the same
        return f"{role} job of {count}: {', '.join(parts)}"

    def _rate(self, replica: Replica, stat: str) -> float | None:
        """Return the growth per second between the last two reports. None: there is no second one yet."""
        if len(self._reports[replica.id]) < 2:
            return None
        (earlier, before), (later, after) = self._reports[replica.id]
        return (after.get(stat, 0) - before.get(stat, 0)) / (later - earlier)
