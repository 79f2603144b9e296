"""Connection: a rank's connection to the router, and the user's lines about it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from disagg.catalogue import Catalogue
from disagg.control.address import format_address
from disagg.control.messages import Bye, Forget, Hello, Load, Member, RoleName, Stats, ToWorker, Updates, in_messages
from disagg.control.ports import WorkerPort
from disagg.control.pulse import Beacon
from disagg.control.secret import Secret
from disagg.engine import Engine
from disagg.reports import about
from model.kv_cache import kv_layout
from parallel.mesh import Mesh

HOLD_S = 60.0  # how long a job keeps its requests while its router is away (stopped, or being replaced)
KEPT_S = 1.0  # between two reports of what the cache has
MEET_S = 5.0  # how long a replica that leaves at once waits for the router of its own job
LOAD_S = 0.1  # how old a reported load may be, apart from the turn that is running
SAYING = {
    "waiting": "waiting for the router at {}",
    "joined": "joined the router at {}",
    "lost": f"waiting {HOLD_S:.0f} s for the router to come back at {{}}",
    "shut out": "the router at {} refuses this job's secret, or has none (--secret-file)",
    "shut out without one": "the router at {} refuses this job, which has no secret (--secret-file)",
    "draining": "draining: it finishes what it has, and then leaves the router at {}",
}


class Connection:
    """A rank's connection to the router: its beacon and, on the first rank of a replica, the port."""

    def __init__(
        self,
        name: RoleName,
        engine: Engine,
        mesh: Mesh,
        members: list[Member],
        router: tuple[str, int],
        secret: Secret | None,
        handoff: dict[str, str],
    ) -> None:
        """Collective. `handoff`: flags in which prefill and decode must agree."""
        self._name, self._where = name, format_address(*router)
        self._shut_out = "shut out" if secret is not None else "shut out without one"
        self._says = mesh.rank == 0 and name != "unified"  # print lines?
        job = mesh.ep.exchange(members[0].id, str)[0]
        self.beacon = Beacon(members[mesh.attn.rank].id, *router, secret)
        self.port: WorkerPort | None = None
        self._catalogue: Catalogue | None = None
        if mesh.leads:
            settings = engine.settings
            sizes = settings.max_batch, settings.max_tokens_per_step, engine.kv_tokens
            hello = Hello(
                name,
                members,
                *sizes,
                kv_layout(engine.model, engine.pool) | handoff,
                job,
                replicas=mesh.num_replicas,
                about=about(engine),
                caches=engine.scheduler.cache.keeps,
                drafts=settings.speculate,
            )
            self.port = WorkerPort(hello, *router, secret)
            if engine.scheduler.cache.keeps:
                self._catalogue = engine.scheduler.cache.catalogue = Catalogue()
        self._next_load = self._next_kept = 0.0
        self._state = ""
        self._update_state()

    def poll(self) -> list[ToWorker | Forget]:
        """Return the router's messages since the last call."""
        if self.port is None:
            return []
        messages = self.port.poll()
        if self._catalogue is not None and any(isinstance(message, Forget) for message in messages):
            self._catalogue.tell_all()
        self._update_state()
        return messages

    def _update_state(self) -> None:
        """Print a line if the connection's state has changed."""
        now = "waiting" if self.port is None or not self.port.welcomed else "lost" if self.port.lost_s else "joined"
        now = self._shut_out if self.port is not None and self.port.shut_out else now
        if now != self._state:
            self._state = now
            self._say(SAYING[now])

    @property
    def stands(self) -> bool:
        """Is this rank's port connected to a router that has admitted it?"""
        return self.port is not None and self.port.welcomed and not self.port.lost_s

    @property
    def problem(self) -> str | None:
        """The reason to end the job, if the router has been away for too long."""
        gone = self.port is not None and self.port.lost_s > HOLD_S
        return f"the router at {self._where} has been gone for {HOLD_S:.0f} s" if gone else None

    def drain(self, draining: bool) -> None:
        """Tell the router, with the next beats, that this rank wants no new requests."""
        if draining and not self.beacon.draining:
            self.beacon.draining = True
            self._say(SAYING["draining"])

    @property
    def drains_alone(self) -> bool:
        """Does this rank drain, while no router could take its answers?"""
        return self.beacon.draining and self.port is not None and not self.stands

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Tell the beacon that this rank waits in a collective for other ranks."""
        self.beacon.waits = True
        yield
        self.beacon.waits = False

    def report(self, news: Updates | Stats | Bye | None) -> None:
        if self.port is not None and news is not None:
            for message in in_messages(news) if isinstance(news, Updates) else [news]:
                self.port.send(message)

    def report_load(self, load: Callable[[], Load]) -> None:
        """Give the beacon of a replica's first rank the load to send. Calls `load()` every LOAD_S at most."""
        if self.port is not None and (now := time.monotonic()) >= self._next_load:
            self._next_load = now + LOAD_S
            self.beacon.load = load()

    def report_kept(self) -> None:
        """Tell the router, every KEPT_S, how the pages in the replica's cache have changed."""
        if self._catalogue is None or self.port is None or not self.port.welcomed:
            return
        if (now := time.monotonic()) >= self._next_kept:
            self._next_kept = now + KEPT_S
            for message in self._catalogue.news():
                self.port.send(message)

    def close(self, bye: Bye) -> None:
        if self.port is not None and self._name == "unified":  # the job's own router waits for all of its replicas
            deadline = time.monotonic() + MEET_S
            while not self.port.welcomed and time.monotonic() < deadline:
                self.port.poll(50)
        self.report(bye)
        self.beacon.close()
        if self.port is not None:
            self.port.close()
        self._say("has left the router at {}")

    def _say(self, what: str) -> None:
        if self._says:
            print(f"{self._name}: {what.format(self._where)}", file=sys.stderr, flush=True)
