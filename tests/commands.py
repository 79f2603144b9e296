"""Commands as a user types them, in processes that begin with their own imports."""

import os
import signal
import subprocess
import sys

from tests.conftest import ROOT

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """A session of its own. So has each rank that torchrun starts: a signal to torchrun does not reach them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, timeout: float = 90) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *descendants(process.pid)]:  # its ranks too: they hold the pipes open
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=10)
        raise AssertionError(f"still running after {timeout} s: {process.args}\n{out}\n{err}") from None
    return process.returncode, out, err


def listed(columns: str) -> list[str]:
    """A line for each process that runs."""
    return subprocess.run(["ps", "-axwwo", columns], capture_output=True, text=True, check=True).stdout.splitlines()


def processes(*words: str) -> list[int]:
    """Everything running whose command line holds all these words."""
    return [int(line.split()[0]) for line in listed("pid=,args=") if all(word in line for word in words)]


def descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for line in listed("pid=,ppid="):
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def run(*flags: str, ranks: int = 0, timeout: float = 90, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """run.py with these flags, through torchrun if `ranks` is over 0: its exit status, stdout and stderr."""
    launcher = (*TORCHRUN, str(ranks)) if ranks else PYTHON
    return finish(start(*launcher, "run.py", *flags, env=env), timeout)
