"""DeepGEMM's kernels compiled ahead (`compile_ahead.py`), into a store in DeepGEMM's cache.

DeepGEMM builds a kernel when it first needs it: it writes the source to a folder, runs nvcc, which takes seconds, and
loads the cubin. It does not build without a launch. But its nvcc can be chosen. So a stand-in comes first: a shell
script, which leaves most of its work to `nvcc_stand_in.py`.

    rehearsal   the script notes its arguments, and fails. So does the call: it is left out
    meanwhile   threads run nvcc for what was noted, and put the cubins into the store
    warm-up     DeepGEMM builds again. `nvcc_stand_in.py` gives it the cubins
    serving     the same, whenever a kernel is needed first

The store has a cubin per kernel, under a hash of all that it depends on. Jobs and ranks of a machine share it.
"""

import ctypes
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from kernels import nvcc_stand_in
from kernels.compile_ahead import Offer

NVCC = "DG_JIT_NVCC_COMPILER"  # environment variable: DeepGEMM reads it once, before its first build
NOTE = "MOESAIC_NOTE"  # environment variable: the file for the script's note, set in a rehearsal
# DeepGEMM waits for each note, and a shell starts sooner than Python. `Build.of` has the same rules.
STAND_IN = f"""#!/bin/sh
case " $* " in
*" --ptxas-options="*verbose*) ;;
*" -cubin "*)
    if [ -n "${{{NOTE}-}}" ]; then
        printf '%%s\\0' "$PWD" "$@" >"${NOTE}"
        exit 1
    fi
    ;;
esac
exec %s "$@"
"""
NICE = 10  # of 19: serving comes first
FAILED = b"NVCC compilation failed"  # DeepGEMM prints it, and then what nvcc said
Result = TypeVar("Result")
rehearsing: "NvccAhead | None" = None  # whose rehearsal goes on, if one does


class NvccAhead:
    def __init__(self, nvcc: str, cache: Path) -> None:
        """`nvcc`: the true one. `cache`: DeepGEMM's. Raises OSError without nvcc, or if no program may be put there."""
        self.nvcc, self.cache = nvcc, cache.absolute() / "moesaic"
        version = getattr(sys.modules.get("deep_gemm"), "__version__", "")
        self.identity = f"deep_gemm {version} {nvcc_stand_in.identity(nvcc)}"
        self._left_out: set[Hashable] = set()
        self._environment = dict(os.environ)  # of programs: threads start them while this process changes its own
        self._running: set[subprocess.Popen] | None = set()  # None: closed
        self._lock = threading.Lock()  # of that set
        command = [sys.executable, "-I", "-S", nvcc_stand_in.__file__, nvcc, str(self.cache)]
        self._stand_in = self._program(STAND_IN % shlex.join(command))

    @classmethod
    def of_deep_gemm(cls) -> "NvccAhead":
        """Find nvcc and the cache as DeepGEMM itself does. Raises OSError as the constructor does."""
        try:
            return cls(find_nvcc(), Path(os.environ.get("DG_JIT_CACHE_DIR") or Path.home() / ".deep_gemm"))
        except RuntimeError as error:  # of a user without a home
            raise OSError(str(error)) from None

    def _program(self, script: str) -> str:
        """Make a script a program in the cache, named after its text. Returns its path."""
        path = str(self.cache / f"nvcc-{hashlib.sha256(script.encode()).hexdigest()[:16]}")
        if shlex.quote(path) != path:
            raise OSError(f"{path}: DeepGEMM's command line would not quote it")
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.cache, delete=False) as file:
            file.write(script)
        os.chmod(file.name, 0o755)
        os.replace(file.name, path)
        if not os.access(path, os.X_OK):
            raise OSError(f"{path}: programs may not run in that folder")
        return path

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, DeepGEMM must come to its first kernel in this process. From then on it has the stand-in for nvcc."""
        with environment(NVCC, self._stand_in):
            yield

    @contextmanager
    def rehearsal(self, offer: Offer) -> Iterator[None]:
        """Leave out calls of DeepGEMM inside whose kernels are not compiled, and offer these."""
        global rehearsing
        with tempfile.TemporaryDirectory() as folder, environment(NOTE, f"{folder}/note"):
            self._offer, self._note, rehearsing = offer, Path(folder, "note"), self
            try:
                yield
            finally:
                rehearsing = None

    def attempt(self, what: Hashable, call: Callable[[], Result]) -> Result | None:
        """Call DeepGEMM. Return None if that is left out. `what` tells calls apart that may need different kernels."""
        if what in self._left_out:
            return None
        try:
            with without_failure():
                return call()
        except RuntimeError:  # DeepGEMM's for a failed build. If it is another's, the warm-up itself will show it
            self._left_out.add(what)
            try:
                self._take_note()
            except OSError as error:
                self._offer(str(what), partial(str, error))  # a problem, so that later starts rehearse again
            return None

    def _take_note(self) -> None:
        """Offer the kernel that was noted. Raises OSError if there is no note, or its source is gone."""
        folder, *arguments = os.fsdecode(self._note.read_bytes()).removesuffix("\0").split("\0")
        self._note.unlink()
        if (build := nvcc_stand_in.Build.of(arguments, folder)) is not None:
            job = build.job(self.nvcc)
            key = nvcc_stand_in.key_of(job)
            self._offer(key, partial(self._compile, key, json.loads(job)))
            with suppress(OSError):
                build.forget()

    def _compile(self, key: str, job: dict) -> str | None:
        """Compile what was noted, into the store. Returns None, or what went wrong."""
        result = self.cache / f"{key}.cubin"
        return None if result.exists() else self._run(job["source"], job["flags"], result)

    def _run(self, source: str, flags: list[str], result: Path) -> str | None:
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            Path(folder, "kernel.cu").write_bytes(source.encode("latin-1"))
            command = [self.nvcc, "kernel.cu", "-cubin", "-o", "kernel.cubin", *flags]
            status, said = self._call(command, folder)
            if status:
                lines = said.decode(errors="replace").split("\n")
                return f"{self.nvcc}: {next(filter(None, lines), f'status {status}')}"
            os.replace(Path(folder, "kernel.cubin"), result)
        return None

    def _call(self, command: list[str], folder: str) -> tuple[int, bytes]:
        """Run a program, with those that it starts behind all others of the machine. Returns its status and output."""
        with self._lock:
            if self._running is None:
                return -1, b"closed"
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            self._running.add(process)
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PGRP, process.pid, NICE)
        said, _ = process.communicate()
        with self._lock:
            if self._running is not None:
                self._running.remove(process)
        return process.returncode, said

    def close(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        for process in running or ():
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside."""
    before, os.environ[name] = os.environ.get(name), value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    default = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return os.environ.get(NVCC) or default


@contextmanager
def without_failure() -> Iterator[None]:
    """Keep back what C code prints to stdout inside, from the news of a failed build on."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)  # all streams
    stdout = os.dup(1)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
            printed.seek(0)
            if kept := printed.read().partition(FAILED)[0]:
                with suppress(OSError):  # nobody reads it
                    os.write(1, kept)
