"""Compiles Triton kernels into the cache on disk, without a GPU: a process that `compile_ahead.py` starts.

It reads a kernel per line from stdin, as JSON, and answers each with a line. It ends when stdin does. So a rank that is
killed leaves none behind.
"""

import importlib
import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.triton_keys import settle

COMPILED = "compiled"


def compile_kernel(module: str, name: str, target: list[Any], special: str) -> None:
    """Compile a kernel for a kind of GPU. `target`: the fields of a GPUTarget. `special`: see `what_to_compile`."""
    home = importlib.import_module(module)
    settle(home)
    source, options = what_to_compile(getattr(home, name), special)
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    CudaLauncher(source, compiled.metadata)  # C code that passes the arguments: its library is cached, too


def what_to_compile(kernel: Any, special: str) -> tuple[ASTSource, dict[str, Any]]:
    """Return a kernel's source with the types and constants of one launch, and the compiler's options.

    `special`: what Triton's cache hook calls `specialization_data`, a JSON text. `JITFunction.preload` reads it, too,
    but needs a GPU.
    """
    made = json.loads(special)
    constants = zip(made["constant_keys"], map(_constant, made["constant_vals"]), strict=True)
    attributes = zip(made["attrs_keys"], made["attrs_vals"], strict=True)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {argument: _with_tuples(kind) for argument, kind in made["signature"].items()},
        {tuple(path): value for path, value in constants},
        {tuple(path): value for path, value in attributes},
    )
    return source, {option: _with_tuples(value) for option, value in made["options"].items()}


def _with_tuples(value: Any) -> Any:
    """Undo what JSON does to tuples."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return tl.constexpr(value["constexpr"])
    return tl.dtype(value) if tl.dtype.is_dtype(value) else value


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # a module that prints must not answer
    for line in sys.stdin:
        try:
            compile_kernel(**json.loads(line))
            answer = COMPILED
        except Exception as error:  # of Triton's compiler; the rank's own attempt will show all of it
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
