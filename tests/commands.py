"""Run commands as a user types them, in new processes that import everything themselves.

Time limits are far above what the commands take, for slow machines with other work: nothing waits for them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from tests.conftest import ROOT, eventually
from tests.hosts import NO_NAMES, Host
from tests.processes import Process

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
LIMIT_S = 240  # below pytest's 300


def start(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command in a session of its own. Ranks of torchrun have their own too, which its signals do not reach."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def torchrun(ranks: int, *flags: str, nodes: Sequence[str] = ("--standalone",), host: Host | None = None) -> Process:
    """Start run.py with torchrun. The launcher is a fork, which saves importing torch; the ranks are new processes.

    `nodes`: its flags for a job over several machines. `host`: the machine; None: this one.
    """
    launcher = [*nodes, "--nproc-per-node", str(ranks), "run.py", *flags]
    return Process(launcher, env=NO_NAMES if host else {}, module="torch.distributed.run", host=host)


def finish_torchrun(launcher: Process) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr of torchrun. If it runs too long, end its ranks too and raise."""
    if not eventually(lambda: launcher.status is not None, LIMIT_S):
        for pid in descendants(launcher.pid):
            os.kill(pid, signal.SIGKILL)
    return launcher.finish(10)


def finish(process: subprocess.Popen, timeout: float = LIMIT_S) -> tuple[int, str, str]:
    """Return its exit status, stdout and stderr. If it runs longer, end it and raise AssertionError."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *descendants(process.pid)]:  # its ranks too, because they hold the pipes open
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=10)
        raise AssertionError(f"still running after {timeout} s: {process.args}\n{out}\n{err}") from None
    return process.returncode, out, err


def listed(columns: str) -> list[str]:
    """Return these columns of `ps`, a line per running process."""
    return subprocess.run(["ps", "-axwwo", columns], capture_output=True, text=True, check=True).stdout.splitlines()


def processes(*words: str) -> list[int]:
    """Return the ids of running processes whose command line contains all these words."""
    return [int(line.split()[0]) for line in listed("pid=,args=") if all(word in line for word in words)]


def children(parent: int) -> list[int]:
    """Return the ids of its children."""
    pairs = [tuple(map(int, line.split())) for line in listed("pid=,ppid=")]
    return [pid for pid, its_parent in pairs if its_parent == parent]


def descendants(ancestor: int) -> list[int]:
    """Return the ids of its children, their children, and so on."""
    found = [ancestor]
    for pid in found:
        found += children(pid)
    return found[1:]


def run(
    *flags: str, ranks: int = 0, timeout: float = LIMIT_S, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Run run.py, with torchrun if `ranks` is over 0. Return the exit status, stdout and stderr."""
    launcher = (*TORCHRUN, str(ranks)) if ranks else PYTHON
    return finish(start(*launcher, "run.py", *flags, env=env), timeout)
