"""Keys of Triton's cache that are the same in every process.

A function's key covers the constants of the functions that it calls, but only if their keys were made before its own
(triton 3.6, `DependenciesFinder._update_hash`). So a key would depend on which kernel a process launches first, and
what one process compiles another would not find.
"""

import functools
from threading import Thread
from types import ModuleType

from triton.runtime.cache import triton_key
from triton.runtime.jit import JITCallable


@functools.cache
def hash_triton() -> None:
    """Have Triton hash itself, in a thread. Every key has that, and it takes half a second. Triton keeps it."""
    Thread(target=triton_key, name="triton", daemon=True).start()


@functools.cache
def settle(module: ModuleType) -> None:
    """Make the keys of all functions of a module of ours: a function's after those of the functions that it calls."""
    for value in list(vars(module).values()):  # imported ones come first, then the module's own in their order
        if isinstance(value, ModuleType) and value.__name__.startswith("kernels."):
            settle(value)
        elif isinstance(value, JITCallable):
            _ = value.cache_key
