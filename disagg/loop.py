"""The loop that every rank of every role runs: events, a turn of the pipeline, a report to the router.

The ranks of an attention replica share their events first, so that all of them take the same decisions. The router's
messages reach the replica's first rank only, and a link's messages reach one rank.
"""

import os
import uuid

from disagg.connection import Connection
from disagg.control.address import local_host
from disagg.control.messages import Bye, Finish, Member
from disagg.decode import Decode
from disagg.engine import Engine
from disagg.handoff.connect import Door
from disagg.interrupt import Interrupt
from disagg.pipeline import CUT_OFF, FINISHED, GOING_ON, LEAVING, Pipeline, Turn
from disagg.prefill import Prefill
from disagg.role import Role
from disagg.unified import Unified
from parallel.mesh import Mesh

LONGEST_NAP_MS = 20
COLLECTIVE_S = 300.0  # a rank that waits longer for another one ends its job


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
        turn = pipeline.turn(end)
        if turn == Turn.OVER:
            problem = problem or connection.problem
            break
        if turn == Turn.WORKED:
            nap_ms = 1
        elif connection.port is not None:
            nap_ms = 1 if role.is_waiting else min(2 * nap_ms, LONGEST_NAP_MS)
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
