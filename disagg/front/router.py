"""The router: pairs each request with a prefill and a decode replica, and assembles its answer.

It holds only the tokenizer and the configuration. Replicas may start before or after it, in any order. Requests wait
here until a replica can begin them. The requests of a lost replica continue elsewhere: the prompt plus the tokens so
far become the new prompt. A token depends only on the text before it, the seed and the position, so the answer is the
same, up to rounding. A job where a request failed does not get it again for a while.

A router that drains takes no request any more, and ends when those that it has are answered.
"""

import itertools
import secrets
import sys
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection

from tokenizers import Tokenizer

from disagg.control.messages import (
    Abort,
    Beat,
    Bye,
    Hello,
    Kept,
    Parts,
    Stats,
    Submit,
    Tokens,
    ToRouter,
    Update,
    Updates,
    Withdraw,
)
from disagg.control.ports import RouterPort
from disagg.front.answer import INTERRUPTED
from disagg.front.client import Client
from disagg.front.expert_rows import NO_EXPERTS, RowShape
from disagg.front.fleet import Fleet
from disagg.front.metrics import Metrics
from disagg.front.missing_roles import MissingRoles
from disagg.front.parse import UserRequest
from disagg.front.progress import Progress
from disagg.front.replica import Replica
from disagg.front.routing import Choice, Routing, suitable
from disagg.front.source import Source
from disagg.front.tracked import Tracked
from disagg.front.trials import DEATHS, Trials
from disagg.request import Request

SUSPECT_S = 3.0  # how long a request avoids a job where it has failed
ATTEMPTS = 5  # how often a request may begin
MOST_WAITING = 1_000  # requests that are read before a replica can begin them


class Router:
    def __init__(
        self,
        port: RouterPort,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        stopped: Callable[[], bool],
        expected: int = 0,
        expert_shape: RowShape = NO_EXPERTS,
        log_interval: float = 0.0,
        drains: Callable[[], bool] = lambda: False,
        config: str = "",
    ) -> None:
        """`tokenizer`: None if the model has none; then answers have no text. `vocab_size`: the model's.

        `stopped()`: did the user ask to end early (Ctrl-C)? `expected`, `config`: as in `Fleet`. `expert_shape`: the
        model's. `log_interval`: as in `Progress`. `drains()`: shall it take no requests any more?
        """
        self.expert_shape = expert_shape
        self.port, self.tokenizer, self.vocab_size, self.stopped = port, tokenizer, vocab_size, stopped
        self.fleet = Fleet(port, self._lose, expected, config)
        self.metrics = Metrics(self.fleet.spreads)
        self._progress = Progress(log_interval)
        self._routing, self._trials, self._missing = Routing(), Trials(), MissingRoles(self.fleet)
        self._drains, self.draining = drains, False
        self._tracked: dict[int, Tracked] = {}  # by uid; a retry gets a new uid, so late news of the old one is ignored
        self._waiting: deque[Tracked] = deque()  # without a replica, in the order of submission
        self._uids, self._numbers = itertools.count(secrets.randbits(48)), itertools.count()
        self._gaps: list[float] = []  # of this message: times between two updates of a request, in seconds
        self._open = False  # has any request been given to a replica yet?
        self._changes = 0  # the fleet's count of changes when requests were last withdrawn

    def run(self, source: Source) -> None:
        """Serve all requests of `source`, then end all replicas."""
        self.metrics.begin(time.monotonic())
        try:
            while (self._tracked or not (source.exhausted or self.draining)) and not self.stopped():
                self.turn(source, 20)
            self.interrupt()
        finally:  # also if a client fails: no replica must be left waiting
            self.close()

    def turn(self, source: Source | None, timeout_ms: int) -> None:
        """Do what is due: take requests from the source, handle messages, and hand out waiting requests.

        Without a new request it waits up to `timeout_ms` for a message. `source`: None if all requests are submitted.
        """
        self._look_for_drain()
        came = self._read(source) if source is not None and not self.draining else 0
        self._listen(0 if came else timeout_ms)
        self.fleet.check(lambda: self._listen(0))
        self._look_for_missing_roles()
        self._assign()
        self._progress.tick(self.fleet.replicas.values(), self.tracked, self.metrics.finished.total())

    def submit(self, user: UserRequest, client: Client) -> Tracked:
        """Take a request. The next turns serve it."""
        number = next(self._numbers)
        tracked = Tracked.new(user, client, self.tokenizer, self.vocab_size, self.expert_shape, number)
        self._queue(tracked)
        return tracked

    def cancel(self, tracked: Tracked) -> None:
        """Forget a request whose client has gone, and stop it where it runs. Without effect if it has its answer."""
        if self._tracked.get(tracked.uid) is not tracked:
            return
        if tracked.decode is None:
            self._waiting.remove(tracked)
        else:
            self.port.send(tracked.decode.id, Abort(tracked.uid))
        self._leave(tracked.uid)
        self._count("cancelled", tracked)

    def interrupt(self) -> None:
        """End all requests, because the user wants to stop."""
        for uid in list(self._tracked):
            self._end(uid, "error", INTERRUPTED)
        self._waiting.clear()

    def close(self) -> None:
        """End all replicas, and wait for their statistics."""
        self.fleet.farewell(self._listen)
        for role, stats in self.fleet.stats:
            self.metrics.replica_left(role, stats)
        self.metrics.refusals = self.port.refusals.count

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def tracked(self) -> Collection[Tracked]:
        """The requests without their answer yet."""
        return self._tracked.values()

    @property
    def has_drained(self) -> bool:
        return self.draining and not self._tracked

    def _look_for_drain(self) -> None:
        if not self.draining and (self._drains() or self.fleet.unified_drains):
            self.draining = True
            print(f"router: takes no more requests; {len(self._tracked)} are unfinished", file=sys.stderr, flush=True)

    def _read(self, source: Source) -> int:
        """Take requests from the source, so that up to MOST_WAITING wait here. Returns how many were taken."""
        wanted = MOST_WAITING - len(self._waiting)
        came = source.take(wanted) if wanted > 0 and not source.exhausted else []
        for user, client in came:
            self.submit(user, client)
        return len(came)

    def _queue(self, tracked: Tracked) -> None:
        """Let it wait in the order of submission: a request that moves was there before those that have not begun."""
        tracked.uid = next(self._uids)
        self._tracked[tracked.uid] = tracked
        insort(self._waiting, tracked, key=lambda other: other.number)

    def _listen(self, timeout_ms: int) -> None:
        for replica_id, message in self.port.poll(timeout_ms):
            self._handle(replica_id, message)

    def _handle(self, replica_id: str, message: ToRouter) -> None:
        match message:
            case Hello() | Beat() | Stats() | Kept() | Bye():
                self.fleet.hear(replica_id, message)
            case Updates(updates, begun, returned):
                for uid in begun:
                    if (tracked := self._served(uid, replica_id)) and not tracked.begun:
                        tracked.begun, tracked.attempts = True, tracked.attempts + 1
                for uid in returned:
                    if tracked := self._served(uid, replica_id):
                        tracked.attempts -= tracked.begun  # not its own failure
                        self._queue(self._leave(uid))
                now = time.monotonic()
                for update in updates:
                    if isinstance(update, Tokens):
                        for uid, token in update.by_uid.items():
                            if tracked := self._served(uid, replica_id):
                                self._add(tracked, [token], [], now)
                    elif tracked := self._served(update.uid, replica_id):
                        self._update(tracked, update, now)
                self.metrics.next_tokens(self._gaps)
                self._gaps.clear()

    def _served(self, uid: int, replica_id: str) -> Tracked | None:
        """Return the request if that replica serves it. News from other replicas is ignored."""
        tracked = self._tracked.get(uid)
        serves = tracked is not None and tracked.decode is not None and tracked.decode.id == replica_id
        return tracked if serves else None

    def _assign(self) -> None:
        """Give waiting requests, in order, to replicas that can begin them."""
        if not self._waiting and self._changes == self.fleet.changes:
            return
        able, prefills = self.fleet.able_to_serve(), self.fleet.in_role("prefill")
        if self._changes != self.fleet.changes:  # a replica came or went: requests that have not begun may move
            self._changes = self.fleet.changes
            self._withdraw(list(self.fleet.replicas.values()))
        unassigned = []  # what stays here for now
        kv_tokens = max((replica.hello.kv_tokens for replica in able), default=0)
        while self._waiting and able and self.fleet.expected <= 0:
            tracked = self._waiting.popleft()
            request = tracked.request(tracked.uid, kv_tokens)
            decodes = suitable(able, request.most_tokens, tracked.suspects)
            sources = suitable(prefills, len(request.prompt), tracked.suspects)
            decodes, sources = (self._trials.places(tracked, replicas) for replicas in (decodes, sources))
            if choice := self._routing.choose(request, tracked.user.session_id, decodes, sources):
                self._submit(tracked, request, choice)
                continue
            unassigned.append(tracked)
            if decodes and (sources or decodes[0].hello.role == "unified"):
                break  # it waits for room, which later requests must not take
        self._waiting.extendleft(reversed(unassigned))

    def _submit(self, tracked: Tracked, request: Request, choice: Choice) -> None:
        if not self._open:
            self._start_clocks()
        decode, prefill = choice.decode, choice.prefill
        tracked.decode, tracked.prefill, tracked.begun = decode, prefill, False
        if decode.hello.drafts and tracked.accepted_tokens is None:
            tracked.accepted_tokens = 0
        tracked.path = prefill.id, decode.id
        tracked.restart()
        choice.book(request)
        self._trials.begin(tracked)
        self.port.send(decode.id, Submit(request, prefill.hello.members if prefill is not decode else None))

    def _withdraw(self, replicas: list[Replica]) -> None:
        """Take back the requests that have not begun."""
        for replica in replicas:
            if uids := [uid for uid in replica.requests if not self._tracked[uid].begun]:
                self.port.send(replica.id, Withdraw(uids))

    def _start_clocks(self) -> None:
        """Restart all clocks when the first replica can serve: latencies do not include the start of the jobs."""
        self._open, now = True, time.monotonic()
        self.metrics.begin(now)
        for tracked in self._tracked.values():
            tracked.submitted = now

    @property
    def unavailable(self) -> list[str]:
        """The missing roles, unless a replacement may still come in time."""
        return self.fleet.missing_roles() if self._missing.is_late or not self._open else []

    def _look_for_missing_roles(self) -> None:
        """End waiting requests if a role has been missing for too long."""
        if error := self._missing.look(len(self._waiting), self._open):
            for tracked in self._waiting:
                self._end(tracked.uid, "error", error)
            self._waiting.clear()

    def _update(self, tracked: Tracked, update: Update, now: float) -> None:
        if update.error is not None:
            self._fail(update, tracked)
            return
        try:
            tracked.take(update)
        except ValueError as error:
            self._refuse(tracked, str(error))
            return
        if self._add(tracked, update.tokens, update.logprobs, now, update.parts) and update.finish:
            self._end(update.uid, update.finish)

    def _add(self, tracked: Tracked, tokens: list[int], logprobs: list, now: float, parts: Parts | None = None) -> bool:
        """Add tokens that came together. `logprobs`: one list per token, or none.

        Returns False if that has ended the request.
        """
        assert tracked.decode is not None  # see `_served`
        if tokens and tracked.latest is None:
            try:
                tracked.prompt_rows.check_complete()
            except ValueError as error:
                self._refuse(tracked, str(error))
                return False
        for i, token in enumerate(tokens):
            if token >= self.vocab_size:
                self._refuse(tracked, f"made token {token}; the model's vocabulary has {self.vocab_size}")
                return False
            self._prompt_done(tracked)
            if tracked.latest is None:
                self.metrics.first_token(now - tracked.submitted, parts)
                tracked.first, tracked.parts = now, parts
            elif i == 0:
                self._gaps.append(now - tracked.latest)
            tracked.latest = now
            if tracked.push(token, logprobs[i : i + 1]):
                tracked.accept(i + 1 - len(tokens))
                self.port.send(tracked.decode.id, Abort(tracked.uid))
                self._end(tracked.uid, "stop")
                return False
        self._trials.progress(tracked)
        return True

    def _refuse(self, tracked: Tracked, what: str) -> None:
        """End a request whose replica did `what`, which no replica with this model may do."""
        assert tracked.decode is not None  # see `_served`
        self.port.send(tracked.decode.id, Abort(tracked.uid))
        self._end(tracked.uid, "error", f"the replica serving it {what}")

    def _fail(self, update: Update, tracked: Tracked) -> None:
        """Try a failed request again elsewhere, or end it with its error.

        A request has ATTEMPTS attempts. One that fails before it begins counts, unless its prefill replica has left.
        """
        prefill = tracked.prefill
        if prefill is not None and not tracked.begun and prefill.id in self.fleet.replicas:
            tracked.attempts += 1
        if prefill is not None and update.retry and tracked.attempts < ATTEMPTS:
            self.fleet.ping_soon()  # its prefill replica may have died: find out before the request is sent again
            if update.link_down and tracked.decode is not None:
                self._routing.apart.add(tracked.decode, prefill)
            self._retry(update.uid, prefill)
        else:
            self._end(update.uid, "error", update.error, refused=not update.retry)

    def _prompt_done(self, tracked: Tracked) -> None:
        if tracked.prefill is not None:
            tracked.prefill.end_prompt(tracked.uid)
            tracked.prefill = None

    def _leave(self, uid: int) -> Tracked:
        """Take the request from its replicas. Its uid is not valid any more."""
        tracked = self._tracked.pop(uid)
        self._prompt_done(tracked)
        self._trials.end(tracked)
        if tracked.decode is not None:
            tracked.decode.end_request(uid)
        tracked.decode = None
        return tracked

    def _retry(self, uid: int, failed: Replica, is_lost: bool = False) -> None:
        self.metrics.retried(is_lost)
        tracked = self._leave(uid)
        tracked.suspects[failed.hello.job] = time.monotonic() + SUSPECT_S
        self._queue(tracked)

    def _end(self, uid: int, reason: str, error: str | None = None, refused: bool = False) -> None:
        tracked, rows = self._leave(uid), {}
        tracked.close()
        if error is None:
            try:
                rows = tracked.rows()
            except ValueError as wrong:
                reason, error = "error", f"the replica serving it {wrong}"
        self._count(reason, tracked)
        tracked.client.deliver(tracked.answer(reason, error, refused, self.tokenizer is not None, rows))

    def _count(self, reason: str, tracked: Tracked) -> None:
        tokens, now = (len(tracked.user.request.prompt), len(tracked.stream.token_ids)), time.monotonic()
        self.metrics.ended(reason, now, now - tracked.submitted, *tokens)

    def _lose(self, lost: Replica, how: str) -> None:
        """Move the requests of a replica that the fleet has given up to other replicas."""
        if self.fleet.leaving:  # no answer can be delivered any more
            return
        role = lost.hello.role
        interrupted = role == "unified" and not self.fleet.may_return(lost)  # else such a job never leaves
        if not interrupted:
            count = sum(lost in (tracked.decode, tracked.prefill) for tracked in self._tracked.values())
            print(f"router: a {lost} {how}; {count} requests were on it", file=sys.stderr, flush=True)
        if self.fleet.may_return(lost):
            self._count_deaths(lost, how)
        for uid in sorted(lost.requests):  # in the order in which they were submitted
            if interrupted or self._tracked[uid].attempts >= ATTEMPTS:
                error = INTERRUPTED if interrupted or self.stopped() else f"the {role} replica serving it {how}"
                self._end(uid, "error", error)
            else:
                self._retry(uid, lost, is_lost=True)

    def _count_deaths(self, lost: Replica, how: str) -> None:
        """End the requests that have been begun by too many replicas that died."""
        for tracked in list(self._tracked.values()):
            if self._trials.died(tracked, lost):
                error = f"given up: {DEATHS} jobs died as they began it; the {lost.hello.role} replica serving it {how}"
                if tracked.decode is None:
                    self._waiting.remove(tracked)
                elif tracked.decode is not lost:
                    self.port.send(tracked.decode.id, Abort(tracked.uid))
                self._end(tracked.uid, "error", error)
