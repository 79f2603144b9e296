"""Connection: a rank's ties to the router, and what a user reads of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from disagg.control.address import format_address
from disagg.control.messages import Bye, Forget, Hello, Member, ToWorker, Updates
from disagg.control.ports import WorkerPort
from disagg.control.pulse import Beacon
from disagg.engine import Engine
from parallel.mesh import Mesh

HOLD_S = 60.0  # how long a job keeps its requests while its router is away: stopped, or replaced
SAYING = {
    "waiting": "waiting for the router",
    "joined": "joined the router",
    "lost": f"waiting {HOLD_S:.0f} s for the router to come back",
}


class Connection:
    """A rank's ties to the router: its beacon and, at the first rank of a replica, the port."""

    def __init__(self, name: str, engine: Engine, mesh: Mesh, members: list[Member], router: tuple[str, int]):
        self._name, self._where, self._says = name, format_address(*router), mesh.rank == 0 and name != "unified"
        job = mesh.ep.exchange(members[0].id)[0]
        self.beacon, self.port = Beacon(members[mesh.attn.rank].id, *router), None
        if mesh.leads:
            sizes = engine.settings.max_batch, engine.settings.max_tokens_per_step, engine.kv_tokens
            hello = Hello(name, members, *sizes, engine.kv_layout(), job, mesh.num_replicas)
            self.port = WorkerPort(hello, *router)
        self._was = ""
        self._look()

    def poll(self) -> list[ToWorker | Forget]:
        """What the router said."""
        if self.port is None:
            return []
        messages = self.port.poll()
        self._look()
        return messages

    def _look(self) -> None:
        """Say it, if something has changed."""
        now = "waiting" if self.port is None or not self.port.welcomed else "lost" if self.port.lost_s else "joined"
        if now != self._was:
            self._was = now
            self._say(SAYING[now])

    @property
    def stands(self) -> bool:
        """Is a router at the other end of this rank's port?"""
        return self.port is not None and self.port.welcomed and not self.port.lost_s

    @property
    def problem(self) -> str | None:
        """Why there is nothing to hope for from the router."""
        gone = self.port is not None and self.port.lost_s > HOLD_S
        return f"the router at {self._where} has been gone for {HOLD_S:.0f} s" if gone else None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In a collective, for other ranks."""
        self.beacon.waits = True
        yield
        self.beacon.waits = False

    def report(self, news: Updates | Bye | None) -> None:
        if self.port is not None and news is not None:
            self.port.send(news)

    def close(self, bye: Bye) -> None:
        self.report(bye)
        self.beacon.close()
        if self.port is not None:
            self.port.close()
        self._say("has left the router")

    def _say(self, what: str) -> None:
        if self._says:
            print(f"{self._name}: {what} at {self._where}", file=sys.stderr, flush=True)
