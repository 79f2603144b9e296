"""Stands before nvcc when DeepGEMM builds a kernel; `nvcc_ahead.py` says why.

    python nvcc_stand_in.py NVCC STORE [nvcc's arguments]

It gives what the store has. In a rehearsal it only notes what is missing, and fails. All else is left to nvcc. It is a
process for each kernel, so it imports little.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from typing import NamedTuple

NOTES = "MOESAIC_NOTES"  # environment variable: the folder for the notes of a rehearsal, set in one


class Build(NamedTuple):
    """A kernel to be compiled: nvcc's arguments, apart."""

    source: str  # a path
    cubin: str  # a path
    flags: list[str]

    @classmethod
    def of(cls, arguments: list[str]) -> "Build | None":
        """Return the build, or None if nvcc is asked for something else, as for what it prints if it is verbose."""
        sources = [argument for argument in arguments if argument.endswith(".cu")]
        if len(sources) != 1 or "-cubin" not in arguments or "-o" not in arguments or "verbose" in str(arguments):
            return None
        at = arguments.index("-o")
        flags = [flag for flag in arguments[:at] + arguments[at + 2 :] if flag not in (sources[0], "-cubin")]
        return cls(sources[0], arguments[at + 1], flags)

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


def serve(build: Build, nvcc: str, store: str) -> bool:
    """Give the store's cubin. If it has none, return False, and in a rehearsal note the job."""
    job = build.job(nvcc)
    key = hashlib.sha256(job.encode()).hexdigest()
    try:
        with open(os.path.join(store, f"{key}.cubin"), "rb") as file:
            cubin = file.read()
    except FileNotFoundError:
        if notes := os.environ.get(NOTES):
            with open(os.path.join(notes, key), "w") as file:
                file.write(job)
        return False
    with open(build.cubin, "wb") as file:
        file.write(cubin)
    return True


def main(nvcc: str, store: str, *arguments: str) -> None:
    build = Build.of(list(arguments))
    if build is not None:
        with suppress(OSError):
            if serve(build, nvcc, store):
                return
        if NOTES in os.environ:
            with suppress(OSError):
                build.forget()
            sys.exit(1)
    os.execv(nvcc, [nvcc, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
