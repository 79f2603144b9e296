"""Triton kernels compiled before their first launch, in many processes at once.

A kernel compiles at its first launch: on a fresh machine, one after the other for a minute and more. So the warm-up
first rehearses its steps:

    rehearsal   no Triton kernel is launched. Each that is new goes to a process, which compiles it into Triton's cache
    warm-up     the same steps for real. Their kernels are in the cache

Others still read what those kernels should have written: torch's own ops, libraries, collectives. So in a rehearsal new
tensors are filled. Counts and places are zeros, which exist everywhere. Values are random, so that a gate spreads
tokens over the experts, and no rank gets all of them.

The ranks of a machine share the work, and the cache. A file in the cache tells later starts that nothing is missing.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager

from kernels.compile_worker import COMPILED, what_to_compile

MOST_WORKERS = 16
PLACES = ("_gate_kernel", "_count_kernel", "_place_kernel", "_place_masked_kernel")  # what they write, ranks exchange
NEW = ("aten::empty", "aten::new_empty")  # ops that return memory as it is


class CompileAhead:
    def __init__(self, what: str, place: int = 0, ranks: int = 1, alone: bool = True) -> None:
        """`what`: all that the kernels depend on besides their code. This is rank `place` of `ranks` of a machine.

        `alone`: no other rank in this job. Otherwise kernels that say where tokens go compile here, and run.
        """
        self._place, self._ranks, self._alone = place, ranks, alone
        target = triton.runtime.driver.active.get_current_target()
        self._target = [target.backend, target.arch, target.warp_size]
        code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        text = "\n".join([what, triton.__version__, str(self._target)]).encode()
        self._mark = Path(triton.knobs.cache.dir, f"moesaic-{hashlib.sha256(text + b''.join(code)).hexdigest()}")
        self._workers = _Workers(max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks)))
        self._sent: dict[str, Future[str] | None] = {}  # by name and key; None: cached, or another rank's

    @property
    def is_done(self) -> bool:
        """Whether an earlier start has compiled everything, on this machine."""
        return self._mark.exists()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Launch no kernel inside that has not been compiled in this process: send it to a worker."""
        runtime = triton.knobs.runtime
        before, runtime.jit_cache_hook = runtime.jit_cache_hook, self._leave_out
        try:
            with _Filled():
                yield
        finally:
            runtime.jit_cache_hook = before

    def _leave_out(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles a kernel. Returns whether it shall neither compile it nor launch it."""
        if fn.name in PLACES and not self._alone:
            return False
        name = f"{fn.name} {key}"
        if name not in self._sent:
            mine = int(hashlib.sha256(name.encode()).hexdigest(), 16) % self._ranks == self._place
            special = compile["specialization_data"]
            job = {"module": fn.module, "name": fn.name, "target": self._target, "special": special}
            missing = mine and not self._is_cached(fn.jit_function, special)
            self._sent[name] = self._workers.submit(job) if missing else None
        return True

    def _is_cached(self, kernel: Any, special: str) -> bool:
        """Return whether Triton's cache on disk has a kernel, under the key that `triton.compile` makes."""
        source, options = what_to_compile(kernel, special)
        backend = make_backend(GPUTarget(*self._target))
        key = get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
        manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return manager.get_file(f"{source.name[:150]}.json") is not None

    def finish(self, progress: Callable[[range, str], Any]) -> list[str]:
        """Wait for the workers and end them. Returns what they could not compile, a line each."""
        futures = [future for future in self._sent.values() if future is not None]
        done = as_completed(futures)
        for _ in progress(range(len(futures)), "kernels"):
            next(done)
        self._workers.close()
        problems = [future.result() for future in futures if future.result() != COMPILED]
        if not problems:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
        return problems


class _Workers:
    """Threads, each with a process of its own, which starts with its first job."""

    def __init__(self, count: int) -> None:
        self._threads, self._own = ThreadPoolExecutor(count), threading.local()
        self._processes: list[subprocess.Popen[str]] = []

    def submit(self, job: dict[str, Any]) -> Future[str]:
        """Compile a kernel. The result is COMPILED, or says what went wrong."""
        return self._threads.submit(self._compile, job)

    def _compile(self, job: dict[str, Any]) -> str:
        try:
            process = self._own.process
        except AttributeError:
            process = self._own.process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = process.stdout.readline().rstrip("\n") or "its process ended"
        except OSError as error:
            answer = str(error)
        return answer if answer == COMPILED else f"{job['name']}: {answer}"

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "kernels.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()  # closes its stdin, which ends it


class _Filled(TorchDispatchMode):
    """Fills every tensor that is made without values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0].startswith(NEW) and out.numel():
            return out.uniform_() if out.dtype in (torch.bfloat16, torch.float32) else out.zero_()
        return out
