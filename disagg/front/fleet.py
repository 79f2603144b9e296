"""Fleet: the replicas that a router knows, whether they are alive, and which of them may get requests.

A job's replicas come and go together, because none of them can end a step without the others. A job takes part once
all its replicas have sent Hello. The router gives it up when one of them leaves, or when one of its ranks is frozen or
stuck. Then the other jobs hear that it is gone, and its requests return to the router. If a lost job answers again, it
is taken back, in new sessions.

A job one of whose ranks got SIGTERM drains. It gets no new requests, and Finish when its replicas have none left. A
unified job's router is its own, so then the router itself must drain.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable

from disagg.control.messages import Back, Beat, Bye, Finish, Gone, Hello, Kept, Member, Stats, ToWorker
from disagg.control.ports import RouterPort
from disagg.control.pulse import Pulses
from disagg.front.replica import Replica
from disagg.front.spread import Spreads

SILENT_S = 10.0  # a rank without a beat for longer counts as frozen
STUCK_S = 60.0  # a rank in one turn for longer counts as stuck
PING_S = 1.0
PAUSE_S = 3.0  # if the router's loop paused for longer, the router itself was stopped and may have missed messages
GRACE_S = 10.0  # how long it then assumes that all replicas are alive
FAREWELL_S = 15.0  # how long to wait for the replicas' last messages
LAST_BEAT_S = 3.0  # do not wait for the last message of a replica without a beat for longer


class Fleet:
    def __init__(
        self, port: RouterPort, lost: Callable[[Replica, str], None], expected: int = 0, config: str = ""
    ) -> None:
        """`lost(replica, how)` is called when a replica is given up, while its requests are still listed on it.

        `expected`: replicas that will surely come (those of the same job), so the router waits for them even without
        requests. `config`: the fingerprint of the router's own model; "" if it does not matter.
        """
        self.port, self.expected, self._lost, self._config = port, expected, lost, config
        self.replicas: dict[str, Replica] = {}
        self.stats: list[tuple[str, dict[str, float]]] = []  # (role, statistics) of the replicas that sent Bye
        self._away: dict[str, tuple[Replica, int]] = {}  # given up but may return: id -> replica, its last turn
        self._broken: set[str] = set()  # jobs that have lost a replica
        self._draining: set[str] = set()  # jobs that want no new requests
        self._gone: set[str] = set()  # ids of members that were reported as Gone
        self._pulses = Pulses()
        self._next_ping, self._checked_at, self._lenient_until = 0.0, time.monotonic(), 0.0
        self.roles: set[str] = set()  # of all replicas so far
        self.leaving = False
        self.unified_drains = False
        self.changes = 0  # how often a replica came or went
        self.spreads = Spreads()  # of the replicas' loads, over time

    def in_role(self, role: str) -> list[Replica]:
        """Return the replicas in this role whose jobs are complete, and take new requests."""
        unable = self._broken | self._draining
        working = [replica for replica in self.replicas.values() if replica.hello.job not in unable]
        sizes = Counter(replica.hello.job for replica in working)
        return [r for r in working if r.hello.role == role and sizes[r.hello.job] >= r.hello.replicas]

    def able_to_serve(self) -> list[Replica]:
        """Return the replicas that can take requests: unified ones, and decode ones if there is a prefill replica."""
        return self.in_role("unified") + (self.in_role("decode") if self.in_role("prefill") else [])

    def missing_roles(self) -> list[str]:
        """Return the roles without which no request can be served now. It is empty if one can."""
        unified = "unified" in self.roles or self.expected > 0
        needed = ("unified",) if unified else ("prefill", "decode")
        return [] if self.able_to_serve() else [role for role in needed if not self.in_role(role)]

    def tell(self, replicas: list[Replica], message: ToWorker) -> None:
        for replica in replicas:
            self.port.send(replica.id, message)

    def hear(self, id: str, message: Hello | Beat | Stats | Kept | Bye) -> None:
        match message:
            case Beat():
                self._pulses.beat(message)
                if message.load is not None and (beating := self.replicas.get(message.id)):
                    beating.hear(message.load)
                if message.draining:
                    self._drain(message.id)
            case Stats(stats):
                if id in self.replicas:
                    self.replicas[id].stats = stats
                    self.replicas[id].reported = time.monotonic()
            case Kept():
                if id in self.replicas:
                    try:
                        self.replicas[id].kept.hear(message)
                    except ValueError as wrong:
                        self.port.refusals.add("a report of a cache", str(wrong))
            case Hello():
                self._welcome(Replica(id, message))
            case Bye(stats):
                replica = self.replicas.pop(id, None)
                self.port.dismiss(id)
                if replica is not None:
                    self.stats.append((replica.hello.role, stats))
                    self._broken.add(replica.hello.job)
                    self._pulses.unwatch(replica.hello.members)
                    self._give_up(replica, "has drained" if replica.finished else "was stopped")

    def _welcome(self, new: Replica) -> None:
        self.expected -= 1
        if new.id in self.replicas:  # it says Hello outside its session, which it must have lost
            self._lose(self.replicas[new.id], "it lost its session")
        self.port.admit(new.id)
        wrong = self._objection(new)
        if wrong and self._has_the_routers_model(new.hello):
            self._refuse_other_models(new.hello)
            wrong = self._objection(new)
        if wrong:
            self._refuse(new, wrong)
            return
        if self._config and not self._has_the_routers_model(new.hello):
            _say(f"a {new} has not this router's --model; it stays until one comes that has")
        self.roles.add(new.hello.role)
        self._pulses.watch(new.hello.members)
        if new.hello.job in self._broken and not self.leaving:
            self._away[new.id] = new, self._pulses.turn(new.hello.members[0])
            return
        self._take(new, "joined")

    def _take(self, replica: Replica, how: str) -> None:
        ids = [member.id for member in replica.hello.members]
        if not self._gone.isdisjoint(ids):
            self._gone -= set(ids)
            self.tell(list(self.replicas.values()), Back(ids))
        self.replicas[replica.id] = replica
        if self._gone:  # it has missed earlier Gone messages
            self.tell([replica], Gone(sorted(self._gone)))
        self.changes += 1
        if replica.hello.role != "unified":
            _say(f"a {replica} {how}, ranks: {len(replica.hello.members)}")
        if self.leaving:
            self.port.send(replica.id, Finish())

    def may_return(self, replica: Replica) -> bool:
        """Was it lost, rather than stopped, so that it may come back?"""
        return replica.id in self._away

    def _known(self) -> list[Replica]:
        return [*self.replicas.values(), *(replica for replica, _ in self._away.values())]

    def _objection(self, new: Replica) -> str:
        """Return why `new` cannot take part, or "". Its KV layout must be that of the other replicas, if any."""
        others = [replica for replica in self._known() if replica.id != new.id]
        ids = [member.id for member in new.hello.members]
        if ids[0] != new.id or any(member.id in ids for replica in others for member in replica.hello.members):
            return "its ranks are not its own"
        if not others:
            return ""
        mine, theirs = new.hello.kv, others[0].hello.kv
        wrong = [
            f"{name} is {mine.get(name)}, the others have {theirs.get(name)}"
            for name in theirs | mine
            if mine.get(name) != theirs.get(name)
        ]
        hint = "" if all(one.startswith("--") for one in wrong) else " (--model, --dtype)"
        return f"its KV is not the others': {'; '.join(wrong)}{hint}" if wrong else ""

    def _refuse(self, replica: Replica, wrong: str) -> None:
        self.port.refusals.add(f"a {replica.hello.role} replica", wrong)
        self.port.send(replica.id, Finish(f"refused: {wrong}"))
        self.port.dismiss(replica.id)

    def _has_the_routers_model(self, hello: Hello) -> bool:
        return bool(self._config) and hello.kv.get("config") == self._config

    def _refuse_other_models(self, new: Hello) -> None:
        """Send away the replicas that came before `new`, and have not the router's model as it has."""
        for replica in self._known():
            if self._has_the_routers_model(replica.hello):
                continue
            if self._away.pop(replica.id, None) is not None:
                self.port.admit(replica.id)
            self._broken.add(replica.hello.job)
            self._pulses.unwatch(replica.hello.members)
            self._refuse(replica, f"its model is not this router's, which that of a {new.role} replica is (--model)")
            if self.replicas.pop(replica.id, None) is not None:
                self._give_up(replica, "was refused")

    def check(self, listen: Callable[[], None]) -> None:
        """Find replicas that are gone, frozen, stuck, or back. Call it repeatedly.

        `listen()` handles the messages that have arrived.
        """
        now = time.monotonic()
        if now - self._checked_at > PAUSE_S:
            self._pulses.forgive()
            self._lenient_until = now + GRACE_S
        self._checked_at = now
        self._release_drained()
        if now >= self._next_ping:
            self._next_ping = now + PING_S
            self._ping(listen)
            self._feel()
            self.spreads.add(self.replicas.values())

    def _drain(self, member: str) -> None:
        """Give the job of this rank no new requests. Called with each of its beats."""
        job = next((r.hello for r in self._known() if any(m.id == member for m in r.hello.members)), None)
        if job is None or job.job in self._draining:
            return
        if job.role == "unified":
            self.unified_drains = True
            return
        self._draining.add(job.job)
        self.changes += 1
        _say(f"a {job.role} job drains: it gets no new requests")

    def _release_drained(self) -> None:
        """Send Finish to the jobs that drain and have no requests left."""
        for job in self._draining if not self.leaving else ():
            replicas = [replica for replica in self.replicas.values() if replica.hello.job == job]
            if all(replica.is_idle for replica in replicas):
                waiting = [replica for replica in replicas if not replica.finished]
                self.tell(waiting, Finish())
                for replica in waiting:
                    replica.finished = True

    def ping_soon(self) -> None:
        """Check for dead replicas in the next `check`, because something failed."""
        self._next_ping = 0.0

    def _ping(self, listen: Callable[[], None]) -> None:
        """Give up the replicas that are not connected: only sending shows that."""
        for replica in self._known():
            if self.port.ping(replica.id) or time.monotonic() < self._lenient_until:
                continue
            listen()  # its last messages may be unread, perhaps a Bye
            if self.port.ping(replica.id):  # it has reconnected meanwhile
                continue
            if self.replicas.get(replica.id) is replica:
                self._lose(replica, f"{_names(replica.hello.members[:1])} died or is frozen")
            if self._away.pop(replica.id, None) is not None:
                self._pulses.unwatch(replica.hello.members)
                self.port.dismiss(replica.id)

    def _feel(self) -> None:
        """Give up replicas with frozen or stuck ranks, and take back replicas that answer again."""
        for replica in list(self.replicas.values()):
            if self.replicas.get(replica.id) is not replica:
                continue  # it was given up with another replica of its job
            members = replica.hello.members
            if silent := self._pulses.silent(members, SILENT_S):
                self._lose(replica, f"nothing heard of {_names(silent)} for {SILENT_S:g} s")
            elif stuck := self._pulses.stuck(members, STUCK_S):
                self._lose(replica, f"{_names(stuck)} did not end a step in {STUCK_S:g} s")
        for replica, then in list(self._away.values()):
            members, turn = replica.hello.members, self._pulses.turn(replica.hello.members[0])
            if then < 0:  # it has reconnected, and this may be its first beat
                self._away[replica.id] = replica, turn
            elif turn > then + 1 and not self._pulses.silent(members, 2 * PING_S):
                self._return(replica)  # its ranks can only get this far if all ranks of the job work

    def _lose(self, lost: Replica, why: str) -> None:
        """Give up its whole job. The replicas that are still alive may come back."""
        self._broken.add(lost.hello.job)
        for replica in [r for r in self.replicas.values() if r.hello.job == lost.hello.job]:
            del self.replicas[replica.id]
            self.port.dismiss(replica.id)
            self._away[replica.id] = Replica(replica.id, replica.hello), self._pulses.turn(replica.hello.members[0])
            self._give_up(replica, f"is lost{'' if replica is lost else ' with its job'}: {why}")

    def _give_up(self, replica: Replica, how: str) -> None:
        self.changes += 1
        if not self.leaving:
            ids = [member.id for member in replica.hello.members]
            self._gone |= set(ids)
            self.tell(list(self.replicas.values()), Gone(ids))
        self._lost(replica, how)

    def _return(self, replica: Replica) -> None:
        del self._away[replica.id]
        self._broken.discard(replica.hello.job)
        self._pulses.watch(replica.hello.members)
        self.port.admit(replica.id)
        self._take(replica, "is back")

    def farewell(self, listen: Callable[[int], None]) -> None:
        """Send Finish to all replicas, and wait for their last messages.

        `listen(ms)` handles messages, after waiting up to that long for the first.
        """
        self.leaving = True
        self.tell(list(self.replicas.values()), Finish())
        for replica, _ in self._away.values():
            self.port.admit(replica.id)
            self.port.send(replica.id, Finish())
        deadline = time.monotonic() + FAREWELL_S
        while time.monotonic() < deadline and (self.expected > 0 or self._expects_last_words()):
            listen(50)
            self.check(lambda: listen(0))

    def _expects_last_words(self) -> bool:
        return any(not self._pulses.silent(r.hello.members, LAST_BEAT_S) for r in self.replicas.values())


def _names(members: list[Member]) -> str:
    return " and ".join(f"rank {member.rank} on {member.host} (process {member.pid})" for member in members)


def _say(text: str) -> None:
    print(f"router: {text}", file=sys.stderr, flush=True)
