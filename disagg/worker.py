"""The step loop that every rank of every role runs: events, plan, agree, launch, take up the step before, report.

A step is planned before the tokens of the one before it are looked at. A decode step is launched then, too: while the
GPU runs it, the CPU takes up those tokens, tells the router, and plans the next one.

The ranks of an attention replica share their events first (the router's messages reach its first rank only, a link's
its own), so that each of them then takes the same decisions. The ranks of the job agree once a step on what kind of
step it is, and whether experts move before it; after that nobody returns early, and a rank without work runs an empty
batch.
"""

import time
import uuid
from collections import Counter

from disagg.address import local_host
from disagg.control import Bye, Finish, Hello, Member, Updates, WorkerPort
from disagg.decode import Decode
from disagg.engine import Engine, Step
from disagg.interrupt import Interrupt
from disagg.prefill import Door, Prefill
from disagg.unified import Unified
from parallel.mesh import Mesh

Role = Unified | Prefill | Decode
LONGEST_NAP_MS = 20


def make_role(name: str, engine: Engine, mesh: Mesh, router_host: str) -> tuple[Role, list[Member]]:
    """The role, and the ranks of this replica."""
    host = local_host(router_host)
    door = Door(host) if name == "prefill" else None
    me = Member(uuid.uuid4().hex, host, door.port if door else 0, door.store.port if door else 0)
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
    job = mesh.ep.exchange(members[0].id)[0]
    port = WorkerPort(members[0].id, *router) if mesh.leads else None
    if port is not None:
        port.send(Hello(name, members, engine.settings.max_batch, engine.kv_tokens, engine.kv_layout(), job))
    pipeline, nap_ms, finished, problem = Pipeline(role, engine, mesh), 1, False, None
    while True:
        inbox = port.poll() if port is not None else []
        for events in mesh.attn.exchange([*inbox, *role.collect()]):
            for event in events:
                if isinstance(event, Finish):
                    finished, problem = True, event.error
                role.handle(event)
        if port is not None and not finished and port.gone:
            finished, problem = True, f"the router at {router[0]}:{router[1]} is gone"
        turned = pipeline.turn(stop=finished or interrupt.seen)
        if turned is None:
            break
        if turned:
            nap_ms = 1
        elif port is not None:
            nap_ms = 1 if role.in_flight else min(2 * nap_ms, LONGEST_NAP_MS)
            port.wait(nap_ms)
        if port is not None and role.updates:
            port.send(Updates(role.updates))
        role.updates.clear()

    if port is not None and role.updates:  # of the step that was in flight at the end
        port.send(Updates(role.updates))
    role.close()
    stats = pipeline.stats
    for other in mesh.attn.exchange(role.stats()):
        stats.update(other)
    stats.update(engine.stats())
    if port is not None:
        port.send(Bye(dict(stats)))
        port.close()
    return problem


class Pipeline:
    """At most one step in flight while the next is planned: plan, agree, launch, and take up the one before."""

    def __init__(self, role: Role, engine: Engine, mesh: Mesh):
        self.role, self.engine, self.mesh = role, engine, mesh
        self.stats: Counter = Counter()
        self._running: tuple[Step, float] | None = None  # and when it was launched
        self._ended = 0.0  # when the tokens of the one before were there

    def turn(self, stop: bool = False) -> bool | None:
        """Was there anything to do? None once any rank wants to stop; the ranks learn that together."""
        plan = self.role.plan()
        agreed = self.mesh.agree(plan.num_prefill_tokens, len(plan.decodes), stop, self.engine.vote())
        prefill_tokens, decodes, stops, votes = zip(*agreed, strict=True)
        if any(stops):
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
