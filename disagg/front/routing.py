"""Routing: which decode replica and which prefill replica a request gets.

A request waits in the router until replicas have room. The least loaded replicas with room get it. The load is the
share of the KV in decode, and the queued tokens in prefill.

But requests are sticky. In decode, the replica that served the same `session_id` last is preferred, and then the one
whose cache has the longest prefix of the prompt. In prefill it is the one whose cache has that. The skew says how much
more loaded the preferred replica may be than the least loaded one. It is limited by the work that its cache saves.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from disagg.front.apart import Apart, partners
from disagg.front.recent import Recent
from disagg.front.replica import Replica
from disagg.page_digest import page_digests
from disagg.request import Request
from model.pages import PAGE, pages_for

BATCHES = 2  # requests per decode replica, in multiples of its batch, so that the next ones already have their KV
STEPS_AHEAD = 2  # a prefill replica gets prompts up to this many steps' tokens,
LEAST_AHEAD = 4  # or this many prompts, whichever is more
MOST_PAGES = 256  # of a prompt's prefix, whose digests are compared
KV_SKEW = 0.02  # the largest skew, as a share of the KV: with more, simulated loads are visibly less even


class Choice(NamedTuple):
    """Where a request goes. `tokens`: of the prompt, as many as prefill will presumably compute."""

    decode: Replica
    prefill: Replica
    tokens: int
    prefix: Sequence[int] = ()  # digests of the prompt's pages, which the replicas' caches will have

    def book(self, request: Request) -> None:
        """Enter the request in the replicas' books."""
        self.decode.add_request(request.uid, pages_for(request.most_tokens), self.prefix)
        self.prefill.add_prompt(request.uid, self.tokens, self.prefix)


class Routing:
    """Chooses replicas."""

    def __init__(self) -> None:
        self._sessions = Recent()  # decode replicas
        self.apart = Apart()

    def choose(
        self, request: Request, session_id: str | None, decodes: Sequence[Replica], prefills: Sequence[Replica]
    ) -> Choice | None:
        """Return a decode and a prefill replica that can begin the request now, or None.

        `decodes`: the suitable decode replicas, or unified ones, of which one is returned twice. The session's replica
        is remembered, so the request must go there.
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
        caches = any(r.hello.caches for r in (*decodes, *(prefills or ())))
        prefix = page_digests(request.prompt, request.cache_salt, MOST_PAGES) if caches else ()
        readable = prefix[: (len(request.prompt) - 1) // PAGE] if request.reads_cache else ()

        def load(replica: Replica) -> tuple[float, int, int]:
            return replica.kv_share, replica.queued_tokens, len(replica.requests)

        least = min(decodes, key=load)

        def is_near(replica: Replica, saved: int) -> bool:
            return replica.kv_share <= least.kv_share + min(saved / replica.capacity, KV_SKEW)

        saved = pages_for(len(request.prompt))  # at most: the prompt may repeat what the session had before
        near = [r for r in decodes if is_near(r, saved)]
        session = self._with_session(session_id, near)
        if prefills is None:
            decode = prefill = with_prefix(readable, near, queued, is_near_in_prefill(near)) or session or least
        else:
            decode = session or with_prefix(readable, decodes, load, is_near) or least
            prefills = partners(decode, prefills, apart)
            prefill = with_prefix(readable, prefills, queued, is_near_in_prefill(prefills)) or min(prefills, key=queued)
        if session_id is not None:
            self._sessions.put(session_id, decode.id)
        tokens = len(request.prompt) - prefill.kept.count(readable) * PAGE
        return Choice(decode, prefill, tokens, prefix)

    def _with_session(self, session_id: str | None, replicas: Sequence[Replica]) -> Replica | None:
        """Return the replica that served the session last, if it is among `replicas`."""
        last = self._sessions.get(session_id) if session_id is not None else None
        return next((r for r in replicas if r.id == last), None)


def queued(replica: Replica) -> int:
    return replica.queued_tokens


def is_near_in_prefill(replicas: Sequence[Replica]) -> Callable[[Replica, int], bool]:
    """Return whether a replica is within the skew limit: its queue may be longer by the tokens that it saves.

    But never by more than one step's tokens, because others may need the replica, too.
    """
    least = min(map(queued, replicas), default=0)

    def is_near(replica: Replica, pages: int) -> bool:
        return replica.queued_tokens <= least + min(pages * PAGE, replica.hello.step_tokens)

    return is_near


def with_prefix(
    prefix: Sequence[int],
    replicas: Sequence[Replica],
    load: Callable[[Replica], Any],
    is_near: Callable[[Replica, int], bool],
) -> Replica | None:
    """Return the replica whose cache has the longest prefix of a prompt, the least loaded one of several.

    It must be near: is_near(replica, pages), with the pages that the least loaded replica of all would lack.
    """
    counts = {r.id: r.kept.count(prefix) for r in replicas}
    ranked = sorted((r for r in replicas if counts[r.id]), key=lambda r: (-counts[r.id], load(r)))
    at_least = counts[min(replicas, key=load).id] if ranked else 0
    return next((r for r in ranked if is_near(r, max(0, counts[r.id] - at_least))), None)


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
