"""Stands before nvcc when DeepGEMM builds a kernel; `nvcc_ahead.py` says why.

    python nvcc_stand_in.py NVCC STORE [nvcc's arguments]

It gives what the store has. All else is left to nvcc. It is a process for each kernel, so it imports little.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from typing import NamedTuple


class Build(NamedTuple):
    """A kernel to be compiled: nvcc's arguments, apart."""

    source: str  # a path
    cubin: str  # a path
    flags: list[str]

    @classmethod
    def of(cls, arguments: list[str], folder: str = "") -> "Build | None":
        """Return the build, or None if nvcc is asked for something else, as for what it prints if it is verbose.

        `folder`: the one that nvcc was started in, if not this process's.
        """
        sources = [argument for argument in arguments if argument.endswith(".cu")]
        verbose = any(arg.startswith("--ptxas-options=") and "verbose" in arg for arg in arguments)
        if len(sources) != 1 or "-cubin" not in arguments or "-o" not in arguments or verbose:
            return None
        at = arguments.index("-o")
        flags = [flag for flag in arguments[:at] + arguments[at + 2 :] if flag not in (sources[0], "-cubin")]
        return cls(os.path.join(folder, sources[0]), os.path.join(folder, arguments[at + 1]), flags)

    def job(self, nvcc: str) -> str:
        """Return all that the cubin depends on, as JSON. The paths do not count."""
        with open(self.source, encoding="latin-1", newline="") as file:  # any bytes, unchanged
            return json.dumps({"source": file.read(), "flags": self.flags, "nvcc": identity(nvcc)})

    def forget(self) -> None:
        """Remove the folder that DeepGEMM made for this one build, and leaves behind if it fails."""
        folder = os.path.dirname(self.source)
        if folder == os.path.dirname(self.cubin):
            os.remove(self.source)
            os.rmdir(folder)


def identity(nvcc: str) -> list[str | int]:
    stat = os.stat(nvcc)
    return [nvcc, stat.st_size, stat.st_mtime_ns]


def key_of(job: str) -> str:
    return hashlib.sha256(job.encode()).hexdigest()


def serve(build: Build, nvcc: str, store: str) -> None:
    """Give the store's cubin. Raises FileNotFoundError if it has none."""
    with open(os.path.join(store, f"{key_of(build.job(nvcc))}.cubin"), "rb") as file:
        cubin = file.read()
    with open(build.cubin, "wb") as file:
        file.write(cubin)


def main(nvcc: str, store: str, *arguments: str) -> None:
    build = Build.of(list(arguments))
    if build is not None:
        with suppress(OSError):
            serve(build, nvcc, store)
            return
    os.execv(nvcc, [nvcc, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
