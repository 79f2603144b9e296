"""Apart: prefill and decode jobs between which a link has failed get no requests together for a while.

The router hears both, so nothing else shows it that the network between the two fails. By job, because the replicas of
a job mostly share its machines.
"""

import time
from collections.abc import Sequence

from disagg.front.replica import Replica

APART_S = 60.0  # since the latest failure


class Apart:
    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}  # decode job, prefill job -> time.monotonic()

    def add(self, decode: Replica, prefill: Replica) -> None:
        """A link between these two has failed."""
        self._until[decode.hello.job, prefill.hello.job] = time.monotonic() + APART_S

    def among(self, decodes: Sequence[Replica], prefills: Sequence[Replica]) -> set[tuple[str, str]]:
        """Return the pairs of jobs to keep apart: none if all pairs of these replicas are such."""
        now = time.monotonic()
        self._until = {pair: until for pair, until in self._until.items() if until > now}
        if not self._until:
            return set()
        pairs = {(decode.hello.job, prefill.hello.job) for decode in decodes for prefill in prefills}
        return pairs & self._until.keys() if pairs - self._until.keys() else set()


def partners(decode: Replica, prefills: Sequence[Replica], apart: set[tuple[str, str]]) -> list[Replica]:
    """Return the prefill replicas from which the decode replica may get KV."""
    return [prefill for prefill in prefills if (decode.hello.job, prefill.hello.job) not in apart]
