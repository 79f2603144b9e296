"""The process's own streams, and how many files it may open.

A batch goes on if a shell has closed the streams, or if the reader of stderr ends.

In a job of several ranks each line on stderr begins with its host and rank, tracebacks and warnings too. Only here:
whoever prints need not know. What native libraries write goes past this.
"""

import io
import os
import resource
import sys
from contextlib import suppress
from typing import Any

LEAST_FILES = 256  # that a process must be allowed to open


class Unread(io.FileIO):
    """A file descriptor that accepts all data, and drops it if it cannot be written."""

    def write(self, data: Any, /) -> int:  # bytes or any other buffer, a type that Python 3.11 has no name for
        try:
            written = super().write(data)
        except OSError:
            return len(data)
        return len(data) if written is None else written  # None: it does not wait for its reader, and is full


class Named(Unread):
    """The same, with a name at the beginning of each line."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, "w", closefd=False)
        self._name, self._is_new = f"[{name}] ".encode(), True

    def write(self, data: Any, /) -> int:
        """Write a line in one piece if it comes in one, so that the lines of ranks that share a file do not mix."""
        lines = bytes(data).splitlines(keepends=True)  # a bar's "\r" begins a line, too
        named = [self._name + line if i or self._is_new else line for i, line in enumerate(lines)]
        self._is_new = bytes(data).endswith((b"\n", b"\r"))
        rest = b"".join(named)
        while rest:
            rest = rest[super().write(rest) :]
        return len(data)


def secure_streams(name: str = "") -> None:
    """Open the streams that are closed. Call it before any file is opened: a file could get a stream's number.

    `name`: what each line on stderr begins with; "": nothing.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `number`
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    lossy = io.BufferedWriter(Named(2, name) if name else Unread(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(lossy, errors="backslashreplace", line_buffering=True)


def raise_file_limit() -> None:
    """Allow as many open files as the system does. Links take several each, strangers one for each connection."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # macOS has a limit that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_file_limit() -> None:
    """Raise ValueError if this process may open too few files. With two dozen, some library ends it, or hangs."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed != resource.RLIM_INFINITY and allowed < LEAST_FILES:
        raise ValueError(f"open files: the system allows {allowed} (ulimit -Hn), at least {LEAST_FILES} are needed")


def discard_stdout() -> None:
    """Discard stdout, whose reader has gone: the last flush must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
