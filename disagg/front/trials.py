"""Trials: how a request that kills what serves it is found, and the requests beside it are kept.

A job that dies may have been killed by a request that it had just begun. All requests that were in that place are
accused, most of them wrongly. So each is tried apart from the others: on jobs where no other accused request is,
until it is past the place where it was. One whose second job dies as well is given up.
"""

import time

from disagg.front.replica import Replica
from disagg.front.tracked import Tracked

DEATHS = 2  # a request is given up when so many jobs have died as they began it
TRIAL_WAIT_S = 10.0  # how long an accused request waits for a job of its own; then it goes with the others


class Trials:
    def __init__(self) -> None:
        self._running: dict[Tracked, set[str]] = {}  # accused requests -> the jobs that serve them

    def died(self, tracked: Tracked, lost: Replica) -> bool:
        """Count the loss of a replica, if it may have been this request's doing. Returns True to give it up.

        An attempt counts once, though its prefill and its decode job may both die. A link may break before the router
        knows why. Then the request has already left the replica, and avoids its job.
        """
        was_here = lost in (tracked.decode, tracked.prefill)
        has_just_left = tracked.decode is None and tracked.avoids(lost.hello.job)
        if not (was_here or has_just_left) or not tracked.begun or not tracked.is_fresh or tracked.blamed:
            return False
        tracked.blamed = True
        tracked.deaths += 1
        return tracked.deaths >= DEATHS

    def places(self, tracked: Tracked, replicas: list[Replica]) -> list[Replica]:
        """Return the replicas where no other accused request is. All of them, if this one is not, or waits too long.

        It waits from the first time that a trial of another one kept it from all replicas.
        """
        if not tracked.deaths:
            return replicas
        busy = set().union(*self._running.values())
        found = [replica for replica in replicas if replica.hello.job not in busy]
        if replicas and not found:
            now = time.monotonic()
            tracked.held_since = tracked.held_since or now
            if now - tracked.held_since > TRIAL_WAIT_S:
                return replicas
        return found

    def begin(self, tracked: Tracked) -> None:
        """Call it when the request was given to replicas."""
        if tracked.deaths:
            self._running[tracked] = {r.hello.job for r in (tracked.decode, tracked.prefill) if r is not None}
            tracked.held_since = 0.0

    def progress(self, tracked: Tracked) -> None:
        """Acquit the request, if it is past the place where it was. Call it with its tokens."""
        if tracked.deaths and not tracked.is_fresh:
            tracked.deaths = 0
            self.end(tracked)

    def end(self, tracked: Tracked) -> None:
        """Call it when the request leaves its replicas."""
        self._running.pop(tracked, None)
