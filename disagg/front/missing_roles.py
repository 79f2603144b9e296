"""MissingRoles: how long requests wait for a role that no replica has, and what the user hears of that."""

import sys
import time

from disagg.front.fleet import Fleet

REPLACEMENT_S = 30.0  # how long requests wait for a lost role to come back
NOTICE_S = 10.0  # how long requests wait for a missing role before the first line about it
NOTICE_FACTOR = 3  # the wait before each further line grows by this factor


class MissingRoles:
    """Before any request has been served, requests wait for ever. After that, they wait REPLACEMENT_S."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._since, self._notice_s = time.monotonic(), NOTICE_S

    @property
    def is_late(self) -> bool:
        """Have requests waited for long enough?"""
        return time.monotonic() - self._since > REPLACEMENT_S

    def look(self, waiting: int, has_served: bool) -> str | None:
        """Return the error of the requests that wait, if they have waited for long enough. It may print a line.

        `waiting`: how many there are. `has_served`: was any request given to a replica yet?
        """
        now, roles = time.monotonic(), self._fleet.missing_roles()
        if not roles:
            self._since, self._notice_s = now, NOTICE_S
        elif has_served and self.is_late:
            missing = " and no ".join(roles)
            return f"no {missing} replica left to serve it, and none came in {REPLACEMENT_S:.0f} s"
        elif waiting and self._fleet.expected <= 0 and now - self._since > self._notice_s:
            self._notice_s = NOTICE_FACTOR * self._notice_s
            missing = " and a ".join(roles)
            print(f"router: {waiting} requests still waiting for a {missing} replica", file=sys.stderr, flush=True)
        return None
