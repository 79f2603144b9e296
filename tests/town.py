"""A deployment of real processes on this machine that a test can freeze, kill and replace."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.tools.demo import free_port
from tests.hosts import Host
from tests.processes import Job


class Town:
    """A router's address, and the jobs that were started for it."""

    def __init__(self, folder: Path, model: Path, constants: dict[str, Any], host: Host | None = None) -> None:
        """`host`: the router's; None: this machine."""
        self.folder, self.model, self.constants, self.host = folder, str(model), constants, host
        self.port = free_port()
        self.address = f"{host.address if host is not None else '127.0.0.1'}:{self.port}"
        self.flags: tuple[str, ...] = ()  # of all jobs
        self.jobs: list[Job] = []

    def start(self, role: str, ranks: int = 1, *flags: str, hosts: Sequence[Host] = ()) -> Job:
        """`hosts`: one per rank; none: this machine."""
        log = self.folder / f"{len(self.jobs)}-{role}.log"
        argv = ["--role", role, "--model", self.model, *self.flags, *flags]
        self.jobs.append(Job(argv, ranks, log, self.constants, hosts=hosts))
        return self.jobs[-1]

    def worker(self, role: str, ranks: int = 1, *flags: str, hosts: Sequence[Host] = ()) -> Job:
        return self.start(role, ranks, "--router", self.address, *flags, hosts=hosts)

    def router(self, requests: list[dict], name: str) -> Job:
        """Start a router with these requests. `answers(name)` reads its answers."""
        source = self.folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(request) + "\n" for request in requests))
        files = "--input", str(source), "--output", str(self.folder / f"{name}.out")
        return self.start(
            "router", 1, "--router", self.address, *files, hosts=[self.host] if self.host is not None else ()
        )

    def answers(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.out"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition is true. After `seconds`, raise AssertionError with all logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{self.said}"
            time.sleep(0.02)

    @property
    def said(self) -> str:
        return "\n".join(f"--- job {i} {job.statuses}\n{job.said}" for i, job in enumerate(self.jobs))

    def end(self) -> None:
        for job in self.jobs:
            job.end()


@contextmanager
def town(folder: Path, model: Path, host: Host | None = None, **constants: Any) -> Iterator[Town]:
    """Yield a Town and end its jobs. `constants`: disagg__front__fleet__SILENT_S=2 sets that one in all processes."""
    place = Town(folder, model, {name.replace("__", "."): value for name, value in constants.items()}, host)
    try:
        yield place
    finally:
        place.end()
