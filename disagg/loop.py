"""The step loop that every rank of every role runs: events, plan, agree, launch, take up the step before, report.

A step is planned before the tokens of the one before it are looked at. A decode step is launched then, too: while the
GPU runs it, the CPU takes up those tokens, tells the router, and plans the next one.

The ranks of an attention replica share their events first, so that all of them take the same decisions: the router's
messages reach its first rank only, and a link's reach its own. The ranks of the job agree once a step on what kind of
step it is, and whether experts move before it; after that nobody returns early, and a rank without work runs an empty
batch.
"""

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from disagg.connection import Connection
from disagg.control.address import local_host
from disagg.control.messages import Bye, Finish, Member
from disagg.decode import Decode
from disagg.engine import Engine, Step
from disagg.handoff.connect import Door
from disagg.interrupt import Interrupt
from disagg.prefill import Prefill
from disagg.unified import Unified
from parallel.mesh import Mesh

Role = Unified | Prefill | Decode
LONGEST_NAP_MS = 20
COLLECTIVE_S = 300.0  # a rank that waits longer for another one ends its job
# What a rank says of its job's end: it serves; it cannot be told, or not by itself; it has its Finish; it leaves now.
GOING_ON, CUT_OFF, FINISHED, LEAVING = range(4)


def make_role(name: str, engine: Engine, mesh: Mesh, router_host: str) -> tuple[Role, list[Member]]:
    """The role, and the ranks of this replica."""
    host = local_host(router_host)
    door = Door(host) if name == "prefill" else None
    ports = (door.port, door.store.port) if door else (0, 0)
    me = Member(uuid.uuid4().hex, host, *ports, mesh.rank, os.getpid())
    members = mesh.attn.exchange(me)
    match name:
        case "unified":
            return Unified(engine), members
        case "prefill":
            return Prefill(engine, members, door), members
        case "decode":
            return Decode(engine, members), members
    raise AssertionError(name)


def serve(name: str, engine: Engine, mesh: Mesh, router: tuple[str, int], interrupt: Interrupt) -> str | None:
    """Run until the router says Finish or somebody interrupts. What went wrong, if the end was not a good one."""
    role, members = make_role(name, engine, mesh, router[0])
    connection = Connection(name, engine, mesh, members, router)
    mesh.limit_waits(COLLECTIVE_S)
    pipeline, nap_ms, finished, problem = Pipeline(role, engine, mesh, connection.waiting), 1, False, None
    while True:
        connection.beacon.turn += 1
        inbox = [*connection.poll(), *role.collect()]
        with connection.waiting():
            shared = mesh.attn.exchange(inbox)
        for events in shared:
            for event in events:
                if isinstance(event, Finish):
                    finished, problem = True, event.error
                role.handle(event)
        end = FINISHED if finished else GOING_ON if connection.stands else CUT_OFF
        if interrupt.seen or (end == CUT_OFF and connection.problem is not None):
            end = LEAVING
        turned = pipeline.turn(end)
        if turned is None:
            problem = problem or connection.problem
            break
        if turned:
            nap_ms = 1
        elif connection.port is not None:
            nap_ms = 1 if role.in_flight else min(2 * nap_ms, LONGEST_NAP_MS)
            connection.port.wait(nap_ms)
        connection.report(role.news())

    connection.report(role.news())  # of the step that was in flight at the end
    role.close()
    stats = pipeline.stats
    for other in mesh.attn.exchange(role.stats()):
        stats.update(other)
    stats.update(engine.stats())
    connection.close(Bye(dict(stats)))
    return problem


class Pipeline:
    """At most one step in flight while the next is planned: plan, agree, launch, and take up the one before."""

    def __init__(
        self, role: Role, engine: Engine, mesh: Mesh, waiting: Callable[[], AbstractContextManager] = nullcontext
    ):
        """`waiting` is entered around the collective."""
        self.role, self.engine, self.mesh, self.waiting = role, engine, mesh, waiting
        self.stats: Counter = Counter()
        self._running: tuple[Step, float] | None = None  # and when it was launched
        self._ended = 0.0  # when the tokens of the one before were there

    def turn(self, end: int = GOING_ON) -> bool | None:
        """Was there anything to do? None once any rank leaves, or all that can be told have their Finish; the ranks
        learn that together."""
        plan = self.role.plan()
        with self.waiting():
            agreed = self.mesh.agree(plan.num_prefill_tokens, len(plan.decodes), end, self.engine.vote())
        prefill_tokens, decodes, ends, votes = zip(*agreed, strict=True)
        if LEAVING in ends or (FINISHED in ends and GOING_ON not in ends):
            if self._running is not None:  # its pages are released only now
                self._take_up(*self._running)
            return None
        self.engine.rebalance(votes)
        before, self._running, work = self._running, None, None
        if any(prefill_tokens) or any(decodes):
            rows = None if any(prefill_tokens) else self.engine.decode.bucket(max(decodes))
            most_tokens = max(map(sum, zip(prefill_tokens, decodes, strict=True)))
            work = self.engine.prepare(plan, rows, most_tokens)
        ahead = work is not None and self.engine.runs_ahead(work)
        if before is not None and not ahead:  # else these tokens would wait until that step is through
            self._take_up(*before)
        if work is not None:
            now = time.perf_counter()
            step = self.engine.run(work)
            self._running = step, now
            self.role.launched(step)
        if before is not None and ahead:
            self._take_up(*before)
        return before is not None or work is not None

    def _take_up(self, step: Step, launched_at: float) -> None:
        began = max(launched_at, self._ended)  # a step that was launched ahead begins when the one before it ends
        tokens = self.role.after(step)
        self._ended = time.perf_counter()
        self._count(step, tokens, self._ended - began)

    def _count(self, step: Step, tokens: int, seconds: float) -> None:
        """A step in which any rank has prompt tokens counts as prefill on all of them."""
        phase = "prefill" if step.work.mixed else "decode"
        self.stats[f"{phase}_steps"] += 1
        self.stats[f"{phase}_seconds"] += seconds
        self.stats["prompt_tokens"] += step.work.plan.num_prefill_tokens
        self.stats[f"{phase}_step_tokens"] += tokens
        self.stats[f"{phase}_overlapped"] += step.work.overlapped
