"""Triton's kernels compiled ahead (`compile_ahead.py`), each by one of several processes, into Triton's cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager

from kernels import gate, route
from kernels.compile_ahead import Offer
from kernels.triton_worker import COMPILED, what_to_compile

# They say where tokens go: what ranks exchange depends on it.
PLACES = (
    gate.gate_kernel,
    route.count_kernel,
    route.sum_blocks_kernel,
    route.place_kernel,
    route.place_masked_kernel,
    route.scatter_masked_kernel,
)


class TritonAhead:
    def __init__(self, alone: bool) -> None:
        """`alone`: no other rank in this job. Otherwise kernels that say where tokens go compile here, and run."""
        self._alone, self.cache = alone, Path(triton.knobs.cache.dir)
        target = triton.runtime.driver.active.get_current_target()
        self._target = [target.backend, target.arch, target.warp_size]
        self.identity = f"triton {triton.__version__} {self._target}"
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        of_worker = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._environment = os.environ | of_worker  # threads start workers while this process changes its own
        self._lock, self._closed = threading.Lock(), False
        self._own, self._processes = threading.local(), []  # each thread has a process, which starts with its first job

    def installed(self) -> AbstractContextManager[None]:
        return nullcontext()  # Triton looks into its cache

    @contextmanager
    def rehearsal(self, offer: Offer) -> Iterator[None]:
        """Launch no kernel inside that has not been compiled in this process: offer it."""
        runtime = triton.knobs.runtime
        before, runtime.jit_cache_hook = runtime.jit_cache_hook, partial(self._leave_out, offer)
        try:
            yield
        finally:
            runtime.jit_cache_hook = before

    def _leave_out(self, offer: Offer, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles a kernel. Returns whether it shall neither compile it nor launch it."""
        if fn.jit_function in PLACES and not self._alone:
            return False
        offer(f"{fn.name} {key}", partial(self._compile, fn, compile["specialization_data"]))
        return True

    def _compile(self, fn: Any, special: str) -> str | None:
        """Compile a kernel, unless it is cached. Returns None, or what went wrong."""
        if self._is_cached(fn.jit_function, special):
            return None
        try:
            process = getattr(self._own, "process", None) or self._start()
            assert process.stdin is not None and process.stdout is not None
            job = {"module": fn.module, "name": fn.name, "target": self._target, "special": special}
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = process.stdout.readline().rstrip("\n")
        except OSError:
            answer = ""
        if answer == COMPILED:
            return None
        if not answer:
            self._own.process = None  # the thread's next job gets another
        return f"{fn.name}: {answer or 'its process ended'}"

    def _is_cached(self, kernel: Any, special: str) -> bool:
        """Return whether Triton's cache on disk has a kernel, under the key that `triton.compile` makes."""
        source, options = what_to_compile(kernel, special)
        backend = make_backend(GPUTarget(*self._target))
        key = get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
        manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return manager.get_file(f"{source.name[:150]}.json") is not None

    def _start(self) -> subprocess.Popen[str]:
        """Start this thread's process. Raises OSError if it cannot be, also because all is closed."""
        with self._lock:
            if self._closed:
                raise OSError("closed")
            process = self._own.process = subprocess.Popen(
                [sys.executable, "-m", "kernels.triton_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
            self._processes.append(process)
        return process

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for process in self._processes:
            process.kill()
            process.wait()
