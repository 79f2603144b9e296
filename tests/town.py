"""A deployment of real processes on this machine that a test can freeze, kill and replace.

A fork server imports run.py once; each rank is a fork of it that calls run.main(), and is up in under a second.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["run"])


def free_port() -> int:
    """Below those that the system deals out, or another process might get it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank(argv: list[str], log: Path, env: dict[str, str], constants: dict[str, Any]) -> None:
    """The child: run.py with these flags. `constants` are set beforehand: "disagg.fleet.SILENT_S": 2."""
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    os.chdir(ROOT)
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        assert hasattr(import_module(module), constant), name
        setattr(import_module(module), constant, value)
    sys.argv = ["run.py", *argv]
    status = 1
    try:
        status = import_module("run").main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


class Process:
    """One rank."""

    def __init__(self, argv: list[str], log: Path, env: dict[str, str], constants: dict[str, Any]):
        self._process = _context.Process(target=_rank, args=(argv, log, env, constants), daemon=True)
        self._process.start()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    @property
    def status(self) -> int | None:
        return self._process.exitcode

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class Job:
    """The ranks of one job. Torchrun's part, to end the others when one has failed, is left out."""

    def __init__(self, ranks: list[Process], log: Path):
        self.ranks, self.log = ranks, log

    def signal(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            rank.signal(number)

    @property
    def statuses(self) -> list[int | None]:
        return [rank.status for rank in self.ranks]

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Town:
    """A router's address, and all that was started for it."""

    def __init__(self, folder: Path, model: Path, constants: dict[str, Any]):
        self.folder, self.model, self.constants = folder, str(model), constants
        self.port = free_port()
        self.jobs: list[Job] = []

    def start(self, role: str, ranks: int = 1, *flags: str) -> Job:
        log = self.folder / f"{len(self.jobs)}-{role}.log"
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        argv = ["--role", role, "--model", self.model, *flags]
        started = [
            Process(
                argv, log, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}, self.constants
            )
            for rank in range(ranks)
        ]
        self.jobs.append(Job(started, log))
        return self.jobs[-1]

    def worker(self, role: str, ranks: int = 1, *flags: str) -> Job:
        return self.start(role, ranks, "--router", f"127.0.0.1:{self.port}", "--device", "cpu", *flags)

    def router(self, requests: list[dict], name: str) -> Job:
        """Answers go to `answers(name)`."""
        source = self.folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(request) + "\n" for request in requests))
        where = "--listen", f"127.0.0.1:{self.port}"
        return self.start("router", 1, *where, "--input", str(source), "--output", str(self.folder / f"{name}.out"))

    def answers(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.out"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """AssertionError, with all that was said, if it does not come true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{self.said}"
            time.sleep(0.02)

    @property
    def said(self) -> str:
        return "\n".join(f"--- {job.log.name} {job.statuses}\n{job.said}" for job in self.jobs)

    def end(self) -> None:
        for job in self.jobs:
            for rank in job.ranks:
                rank.end()


@contextmanager
def town(folder: Path, model: Path, **constants: Any) -> Iterator[Town]:
    """constants: disagg__fleet__SILENT_S=2 sets that constant in every process."""
    place = Town(folder, model, {name.replace("__", "."): value for name, value in constants.items()})
    try:
        yield place
    finally:
        place.end()
