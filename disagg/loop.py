"""The loop that every rank of every role runs: events, a turn of the pipeline, a report to the router.

The ranks of an attention replica first share their events, so that all of them take the same decisions. The router's
messages reach only the replica's first rank, and a link's messages reach only one rank.
"""

import os
import uuid
from contextlib import nullcontext

from disagg.connection import Connection
from disagg.control.messages import Bye, Finish, Member, RoleName
from disagg.control.secret import Secret
from disagg.decode import Decode
from disagg.engine import Engine
from disagg.handoff.connect import Door
from disagg.handoff.endpoints import BY_DEFAULT, Handoff
from disagg.interrupt import Interrupt
from disagg.pipeline import CUT_OFF, FINISHED, GOING_ON, LEAVING, Pipeline, Turn
from disagg.prefill import Prefill
from disagg.rebalance import short_switches
from disagg.reports import RankStats, Reports
from disagg.role import Event, Role
from disagg.unified import Unified
from parallel.interface import local_host
from parallel.mesh import Mesh

LONGEST_NAP_MS = 20
INBOX = list[Event | RankStats]
COLLECTIVE_S = 300.0  # a rank that waits longer than this in a collective ends its job


def make_role(
    name: RoleName, engine: Engine, mesh: Mesh, router_host: str, secret: Secret | None, handoff: Handoff
) -> tuple[Role, list[Member]]:
    """Collective. Return the role, and the members of this replica."""
    host = local_host(router_host)
    door = Door(host, secret) if name == "prefill" else None
    ports = (door.port, door.store.port) if door else (0, 0)
    me = Member(uuid.uuid4().hex, host, *ports, mesh.rank, os.getpid())
    members = mesh.attn.exchange(me, Member)
    if name == "unified":
        return Unified(engine), members
    endpoint = handoff.make_endpoint(host, engine.pool)
    if door is not None:
        return Prefill(engine, members, door, endpoint, handoff.checksums), members
    return Decode(engine, members, endpoint, secret), members


def serve(
    name: RoleName,
    engine: Engine,
    mesh: Mesh,
    router: tuple[str, int],
    interrupt: Interrupt,
    secret: Secret | None = None,
    handoff: Handoff = BY_DEFAULT,
) -> str | None:
    """Collective. Run until the router sends Finish, or a signal interrupts. `secret`: the deployment's.

    Returns the problem, if that was not the reason for the end.
    """
    with short_switches() if engine.rebalancer is not None else nullcontext():
        return _serve(name, engine, mesh, router, interrupt, secret, handoff)


def _serve(
    name: RoleName,
    engine: Engine,
    mesh: Mesh,
    router: tuple[str, int],
    interrupt: Interrupt,
    secret: Secret | None,
    handoff: Handoff,
) -> str | None:
    role, members = make_role(name, engine, mesh, router[0], secret, handoff)
    flags = {"--speculate": str(engine.settings.speculate)} | handoff.as_layout() if name != "unified" else {}
    connection = Connection(name, engine, mesh, members, router, secret, flags)
    mesh.limit_waits(COLLECTIVE_S)
    pipeline = Pipeline(role, engine, mesh, connection.waiting, lambda: connection.report(role.news()))
    reports = Reports(role, pipeline)
    nap_ms, finished, problem = 1, False, None
    while True:
        connection.beacon.turn += 1
        connection.drain(interrupt.draining)
        inbox = [*connection.poll(), *role.collect(), *reports.due()]
        with connection.waiting():
            shared = mesh.attn.exchange(inbox, INBOX)
        for events in shared:
            for event in events:
                if isinstance(event, RankStats):
                    reports.hear(event)
                    continue
                if isinstance(event, Finish):
                    finished, problem = True, event.error
                role.handle(event)
        end = FINISHED if finished else GOING_ON if connection.stands else CUT_OFF
        if interrupt.seen or (end == CUT_OFF and (connection.problem is not None or connection.drains_alone)):
            end = LEAVING
        turn = pipeline.turn(end)
        if turn == Turn.OVER:
            # All ranks of a job end for one reason: a rank that the router had not admitted yet knows of none itself.
            problem = mesh.ep.first_problem(problem or connection.problem)
            break
        if turn == Turn.WORKED:
            nap_ms = 1
        elif connection.port is not None:
            nap_ms = 1 if role.is_waiting else min(2 * nap_ms, LONGEST_NAP_MS)
            connection.port.wait(nap_ms)
        connection.report(role.news())  # what no step brought
        connection.report_load(role.load)
        connection.report_kept()
        connection.report(reports.news())

    connection.report(role.news())  # of the step that was in flight at the end
    role.close()
    stats = pipeline.stats
    stats.update(engine.scheduler.cache.stats())
    for part in (
        *mesh.attn.exchange(role.stats(), dict[str, float]),
        engine.stats(),
    ):  # of each rank of the replica, and of the job
        for key, value in part.items():
            stats[key] += value
    connection.close(Bye(dict(stats)))
    return problem
