"""Kernels compiled before their first launch, many at once.

By themselves, Triton and DeepGEMM compile a kernel at its first launch: on a fresh machine, one after the other for
minutes. So the warm-up first rehearses its steps:

    rehearsal   the same steps without launches of new kernels. Threads have these compiled, and keep them on disk
    warm-up     the steps for real. Their kernels are on disk
    serving     threads go on with kernels that few steps need

`triton_ahead.py` and `nvcc_ahead.py` are the two ways in which a kernel is found, left out and compiled.

Others still read what those kernels should have written: torch's own ops, libraries, collectives. So in a rehearsal new
tensors are filled. Counts and places are zeros, which exist everywhere. Values are random, so that a gate spreads
tokens over the experts, and no rank gets all of them.

The ranks of a machine share the work. Files in the caches tell later starts that nothing is missing.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

MOST_AT_ONCE = 16
NEW = (torch.empty, torch.empty_like, torch.Tensor.new_empty)  # which return memory as it is
Compile = Callable[[], str | None]  # returns None, or what went wrong
Offer = Callable[[str, Compile], None]


class Compiler(Protocol):
    cache: Path  # where its kernels are kept
    identity: str  # what they depend on, besides our code

    def installed(self) -> AbstractContextManager[None]:
        """Have the library find the kernels: those that it needs inside, and later in this process."""
        ...

    def rehearsal(self, offer: Offer) -> AbstractContextManager[None]:
        """Launch no kernel inside that is not compiled. Call `offer(name, compile)` for each, as often as it comes."""
        ...

    def close(self) -> None:
        """Compile nothing any more: what is being compiled ends soon. It may be called again, by any thread."""
        ...


class CompileAhead:
    """Compiles with threads of its own until it is closed."""

    def __init__(self, compilers: Sequence[Compiler], what: str, place: int = 0, ranks: int = 1) -> None:
        """`what`: what the kernels depend on besides their code. This is rank `place` of `ranks` of this machine."""
        self._compilers, self._place, self._ranks = compilers, place, ranks
        code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
        text = "\n".join([what, f"{place} of {ranks}", *(compiler.identity for compiler in compilers), *code])
        name = f"moesaic-{hashlib.sha256(text.encode()).hexdigest()}"
        self._marks = [compiler.cache / name for compiler in compilers]
        self._threads = ThreadPoolExecutor(max(1, min(MOST_AT_ONCE, len(os.sched_getaffinity(0)) // ranks)))
        self._offered: dict[str, Future[str | None] | None] = {}  # by name; None: another rank's
        self._awaited: list[Future[str | None]] = []  # by `wait`
        self._behind = self._closed = False

    @property
    def is_done(self) -> bool:
        """Whether an earlier start has compiled all of this rank's share, on this machine."""
        return all(mark.exists() for mark in self._marks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the libraries find the kernels: those that they need inside, and later in this process."""
        with ExitStack() as stack:
            for compiler in self._compilers:
                stack.enter_context(compiler.installed())
            yield

    @contextmanager
    def rehearsal(self, behind: bool = False) -> Iterator[None]:
        """Launch no kernel inside that is not compiled: have it compiled, by this rank or another of this machine.

        `behind`: `wait` does not wait for those that only this rehearsal needs. Let it be the last one.
        """
        self._behind = behind
        with ExitStack() as stack:
            for compiler in self._compilers:
                stack.enter_context(compiler.rehearsal(self.offer))
            stack.enter_context(_Filled())
            yield

    def offer(self, name: str, compile: Compile) -> None:
        """Have a kernel compiled once, if it is this rank's share. The first to come is the first to be compiled."""
        if name not in self._offered:
            mine = int(hashlib.sha256(name.encode()).hexdigest(), 16) % self._ranks == self._place
            self._offered[name] = future = self._threads.submit(compile) if mine else None
            if future is not None and not self._behind:
                self._awaited.append(future)

    def wait(self, progress: Callable[[range, str], Any]) -> None:
        """Wait until this rank's kernels are compiled, or cannot be."""
        done = as_completed(self._awaited)
        for _ in progress(range(len(self._awaited)), "kernels"):
            next(done)

    def finish(self) -> list[str] | None:
        """Wait for all kernels, tell later starts that nothing is missing, and close. Returns what went wrong, by line.

        Any thread may call it. No kernel is offered any more. If it is closed meanwhile, nothing is told: None.
        """
        futures = [future for future in self._offered.values() if future is not None]
        problems = [problem for future in futures if (problem := _problem(future)) is not None]
        if self._closed:
            return None
        for mark in self._marks if not problems else ():
            try:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            except OSError as error:
                problems.append(str(error))
        self.close()
        return problems

    def close(self) -> None:
        """Compile nothing any more. It may be called again, by any thread."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for compiler in self._compilers:
            compiler.close()
        self._threads.shutdown()


def _problem(future: Future[str | None]) -> str | None:
    """Wait for a kernel. Return what went wrong, or None."""
    try:
        error = future.exception()
    except CancelledError:
        return "closed"
    return future.result() if error is None else f"{type(error).__name__}: {error}"


class _Filled(TorchFunctionMode):
    """Fills every tensor that Python code makes without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in NEW and out.numel():
            return out.uniform_() if out.dtype in (torch.bfloat16, torch.float32) else out.zero_()
        return out
