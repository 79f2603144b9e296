"""The step loop that every rank of every role runs: events, plan, agree, run, report.

The ranks of an attention replica share their events first (the router's messages reach its first rank only, a link's
its own), so that each of them then takes the same decisions. The ranks of the job agree once a step on what kind of
step it is; after that nobody returns early, and a rank without work runs an empty batch.
"""

import signal
import time
import uuid
from collections import Counter

from disagg.control import Bye, Finish, Hello, Member, Updates, WorkerPort, local_host
from disagg.decode import Decode
from disagg.engine import Engine
from disagg.prefill import Door, Prefill
from disagg.unified import Unified
from parallel.mesh import Mesh

Role = Unified | Prefill | Decode
LONGEST_NAP_MS = 20


class Interrupt:
    """Ctrl-C or SIGTERM, remembered: the loop ends at the next step on every rank, and the process with status 0."""

    def __init__(self) -> None:
        self.seen = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._see)

    def _see(self, number: int, _: object) -> None:
        """The second one kills."""
        self.seen = True
        signal.signal(number, signal.SIG_DFL)


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
    port = WorkerPort(members[0].id, *router) if mesh.leads else None
    if port is not None:
        port.send(Hello(name, members, engine.settings.max_batch, engine.kv_tokens, engine.kv_layout))
    stats, nap_ms, finished, problem = Counter(), 1, False, None
    while True:
        inbox = port.poll() if port is not None else []
        for events in mesh.attn.exchange([*inbox, *role.collect()]):
            for event in events:
                if isinstance(event, Finish):
                    finished, problem = True, event.error
                role.handle(event)
        plan = role.plan()
        if port is not None and not finished and port.gone:
            finished, problem = True, f"the router at {router[0]}:{router[1]} is gone"
        mine = (plan.num_prefill_tokens, len(plan.decodes), finished or interrupt.seen)
        prefill_tokens, decodes, stop = (sum(column) for column in zip(*mesh.agree(*mine), strict=True))
        if stop:
            break
        if prefill_tokens or decodes:
            start = time.perf_counter()
            sampled = engine.run(plan, masked=not prefill_tokens)
            role.after(plan, sampled)
            _count(stats, mine, prefill_tokens > 0, time.perf_counter() - start)
            nap_ms = 1
        elif port is not None:
            nap_ms = 1 if role.in_flight else min(2 * nap_ms, LONGEST_NAP_MS)
            port.wait(nap_ms)
        if port is not None and role.updates:
            port.send(Updates(role.updates))
        role.updates.clear()

    role.close()
    for other in mesh.attn.exchange(role.stats()):
        stats.update(other)
    if port is not None:
        port.send(Bye(dict(stats)))
        port.close()
    return problem


def _count(stats: Counter, mine: tuple[int, int, bool], prefill: bool, seconds: float) -> None:
    """A step in which any rank has prompt tokens counts as prefill on all of them."""
    phase = "prefill" if prefill else "decode"
    stats[f"{phase}_steps"] += 1
    stats[f"{phase}_seconds"] += seconds
    stats["prompt_tokens"] += mine[0]
    stats[f"{phase}_step_decodes"] += mine[1]
