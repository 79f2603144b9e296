"""Routing: which decode replica and which prefill replica a request gets.

A request waits in the router until replicas have room. The least loaded replicas with room get it. The load is the
share of the KV in decode, and the queued tokens in prefill.

But requests are sticky. In decode, the replica that served the same `session_id` last is preferred, and then the one
that got the same prefix last. In prefill it is the one that got the same prefix last. They may still hold that KV. What
ranks have in their caches is not reported: it would be late, and the router knows what it has sent where. So this is a
guess. The skew says how much more loaded the preferred replica may be than the least loaded one. It is limited by the
work that the KV could save.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from disagg.front.apart import Apart, partners
from disagg.front.recent import Recent, prefix_keys, session_key
from disagg.front.replica import Replica
from disagg.request import Request
from model.pages import PAGE, pages_for

BATCHES = 2  # requests per decode replica, in multiples of its batch, so that the next ones already have their KV
STEPS_AHEAD = 2  # a prefill replica gets prompts up to this many steps' tokens,
LEAST_AHEAD = 4  # or this many prompts, whichever is more
KV_SKEW = 0.02  # the largest skew, as a share of the KV: with more, simulated loads are visibly less even


class Choice(NamedTuple):
    """Where a request goes. `tokens`: of the prompt, as many as prefill will presumably compute."""

    decode: Replica
    prefill: Replica
    tokens: int


class Routing:
    """Chooses replicas, and remembers its choices."""

    def __init__(self) -> None:
        self._computed, self._received = Recent(), Recent()  # by prefix: the prefill and the decode replica
        self._sessions = Recent()  # by session: the decode replica
        self.apart = Apart()

    def choose(
        self, request: Request, session_id: str | None, decodes: Sequence[Replica], prefills: Sequence[Replica]
    ) -> Choice | None:
        """Return a decode and a prefill replica that can begin the request now, or None.

        `decodes`: the suitable decode replicas, or unified ones, of which one is returned twice. The choice is
        remembered, so the request must go there.
        """
        apart = self.apart.among(decodes, prefills)  # of those without time too: a request waits for them
        decodes = with_room(decodes, pages_for(request.most_tokens))
        is_unified = bool(decodes) and decodes[0].hello.role == "unified"
        prefills = with_time(decodes if is_unified else prefills)
        if is_unified:
            decodes = prefills
        elif apart:
            decodes = [decode for decode in decodes if partners(decode, prefills, apart)]
        if not decodes or not prefills:
            return None
        return self._pick(request, session_id, decodes, None if is_unified else prefills, apart)

    def _pick(
        self,
        request: Request,
        session_id: str | None,
        decodes: Sequence[Replica],
        prefills: Sequence[Replica] | None,
        apart: set[tuple[str, str]],
    ) -> Choice:
        """Return one decode and one prefill replica. `prefills`: None if `decodes` are unified."""
        prefix = prefix_keys(request.prompt, request.cache_salt)
        session = None if session_id is None else session_key(session_id)
        least = min(decodes, key=lambda r: (r.kv_share, r.queued_tokens, len(r.requests)))

        def is_near(replica: Replica, saved: int) -> bool:
            return replica.kv_share <= least.kv_share + min(saved / replica.capacity, KV_SKEW)

        saved = pages_for(len(request.prompt))  # at most: the prompt may repeat what the session had before
        near = [r for r in decodes if is_near(r, saved)]
        if prefills is None:
            decode = self._with_computed(prefix, near) or self._with_session(session, near) or least
            prefill = decode
        else:
            keeping = [r for r in decodes if r.hello.caches] if request.reads_cache else []
            received = with_prefix(self._received, prefix, keeping, is_near)
            decode = self._with_session(session, near) or received or least
            prefills = partners(decode, prefills, apart)
            prefill = self._with_computed(prefix, prefills) or min(prefills, key=lambda r: r.queued_tokens)
        tokens = len(request.prompt) - self._expected_hits(request, prefix, prefill)
        if session is not None:
            self._sessions.put(session, decode.id)
        for key in prefix:
            self._computed.put(key, prefill.id)
            self._received.put(key, decode.id)
        return Choice(decode, prefill, tokens)

    def _with_session(self, session: bytes | None, replicas: Sequence[Replica]) -> Replica | None:
        """Return the replica that served the session last, if it is among `replicas`. `session`: its key, if any."""
        last = self._sessions.get(session) if session is not None else None
        return next((r for r in replicas if r.id == last), None)

    def _with_computed(self, prefix: Sequence[bytes], replicas: Sequence[Replica]) -> Replica | None:
        """Return the replica that computed the longest prefix of the prompt last, within the skew limit.

        The limit is the length of that prefix: the replica saves it, if it still has its KV. The limit is never more
        than one step's tokens, because a guess may not cost more than a step.
        """
        least = min((r.queued_tokens for r in replicas), default=0)

        def is_near(replica: Replica, pages: int) -> bool:
            return replica.queued_tokens <= least + min(pages * PAGE, replica.hello.step_tokens)

        return with_prefix(self._computed, prefix, replicas, is_near)

    def _expected_hits(self, request: Request, prefix: Sequence[bytes], prefill: Replica) -> int:
        """Return the prompt tokens whose KV the prefill replica presumably has."""
        if not (prefill.hello.caches and request.reads_cache):
            return 0
        most = min(len(prefix), (len(request.prompt) - 1) // PAGE)
        known = (pages for pages in range(most, 0, -1) if self._computed.get(prefix[pages - 1]) == prefill.id)
        return next(known, 0) * PAGE


def with_prefix(
    recent: Recent, prefix: Sequence[bytes], replicas: Sequence[Replica], is_near: Callable[[Replica, int], bool]
) -> Replica | None:
    """Return the replica that had the longest prefix of a prompt last, if it may have it: is_near(replica, pages)."""
    by_id = {r.id: r for r in replicas}
    for pages in range(len(prefix), 0, -1):
        last = by_id.get(recent.get(prefix[pages - 1]) or "")
        if last is not None and is_near(last, pages):
            return last
    return None


def suitable(replicas: Sequence[Replica], tokens: int, suspects: Mapping[str, float]) -> list[Replica]:
    """Return the replicas whose KV can hold a request's `tokens`, except those where it has just failed.

    If no KV can hold them, any replica is suitable: it will answer with the error. `suspects`: by job, until when
    (time.monotonic()) the request avoids it.
    """
    now = time.monotonic()
    large_enough = [r for r in replicas if tokens <= r.hello.kv_tokens] or replicas
    return [r for r in large_enough if suspects.get(r.hello.job, now) <= now]


def with_room(replicas: Sequence[Replica], pages: int) -> list[Replica]:
    """Return the replicas that have KV for a request, and a place behind their batch. One without requests has both."""
    fitting = [r for r in replicas if not r.requests or r.kv_pages + pages <= r.capacity]
    return [r for r in fitting if len(r.requests) < BATCHES * r.hello.max_batch]


def with_time(replicas: Sequence[Replica]) -> list[Replica]:
    """Return the replicas that can soon begin another prompt."""
    return [r for r in replicas if len(r.prompts) < LEAST_AHEAD or r.queued_tokens < STEPS_AHEAD * r.hello.step_tokens]
