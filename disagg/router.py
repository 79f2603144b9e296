"""The router: pairs each request with a prefill and a decode replica, and puts its answer together.

It holds the tokenizer and the configuration only. Replicas may come before or after it, and in any order; requests
wait until there is one to serve them. A replica that dies takes its requests with it: those that have no token yet
are tried once more elsewhere, the others end with an error. The other replicas of its job die with it, each as it
notices: they get no more requests, and what has failed at one is not given to the next.
"""

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tokenizers import Tokenizer

from disagg.control import Abort, Bye, Finish, Gone, Hello, Ping, RouterPort, Submit, ToRouter, Update, Updates, singly
from disagg.metrics import Metrics
from disagg.request import UserRequest
from disagg.source import Source
from disagg.tokenizer import TextStream

PING_S = 1.0
SUSPECT_S = 3.0  # how long a request keeps away from a job where it has failed, unless that dies
REPLACEMENT_S = 30.0  # how long requests wait for a role that has died out to come back
FAREWELL_S = 15.0  # how long to wait for the replicas' last words
NOTICE_S = 10.0  # how long requests wait for a role that is missing before a line says so
NOTICE_FACTOR = 3  # the next line comes after so many times as long
INTERRUPTED = "interrupted"  # the error of a request that the user's Ctrl-C ended
ATTEMPTS = 2
MOST_TRACKED = 2_000  # requests that have been taken from the source and have no answer yet
QUEUE_FACTOR = 2  # requests at a decode replica, in multiples of its batch; the rest wait here, for whoever is free


@dataclass(eq=False)
class Replica:
    """Some ranks that serve together."""

    id: str
    hello: Hello
    reserved: int = 0  # tokens of KV that its requests may come to hold
    requests: set[int] = field(default_factory=set)
    prompts: int = 0  # prefill: prompt tokens without a first token yet


@dataclass(eq=False)
class Tracked:
    """A request on its way."""

    user: UserRequest
    position: int  # in the input
    stream: TextStream
    submitted: float
    logprobs: list = field(default_factory=list)
    first: float | None = None
    latest: float | None = None
    attempts: int = 0
    decode: Replica | None = None
    prefill: Replica | None = None
    suspects: dict[str, float] = field(default_factory=dict)  # jobs where it failed, and until when it avoids them


@dataclass(frozen=True)
class Answer:
    """One line of output."""

    id: Any
    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    latency_s: float | None
    logprobs: list | None = None
    error: str | None = None

    def as_dict(self) -> dict:
        optional = {k: v for k in ("logprobs", "error") if (v := getattr(self, k)) is not None}
        return {k: v for k, v in vars(self).items() if k not in ("logprobs", "error")} | optional


def refusal(id: Any, error: str) -> Answer:
    """The answer to a line that never became a request."""
    return Answer(id, "", [], "error", 0, 0, None, None, error=error)


class Router:
    def __init__(self, port: RouterPort, tokenizer: Tokenizer, stopped: Callable[[], bool], expected: int = 0):
        """`stopped()` turns true when the user wants to end early (Ctrl-C). `expected`: replicas that will surely
        come, and are waited for even if there is nothing to serve (those of the same job)."""
        self.port, self.tokenizer, self.stopped = port, tokenizer, stopped
        self.replicas: dict[str, Replica] = {}
        self.metrics = Metrics()
        self._tracked: dict[int, Tracked] = {}  # by uid; a retry is a new uid, so late news of the old one are nobody's
        self._waiting: deque[int] = deque()  # uids without a replica
        self._uids, self._positions = itertools.count(), itertools.count()
        self._next_ping = 0.0
        self._expected, self._leaving = expected, False
        self._ending: set[str] = set()  # jobs that have lost a replica
        self._kv: str | None = None  # what the first replica hands over; all must be alike
        self._open = False  # has there been anybody to serve a request yet?
        self._short_of_replicas_since, self._notice_s = time.monotonic(), NOTICE_S

    def run(
        self,
        source: Source,
        deliver: Callable[[int, Answer], None],
        show: Callable[[int, str], None] = lambda position, piece: None,
    ) -> None:
        """Serve all requests of `source`, then send everybody home. Its requests have the positions 0, 1, 2 ...

        `show(position, piece)` is called as text comes, `deliver(position, answer)` as each request ends.
        """
        self._deliver, self._show = deliver, show
        self.metrics.first_submit = self.metrics.last_finish = time.monotonic()
        try:
            while not self.stopped():
                taken = self._take(source)
                if not self._tracked and source.exhausted:
                    break
                self._listen(0 if taken else 20)
                self._look_for_missing_roles()
                self._ping()
                self._assign()
            for uid in list(self._tracked):
                self._end(uid, "error", INTERRUPTED)
        finally:  # also if `deliver` fails: nobody must be left waiting
            self._farewell()

    def _take(self, source: Source) -> int:
        """Requests from the source, as long as there are few; how many."""
        room = MOST_TRACKED - len(self._tracked)
        users = source.take(room) if room > 0 and not source.exhausted else []
        for user in users:
            stream = TextStream(self.tokenizer, user.stop)
            self._queue(Tracked(user, next(self._positions), stream, time.monotonic()))
        return len(users)

    def _queue(self, tracked: Tracked) -> None:
        uid = next(self._uids)
        self._tracked[uid] = tracked
        self._waiting.append(uid)

    def _listen(self, timeout_ms: int) -> None:
        for replica_id, message in self.port.poll(timeout_ms):
            self._handle(replica_id, message)

    def _handle(self, replica_id: str, message: ToRouter) -> None:
        match message:
            case Hello():
                self._welcome(replica_id, message)
            case Updates(updates):
                for update in singly(updates):
                    if update.uid in self._tracked:
                        self._update(update)
            case Bye(stats):
                if replica := self.replicas.pop(replica_id, None):
                    self.metrics.replica_left(replica.hello.role, stats)
                    self._lose(replica, "was stopped")

    def _welcome(self, replica_id: str, hello: Hello) -> None:
        self._expected -= 1
        self._kv = self._kv or hello.kv
        if hello.kv != self._kv:
            error = f"refused: its KV is {hello.kv}; the others' is {self._kv} (same --model and --dtype everywhere)"
            print(f"router: a {hello.role} replica was {error}", file=sys.stderr)
            self.port.send(replica_id, Finish(error))
            return
        self.replicas[replica_id] = Replica(replica_id, hello)
        if hello.role != "unified":
            print(f"router: a {hello.role} replica joined, ranks: {len(hello.members)}", file=sys.stderr, flush=True)
        if self._leaving:
            self.port.send(replica_id, Finish())

    def _assign(self) -> None:
        """Give waiting requests to the emptiest replicas: by KV for decode, by prompt tokens ahead for prefill."""
        held = []  # those that nobody who is free should have now
        while self._waiting and (free := self._free()):
            uid = self._waiting.popleft()
            tracked = self._tracked[uid]
            pair = self._choose(tracked, free)
            if pair is None:
                held.append(uid)
                continue
            if not self._open:
                self._start_clocks()
            request = msgspec.structs.replace(tracked.user.request, uid=uid)
            decode, prefill = pair
            tracked.decode, tracked.prefill, tracked.attempts = decode, prefill, tracked.attempts + 1
            decode.requests.add(uid)
            decode.reserved += request.most_tokens
            if prefill is not None:
                prefill.prompts += len(request.prompt)
            self.port.send(decode.id, Submit(request, prefill.hello.members if prefill is not None else None))
        self._waiting.extendleft(reversed(held))

    def _free(self) -> list[Replica]:
        return [r for r in self._able_to_serve() if len(r.requests) < QUEUE_FACTOR * r.hello.max_batch]

    def _choose(self, tracked: Tracked, free: list[Replica]) -> tuple[Replica, Replica | None] | None:
        """A decode (or unified) replica of the `free` ones, and a prefill replica for a decode one."""
        request = tracked.user.request
        decodes = [r for r in self._suitable(tracked, self._able_to_serve(), request.most_tokens) if r in free]
        if not decodes:
            return None
        decode = min(decodes, key=lambda r: r.reserved / r.hello.kv_tokens)
        if decode.hello.role == "unified":
            return decode, None
        prefills = self._suitable(tracked, self._in_role("prefill"), len(request.prompt))
        return (decode, min(prefills, key=lambda r: r.prompts)) if prefills else None

    def _suitable(self, tracked: Tracked, replicas: list[Replica], tokens: int) -> list[Replica]:
        """Those that a request should go to: whose KV can hold its `tokens` (if none can: any, which says so), and
        where it has not just failed."""
        now = time.monotonic()
        replicas = [r for r in replicas if tokens <= r.hello.kv_tokens] or replicas
        return [r for r in replicas if tracked.suspects.get(r.hello.job, now) <= now]

    def _in_role(self, role: str) -> list[Replica]:
        return [r for r in self.replicas.values() if r.hello.role == role and r.hello.job not in self._ending]

    def _able_to_serve(self) -> list[Replica]:
        """Where a request can go: unified replicas, and decode ones as long as there is anybody to prefill."""
        return self._in_role("unified") + (self._in_role("decode") if self._in_role("prefill") else [])

    def _start_clocks(self) -> None:
        """Latencies count from when there is somebody to serve: starting the jobs is not the requests' wait."""
        self._open, now = True, time.monotonic()
        self.metrics.first_submit = now
        for tracked in self._tracked.values():
            tracked.submitted = now

    def _look_for_missing_roles(self) -> None:
        """Before anybody came, wait for ever, and say so. Once a role has died out, wait REPLACEMENT_S for another."""
        now = time.monotonic()
        short_s = now - self._short_of_replicas_since
        roles = [role for role in ("prefill", "decode") if not self._in_role(role)]
        if self._able_to_serve():
            self._short_of_replicas_since, self._notice_s = now, NOTICE_S
        elif self._open and short_s > REPLACEMENT_S:
            missing = " and no ".join(roles)
            for uid in self._waiting:
                self._end(
                    uid, "error", f"no {missing} replica left to serve it, and none came in {REPLACEMENT_S:.0f} s"
                )
            self._waiting.clear()
        elif self._waiting and self._expected <= 0 and short_s > self._notice_s:
            count, self._notice_s = len(self._waiting), NOTICE_FACTOR * self._notice_s
            missing = " and a ".join(roles)
            print(f"router: {count} requests still waiting for a {missing} replica", file=sys.stderr, flush=True)

    def _update(self, update: Update) -> None:
        tracked, now = self._tracked[update.uid], time.monotonic()
        if update.error is not None:
            if update.retry and tracked.prefill is not None and tracked.attempts < ATTEMPTS:
                self._next_ping = 0.0  # has its prefill replica died? to be known before the request goes out again
                self._retry(update.uid, tracked.prefill)
            else:
                self._end(update.uid, "error", update.error)
            return
        for i, token in enumerate(update.tokens):
            if tracked.latest is None:
                self.metrics.ttft.append(now - tracked.submitted)
                tracked.first = now
                self._prompt_done(tracked)
                if update.parts is not None:
                    self.metrics.parts.append(update.parts)
            else:
                self.metrics.inter_token.append(now - tracked.latest)
            tracked.latest = now
            tracked.logprobs.extend(update.logprobs[i : i + 1])
            shown = len(tracked.stream.text)
            stopped = tracked.stream.push(token)
            self._show(tracked.position, tracked.stream.text[shown:])
            if stopped:
                self.port.send(tracked.decode.id, Abort(update.uid))
                self._end(update.uid, "stop")
                return
        if update.finish:
            shown = len(tracked.stream.text)
            tracked.stream.close()
            self._show(tracked.position, tracked.stream.text[shown:])
            self._end(update.uid, update.finish)

    def _prompt_done(self, tracked: Tracked) -> None:
        if tracked.prefill is not None:
            tracked.prefill.prompts -= len(tracked.user.request.prompt)
            tracked.prefill = None

    def _leave(self, uid: int) -> Tracked:
        """Nobody serves this uid any more."""
        tracked = self._tracked.pop(uid)
        self._prompt_done(tracked)
        if tracked.decode is not None:
            tracked.decode.requests.discard(uid)
            tracked.decode.reserved -= tracked.user.request.most_tokens
        tracked.decode = None
        return tracked

    def _retry(self, uid: int, failed: Replica) -> None:
        self.metrics.retries += 1
        tracked = self._leave(uid)
        tracked.suspects[failed.hello.job] = time.monotonic() + SUSPECT_S
        self._queue(tracked)

    def _end(self, uid: int, reason: str, error: str | None = None) -> None:
        tracked, now = self._leave(uid), time.monotonic()
        request, stream = tracked.user.request, tracked.stream
        self.metrics.finished[reason] += 1
        self.metrics.prompt_tokens += len(request.prompt)
        self.metrics.generated_tokens += len(stream.token_ids)
        self.metrics.last_finish = now
        answer = Answer(
            id=tracked.user.id,
            text=stream.text,
            token_ids=stream.token_ids,
            finish_reason=reason,
            prompt_tokens=len(request.prompt),
            completion_tokens=len(stream.token_ids),
            ttft_s=None if tracked.first is None else round(tracked.first - tracked.submitted, 4),
            latency_s=round(now - tracked.submitted, 4),
            logprobs=tracked.logprobs if request.logprobs else None,
            error=error,
        )
        self._deliver(tracked.position, answer)

    def _ping(self) -> None:
        """Sending is how the router learns that a replica has died."""
        now = time.monotonic()
        if now < self._next_ping:
            return
        self._next_ping = now + PING_S
        for replica in list(self.replicas.values()):
            if not self.port.send(replica.id, Ping()):
                self._listen(0)  # what it said before it left is still to be read: its Bye, perhaps
                if self.replicas.pop(replica.id, None) is not None:
                    self._lose(replica, "died")

    def _lose(self, lost: Replica, how: str) -> None:
        self._ending.add(lost.hello.job)
        if self._leaving:  # what is still here then cannot be delivered
            return
        if lost.hello.role != "unified":
            count = sum(lost in (tracked.decode, tracked.prefill) for tracked in self._tracked.values())
            had = f"{count} requests were on it"
            print(f"router: a {lost.hello.role} replica {how}; {had}", file=sys.stderr, flush=True)
        for replica in self.replicas.values():
            self.port.send(replica.id, Gone([member.id for member in lost.hello.members]))
        for uid in list(lost.requests):
            tracked = self._tracked[uid]
            if tracked.stream.token_ids or tracked.attempts >= ATTEMPTS:
                error = f"the {lost.hello.role} replica serving it {how}"
                self._end(uid, "error", INTERRUPTED if self.stopped() else error)
            else:
                self._retry(uid, lost)

    def _farewell(self) -> None:
        self._leaving = True
        for replica in self.replicas.values():
            self.port.send(replica.id, Finish())
        deadline = time.monotonic() + FAREWELL_S
        while (self.replicas or self._expected > 0) and time.monotonic() < deadline:
            self._listen(50)
            self._ping()
