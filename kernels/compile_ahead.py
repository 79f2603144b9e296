"""Kernels compiled before their first launch, many at once.

By themselves, Triton and DeepGEMM compile a kernel at its first launch: on a fresh machine, one after the other for
minutes. So the warm-up first rehearses its steps:

    rehearsal   the same steps without launches of new kernels. Threads have these compiled, and keep them on disk
    warm-up     the steps for real. Their kernels are on disk

`triton_ahead.py` and `nvcc_ahead.py` are the two ways in which a kernel is found, left out and compiled.

Others still read what those kernels should have written: torch's own ops, libraries, collectives. So in a rehearsal new
tensors are filled. Counts and places are zeros, which exist everywhere. Values are random, so that a gate spreads
tokens over the experts, and no rank gets all of them.

The ranks of a machine share the work. A file in each cache tells later starts that nothing is missing.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
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

    def rehearsal(self, offer: Offer) -> AbstractContextManager[None]:
        """Launch no kernel inside that is not compiled. Call `offer(name, compile)` for each, as often as it comes."""
        ...

    def close(self) -> None:
        """Undo all that a rehearsal has changed. No thread compiles any more."""
        ...


class CompileAhead:
    """Close it (`with`), so that nothing is compiled any more if the start fails."""

    def __init__(self, compilers: Sequence[Compiler], what: str, place: int = 0, ranks: int = 1) -> None:
        """`what`: what the kernels depend on besides their code. This is rank `place` of `ranks` of this machine."""
        self._compilers, self._place, self._ranks = compilers, place, ranks
        code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
        text = "\n".join([what, *(compiler.identity for compiler in compilers), *code])
        name = f"moesaic-{hashlib.sha256(text.encode()).hexdigest()}"
        self._marks = [compiler.cache / name for compiler in compilers]
        self._threads = ThreadPoolExecutor(max(1, min(MOST_AT_ONCE, len(os.sched_getaffinity(0)) // ranks)))
        self._offered: dict[str, Future[str | None] | None] = {}  # by name; None: another rank's

    def __enter__(self) -> "CompileAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for compiler in self._compilers:
            compiler.close()

    @property
    def is_done(self) -> bool:
        """Whether an earlier start has compiled everything, on this machine."""
        return all(mark.exists() for mark in self._marks)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Launch no kernel inside that is not compiled: have it compiled, by this rank or another of this machine."""
        with ExitStack() as stack:
            for compiler in self._compilers:
                stack.enter_context(compiler.rehearsal(self.offer))
            stack.enter_context(_Filled())
            yield

    def offer(self, name: str, compile: Compile) -> None:
        """Have a kernel compiled once, if it is this rank's share."""
        if name not in self._offered:
            mine = int(hashlib.sha256(name.encode()).hexdigest(), 16) % self._ranks == self._place
            self._offered[name] = self._threads.submit(compile) if mine else None

    def finish(self, progress: Callable[[range, str], Any]) -> list[str]:
        """Wait until this rank's kernels are compiled. Returns what went wrong, a line each."""
        futures = [future for future in self._offered.values() if future is not None]
        done = as_completed(futures)
        for _ in progress(range(len(futures)), "kernels"):
            next(done)
        problems = [problem for future in futures if (problem := _problem(future)) is not None]
        if not problems:
            for mark in self._marks:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
        return problems


def _problem(future: Future[str | None]) -> str | None:
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


class _Filled(TorchFunctionMode):
    """Fills every tensor that Python code makes without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in NEW and out.numel():
            return out.uniform_() if out.dtype in (torch.bfloat16, torch.float32) else out.zero_()
        return out
