"""Run run.py, or `python -m MODULE`, in processes of their own that start in under a second.

A fork server has already imported torch. Each process is a fork of it, in a session of its own, and executes run.py or
the module as `__main__`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from scripts.tools.demo import free_port
from tests.conftest import ROOT
from tests.hosts import Host

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fork server inherits the environment, and every process from it
fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["run", "pytest", "hypothesis"])
_folder = tempfile.TemporaryDirectory(prefix="moesaic-processes-")


def world(ranks: int, hosts: Sequence[Host] = ()) -> list[dict[str, str]]:
    """Return the environment that torchrun gives to each rank. A single rank gets none, as without torchrun.

    `hosts`: one per rank; none: all are on this machine.
    """
    if ranks == 1:
        return [{}]
    addresses = [host.address for host in hosts] or ["127.0.0.1"] * ranks
    common = {"MASTER_ADDR": addresses[0], "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    made = []
    for rank, address in enumerate(addresses):
        made.append(common | {"RANK": str(rank), "LOCAL_RANK": str(addresses[:rank].count(address))})
        if hosts:
            made[-1]["LOCAL_WORLD_SIZE"] = str(addresses.count(address))
    return made


def _child(
    module: str,
    argv: list[str],
    out: Path,
    err: Path,
    env: dict[str, str],
    constants: dict[str, Any],
    host: Callable[[], None] | None,
) -> None:
    os.setsid()
    if host is not None:
        host()
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # run.py replaces some of these objects: the files below them must stay open.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env)
    os.chdir(ROOT)
    for name, value in constants.items():
        owner, _, constant = name.rpartition(".")
        assert hasattr(import_module(owner), constant), name
        setattr(import_module(owner), constant, value)
    sys.argv = [f"{module}.py", *argv]
    status = 0
    try:
        if module == "run":
            runpy.run_path("run.py", run_name="__main__")  # leaves by os._exit, unless it raises
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


class Process:
    """A process of run.py. constants: `{"disagg.front.fleet.SILENT_S": 2}` sets that constant before it starts."""

    _count = 0

    def __init__(
        self,
        argv: list[str],
        out: Path | None = None,
        err: Path | None = None,
        env: dict[str, str] | None = None,
        constants: dict[str, Any] | None = None,
        module: str = "run",
        host: Callable[[], None] | None = None,
    ) -> None:
        """`argv`: the flags. `out`, `err`: files to which its streams are appended; new ones if None.

        `host()` moves the process to another host (tests/hosts.py).
        """
        Process._count += 1
        self._out = out or Path(_folder.name, f"{Process._count}.out")
        self._err = err or Path(_folder.name, f"{Process._count}.err")
        self._argv = argv
        args = module, argv, self._out, self._err, env or {}, constants or {}, host
        # A benchmark may start processes in its turn, which a daemon may not.
        self._process = fork_server.Process(target=_child, args=args, daemon=module == "run")
        self._process.start()

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status: None while it runs, -N if signal N ended it."""
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def until(self, text: str, seconds: float = 30) -> None:
        """Wait until it has printed `text` to either stream."""
        deadline = time.monotonic() + seconds
        while text not in self.err and text not in self.out:
            assert time.monotonic() < deadline and self.status is None, f"no {text!r}: {self}"
            time.sleep(0.01)

    def finish(self, seconds: float = 90) -> tuple[int, str, str]:
        """Return its exit status, stdout and stderr. If it runs longer, end it and raise AssertionError."""
        self._process.join(seconds)
        if self.status is None:
            self.end()
            raise AssertionError(f"still running after {seconds} s: {self}")
        return self.status, self.out, self.err

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def __str__(self) -> str:
        return f"run.py {' '.join(self._argv)}, status {self.status}\n{self.out}\n{self.err}"


class Job:
    """The ranks of one job. Unlike torchrun, it does not end the other ranks when one has failed."""

    def __init__(
        self,
        argv: list[str],
        ranks: int = 1,
        log: Path | None = None,
        constants: dict[str, Any] | None = None,
        module: str = "run",
        env: dict[str, str] | None = None,
        hosts: Sequence[Host] = (),
    ) -> None:
        """`log`: one file for the output of all ranks; a file per rank and stream if None. `env`: for all ranks.

        `hosts`: one per rank; none: this machine.
        """
        environments, places = world(ranks, hosts), hosts or [None] * ranks
        self.ranks = [
            Process(argv, log, log, (env or {}) | own, constants, module, place)
            for own, place in zip(environments, places, strict=True)
        ]

    def signal(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            rank.signal(number)

    @property
    def statuses(self) -> list[int | None]:
        return [rank.status for rank in self.ranks]

    @property
    def said(self) -> str:
        """The text of all logs, each once."""
        return "".join({rank._err: rank.err for rank in self.ranks}.values())

    def finish(self, seconds: float = 90) -> tuple[int, str, str]:
        """Return the worst status of the ranks, and everything that they printed to stdout and to stderr."""
        ended = [rank.finish(seconds) for rank in self.ranks]
        codes, outs, errs = zip(*ended, strict=True)
        return max(codes, key=abs), "".join(outs), "".join(errs)

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


def run_module(
    module: str, *flags: str, ranks: int = 1, timeout: float = 200, constants: dict[str, Any] | None = None
) -> subprocess.CompletedProcess:
    """Run `python -m MODULE`. Return its output and exit status."""
    status, out, err = Job(list(flags), ranks, constants=constants, module=module).finish(timeout)
    return subprocess.CompletedProcess([module, *flags], status, out, err)


class ForkedPopen:
    """Stands for the `Popen` of a benchmark that starts jobs of run.py: the same process, from the fork server."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str], stdout: IO, stderr: IO) -> None:
        assert command[:2] == [sys.executable, "run.py"] and cwd == ROOT
        self._run = Process(command[2:], Path(stdout.name), Path(stderr.name), env)

    @property
    def returncode(self) -> int | None:
        return self._run.status

    def poll(self) -> int | None:
        return self._run.status

    def kill(self) -> None:
        self._run.end()

    def wait(self) -> None:
        self._run.finish()
