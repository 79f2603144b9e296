"""The process's own streams. A batch goes on if a shell has closed them, or if the reader of stderr ends."""

import io
import os
import sys
from typing import Any


class Unread(io.FileIO):
    """A file descriptor that accepts all data, and drops it if it cannot be written."""

    def write(self, data: Any, /) -> int:  # bytes or any other buffer, a type that Python 3.11 has no name for
        try:
            return super().write(data)
        except OSError:
            return len(data)


def secure_streams() -> None:
    """Open the streams that are closed. Call it before any file is opened: a file could get a stream's number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `number`
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    lossy = io.BufferedWriter(Unread(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(lossy, errors="backslashreplace", line_buffering=True)


def discard_stdout() -> None:
    """Discard stdout, whose reader has gone: the last flush must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
