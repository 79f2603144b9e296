"""The router: pairs each request with a prefill and a decode replica, and puts its answer together.

It holds the tokenizer and the configuration only. Replicas may come before or after it, and in any order. Requests wait
here until a replica can begin them. The requests of a lost replica go on elsewhere: the prompt and the tokens so far
are the new prompt. A token depends only on what stands before it, the seed and the position, so the answer is the
same, up to rounding. A job where a request failed does not get it again for a while.
"""

import itertools
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from tokenizers import Tokenizer

from disagg.control.messages import Abort, Beat, Bye, Hello, Submit, ToRouter, Update, Updates, Withdraw, singly
from disagg.control.ports import RouterPort
from disagg.front.answer import INTERRUPTED, Answer
from disagg.front.fleet import Fleet, Replica
from disagg.front.metrics import Metrics
from disagg.front.parse import UserRequest
from disagg.front.source import Source
from disagg.front.tokenizer import TextStream
from disagg.request import Request
from model.kv_cache import pages_for

SUSPECT_S = 3.0  # how long a request keeps away from a job where it has failed, unless that is lost
REPLACEMENT_S = 30.0  # how long requests wait for a role that has been lost to come back
NOTICE_S = 10.0  # how long requests wait for a role that is missing before a line says so
NOTICE_FACTOR = 3  # the next line comes after so many times as long
ATTEMPTS = 3  # how often a request may begin
BATCHES = 2  # requests at a decode replica, in multiples of its batch: what joins next should have its KV there
STEPS_AHEAD = 2  # prompt tokens at a prefill replica, in multiples of what a step computes,
LEAST_AHEAD = 4  # or prompts, if those are long
MOST_WAITING = 1_000  # requests that are read before a replica can begin them


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
    prefill: Replica | None = None  # until the first token that it makes
    begun: bool = False  # where it is now
    suspects: dict[str, float] = field(default_factory=dict)  # jobs where it failed, and until when it avoids them

    def request(self, uid: int) -> Request:
        """What is left to do."""
        request, done = self.user.request, self.stream.token_ids
        left = request.max_tokens - len(done)
        return msgspec.structs.replace(request, uid=uid, prompt=request.prompt + done, max_tokens=left)


class Router:
    def __init__(
        self, port: RouterPort, tokenizer: Tokenizer, vocab_size: int, stopped: Callable[[], bool], expected: int = 0
    ):
        """`vocab_size` is the model's; `stopped()` turns true when the user wants to end early (Ctrl-C); `expected` as
        in `Fleet`."""
        self.port, self.tokenizer, self.vocab_size, self.stopped = port, tokenizer, vocab_size, stopped
        self.fleet = Fleet(port, self._lose, expected)
        self.metrics = Metrics()
        self._tracked: dict[int, Tracked] = {}  # by uid; a retry is a new uid, so late news of the old one are nobody's
        self._waiting: deque[int] = deque()  # uids without a replica
        self._uids = itertools.count(secrets.randbits(48))
        self._positions = itertools.count()
        self._open = False  # has there been anybody to serve a request yet?
        self._changes = 0  # of the fleet, that requests were withdrawn for
        self._short_of_replicas_since, self._notice_s = time.monotonic(), NOTICE_S

    def run(
        self,
        source: Source,
        deliver: Callable[[int, Answer], None],
        show: Callable[[int, str], None] = lambda position, piece: None,
    ) -> None:
        """Serve all requests of `source`, then send everybody home.

        `show(position, piece)` is called as text comes, `deliver(position, answer)` as each request ends; positions
        count the requests in their order.
        """
        self._deliver, self._show = deliver, show
        self.metrics.first_submit = self.metrics.last_finish = time.monotonic()
        try:
            while (self._tracked or not source.exhausted) and not self.stopped():
                came = self._read(source)
                self._listen(0 if came else 20)
                self.fleet.check(lambda: self._listen(0))
                self._look_for_missing_roles()
                self._assign()
            for uid in list(self._tracked):
                self._end(uid, "error", INTERRUPTED)
        finally:  # also if `deliver` fails: nobody must be left waiting
            self.fleet.farewell(self._listen)
            for role, stats in self.fleet.stats:
                self.metrics.replica_left(role, stats)

    def _read(self, source: Source) -> int:
        """Take requests in, so many that some wait here; how many."""
        wanted = MOST_WAITING - len(self._waiting)
        came = source.take(wanted) if wanted > 0 and not source.exhausted else []
        for user in came:
            stream = TextStream(self.tokenizer, user.stop)
            self._queue(Tracked(user, next(self._positions), stream, time.monotonic()))
        return len(came)

    def _queue(self, tracked: Tracked) -> None:
        uid = next(self._uids)
        self._tracked[uid] = tracked
        self._waiting.append(uid)

    def _listen(self, timeout_ms: int) -> None:
        for replica_id, message in self.port.poll(timeout_ms):
            self._handle(replica_id, message)

    def _handle(self, replica_id: str, message: ToRouter) -> None:
        match message:
            case Hello() | Beat() | Bye():
                self.fleet.hear(replica_id, message)
            case Updates(updates, begun, returned):
                for uid in begun:
                    if (tracked := self._served(uid, replica_id)) and not tracked.begun:
                        tracked.begun, tracked.attempts = True, tracked.attempts + 1
                for uid in returned:
                    if self._served(uid, replica_id):
                        self._queue(self._leave(uid))
                for update in singly(updates):
                    if self._served(update.uid, replica_id):
                        self._update(update)

    def _served(self, uid: int, replica_id: str) -> Tracked | None:
        """The request, if that replica serves it: nobody else's word of it counts."""
        tracked = self._tracked.get(uid)
        serves = tracked is not None and tracked.decode is not None and tracked.decode.id == replica_id
        return tracked if serves else None

    def _assign(self) -> None:
        """Give waiting requests, in their order, to the emptiest replicas that can begin them: by KV for decode, by
        prompt tokens ahead for prefill."""
        able, prefills = self.fleet.able_to_serve(), self.fleet.in_role("prefill")
        if self._changes != self.fleet.changes:  # a replica came or went: what has not begun may have a better place
            self._changes = self.fleet.changes
            self._withdraw(able)
        held = []  # those that nobody who is free should have now
        while self._waiting and able and self.fleet.expected <= 0:
            uid = self._waiting.popleft()
            tracked = self._tracked[uid]
            request = tracked.request(uid)
            suitable = self._suitable(tracked, able, request.most_tokens)
            sources = self._suitable(tracked, prefills, len(request.prompt))
            if pair := self._choose(request, suitable, sources):
                self._submit(tracked, request, *pair)
                continue
            held.append(uid)
            if suitable and (sources or suitable[0].hello.role == "unified"):
                break  # it waits for room, which those behind it must not take
        self._waiting.extendleft(reversed(held))

    def _submit(self, tracked: Tracked, request: Request, decode: Replica, prefill: Replica) -> None:
        if not self._open:
            self._start_clocks()
        tracked.decode, tracked.prefill, tracked.begun = decode, prefill, False
        decode.requests.add(request.uid)
        decode.pages += pages_for(request.most_tokens)
        prefill.prompts[request.uid] = len(request.prompt)
        self.port.send(decode.id, Submit(request, prefill.hello.members if prefill is not decode else None))

    def _choose(
        self, request: Request, decodes: list[Replica], prefills: list[Replica]
    ) -> tuple[Replica, Replica] | None:
        """A decode and a prefill replica that can begin it now; twice the same, if that is unified."""
        pages = pages_for(request.most_tokens)
        decodes = [r for r in decodes if not r.requests or r.pages + pages <= r.capacity]
        decodes = [r for r in decodes if len(r.requests) < BATCHES * r.hello.max_batch]
        if decodes and decodes[0].hello.role == "unified":
            decodes = prefills = self._with_time(decodes)
        else:
            prefills = self._with_time(prefills)
        if not decodes or not prefills:
            return None
        decode = min(decodes, key=lambda r: r.pages / r.capacity)
        return decode, decode if prefills is decodes else min(prefills, key=lambda r: r.prompt_tokens)

    def _with_time(self, replicas: list[Replica]) -> list[Replica]:
        """Those that come to another prompt soon."""
        return [
            r for r in replicas if len(r.prompts) < LEAST_AHEAD or r.prompt_tokens < STEPS_AHEAD * r.hello.step_tokens
        ]

    def _suitable(self, tracked: Tracked, replicas: list[Replica], tokens: int) -> list[Replica]:
        """Those that a request should go to: whose KV can hold its `tokens` (if none can: any, which says so), and
        where it has not just failed."""
        now = time.monotonic()
        replicas = [r for r in replicas if tokens <= r.hello.kv_tokens] or replicas
        return [r for r in replicas if tracked.suspects.get(r.hello.job, now) <= now]

    def _withdraw(self, replicas: list[Replica]) -> None:
        for replica in replicas:
            if uids := [uid for uid in replica.requests if not self._tracked[uid].begun]:
                self.port.send(replica.id, Withdraw(uids))

    def _start_clocks(self) -> None:
        """Latencies count from when there is somebody to serve: starting the jobs is not the requests' wait."""
        self._open, now = True, time.monotonic()
        self.metrics.first_submit = now
        for tracked in self._tracked.values():
            tracked.submitted = now

    def _look_for_missing_roles(self) -> None:
        """Before anybody came, wait for ever, and say so. Once a role is lost, wait REPLACEMENT_S for another."""
        now = time.monotonic()
        short_s = now - self._short_of_replicas_since
        needed = ("unified",) if "unified" in self.fleet.roles else ("prefill", "decode")
        roles = [role for role in needed if not self.fleet.in_role(role)]
        if self.fleet.able_to_serve():
            self._short_of_replicas_since, self._notice_s = now, NOTICE_S
        elif self._open and short_s > REPLACEMENT_S:
            missing = " and no ".join(roles)
            for uid in self._waiting:
                self._end(
                    uid, "error", f"no {missing} replica left to serve it, and none came in {REPLACEMENT_S:.0f} s"
                )
            self._waiting.clear()
        elif self._waiting and self.fleet.expected <= 0 and short_s > self._notice_s:
            count, self._notice_s = len(self._waiting), NOTICE_FACTOR * self._notice_s
            missing = " and a ".join(roles)
            print(f"router: {count} requests still waiting for a {missing} replica", file=sys.stderr, flush=True)

    def _update(self, update: Update) -> None:
        tracked, now = self._tracked[update.uid], time.monotonic()
        if update.error is not None:
            if tracked.prefill is not None and not tracked.begun:  # refused, though its prefill replica is here
                tracked.attempts += tracked.prefill.id in self.fleet.replicas
            if update.retry and tracked.prefill is not None and tracked.attempts < ATTEMPTS:
                self.fleet.ping_soon()  # has its prefill replica died? to be known before the request goes out again
                self._retry(update.uid, tracked.prefill)
            else:
                self._end(update.uid, "error", update.error)
            return
        for i, token in enumerate(update.tokens):
            if token >= self.vocab_size:
                self.port.send(tracked.decode.id, Abort(update.uid))
                error = f"the replica serving it made token {token}; the model's vocabulary has {self.vocab_size}"
                self._end(update.uid, "error", error)
                return
            self._prompt_done(update.uid, tracked)
            if tracked.latest is None:
                self.metrics.ttft.append(now - tracked.submitted)
                tracked.first = now
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

    def _prompt_done(self, uid: int, tracked: Tracked) -> None:
        if tracked.prefill is not None:
            del tracked.prefill.prompts[uid]
            tracked.prefill = None

    def _leave(self, uid: int) -> Tracked:
        """Nobody serves this uid any more."""
        tracked = self._tracked.pop(uid)
        self._prompt_done(uid, tracked)
        if tracked.decode is not None:
            tracked.decode.requests.discard(uid)
            tracked.decode.pages -= pages_for(tracked.user.request.most_tokens)
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

    def _lose(self, lost: Replica, how: str) -> None:
        """The fleet has given a replica up: its requests go elsewhere."""
        if self.fleet.leaving:  # what is still here then cannot be delivered
            return
        role = lost.hello.role
        is_final = role == "unified" and not self.fleet.may_return(lost)  # no other job serves what it had
        if not is_final:
            count = sum(lost in (tracked.decode, tracked.prefill) for tracked in self._tracked.values())
            print(f"router: a {role} replica {how}; {count} requests were on it", file=sys.stderr, flush=True)
        for uid in list(lost.requests):
            if is_final or self._tracked[uid].attempts >= ATTEMPTS:
                error = INTERRUPTED if self.stopped() else f"the {role} replica serving it {how}"
                self._end(uid, "error", error)
            else:
                self._retry(uid, lost)
