"""A deployment of real processes on this machine that a test can freeze, kill and replace."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from scripts.tools.demo import free_port
from tests.hosts import NO_NAMES, Host
from tests.processes import Job

# ZeroMQ's own word of a dead connection, which would come at 10 s; and the beats.
QUICK = {
    "disagg__control__ports__HEARTBEAT_MS": 200,
    "disagg__control__ports__DEAD_AFTER_MS": 1_000,
    "disagg__control__pulse__BEAT_S": 0.1,
    "disagg__front__fleet__SILENT_S": 1.5,
    "disagg__front__fleet__PING_S": 0.2,
    "disagg__front__router__SUSPECT_S": 0.5,
}
SOON = 60
POOL = ("--kv-tokens", "2048")  # for a few requests at a time


def requests(text: str, count: int, max_tokens: int) -> list[dict]:
    return [
        {"id": f"{text} {i}", "prompt": f"{text} {i}", "max_tokens": max_tokens, "ignore_eos": True}
        for i in range(count)
    ]


LONG, OTHER = requests("And the LORD spake", 20, 80), requests("import os", 16, 20)
GRADED = [request | {"max_tokens": 4 + 4 * i} for i, request in enumerate(LONG)]  # the first answer comes early


def as_lines(requests: list[dict]) -> bytes:
    return "".join(json.dumps(request) + "\n" for request in requests).encode()


class Town:
    """A router's address, and the jobs that were started for it."""

    def __init__(self, folder: Path, model: Path, constants: dict[str, Any], host: Host | None = None) -> None:
        """`host`: the router's; None: this machine."""
        self.folder, self.model, self.constants, self.host = folder, str(model), constants, host
        self.port = free_port()
        self.address = f"{host.address if host is not None else '127.0.0.1'}:{self.port}"
        self.flags: tuple[str, ...] = ()  # of all jobs
        self.jobs: list[Job] = []
        self._feeds: dict[str, int] = {}  # file descriptors

    def start(self, role: str, ranks: int = 1, *flags: str, hosts: Sequence[Host] = ()) -> Job:
        """`hosts`: one per rank; none: this machine."""
        log = self.folder / f"{len(self.jobs)}-{role}.log"
        argv = ["--role", role, "--model", self.model, *self.flags, *flags]
        # UCX would see that there is one machine in truth.
        env = NO_NAMES | {"UCX_TLS": "tcp,self"} if hosts else {}
        self.jobs.append(Job(argv, ranks, log, self.constants, env=env, hosts=hosts))
        return self.jobs[-1]

    def worker(self, role: str, ranks: int = 1, *flags: str, hosts: Sequence[Host] = ()) -> Job:
        return self.start(role, ranks, "--router", self.address, *flags, hosts=hosts)

    def router(self, requests: list[dict], name: str, *flags: str) -> Job:
        """Start a router with these requests. `answers(name)` reads its answers."""
        self._source(name).write_bytes(as_lines(requests))
        return self._start_router(name, *flags)

    def fed_router(self, name: str, *flags: str) -> Job:
        """Start a router with the requests that `feed` gives it, and no end until `stop_feeding`."""
        os.mkfifo(self._source(name))
        self._feeds[name] = os.open(self._source(name), os.O_RDWR)
        return self._start_router(name, *flags)

    def feed(self, requests: list[dict], name: str) -> None:
        os.write(self._feeds[name], as_lines(requests))

    def stop_feeding(self, name: str) -> None:
        """Call it when the router has read something."""
        os.close(self._feeds.pop(name))

    def _source(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _start_router(self, name: str, *flags: str) -> Job:
        source = self._source(name)
        files = "--input", str(source), "--output", str(self.folder / f"{name}.out")
        return self.start(
            "router", 1, "--router", self.address, *files, *flags, hosts=[self.host] if self.host is not None else ()
        )

    def answers(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.out"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition is true. After `seconds`, raise AssertionError with all logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{self.said}"
            time.sleep(0.05)  # a look reads logs, and some ask the router

    @property
    def said(self) -> str:
        return "\n".join(f"--- job {i} {job.statuses}\n{job.said}" for i, job in enumerate(self.jobs))

    def end(self) -> None:
        for job in self.jobs:
            job.end()
        for name in list(self._feeds):
            self.stop_feeding(name)


@contextmanager
def town(folder: Path, model: Path, host: Host | None = None, **constants: Any) -> Iterator[Town]:
    """Yield a Town and end its jobs. `constants`: disagg__front__fleet__SILENT_S=2 sets that one in all processes."""
    place = Town(folder, model, {name.replace("__", "."): value for name, value in constants.items()}, host)
    try:
        yield place
    finally:
        place.end()


@cache
def undisturbed(model: Path) -> dict[str, list[int]]:
    """Return the tokens of all requests, as `alone`."""
    return alone(model, LONG + OTHER)


def alone(model: Path, wanted: list[dict]) -> dict[str, list[int]]:
    """Return the tokens of requests, of one process that nothing disturbs; by id."""
    with tempfile.TemporaryDirectory() as folder, town(Path(folder), model) as place:
        source, out = place.folder / "in.jsonl", place.folder / "all.out"
        source.write_bytes(as_lines(wanted))
        process = place.start("unified", 1, "--input", str(source), "--output", str(out))
        place.until(lambda: process.statuses == [0], SOON)
        return {answer["id"]: answer["token_ids"] for answer in place.answers("all")}


def joined(place: Town, router: Job, count: int) -> None:
    place.until(lambda: router.said.count("joined") >= count, SOON)


def busy(place: Town, name: str, count: int = 1) -> None:
    """Until so many have been answered."""
    place.until(lambda: len(place.answers(name)) >= count, SOON)


def all_right(place: Town, router: Job, name: str, wanted: list[dict], expected: dict[str, list[int]]) -> None:
    """The router ends well, with the tokens that each of its requests should have."""
    place.until(lambda: router.statuses != [None], SOON)
    answers = place.answers(name)
    assert router.statuses == [0] and "Traceback" not in router.said, place.said
    assert [answer["id"] for answer in answers] == [request["id"] for request in wanted]
    lengths = {request["id"]: request["max_tokens"] for request in wanted}
    wrong = {a["id"]: a for a in answers if a.get("error") or a["token_ids"] != expected[a["id"]][: lengths[a["id"]]]}
    assert not wrong, f"{wrong}\n{place.said}"
