"""The process's own streams. A shell may have closed them, and whoever reads stderr may leave; neither ends a batch."""

import io
import os
import sys


class Unread(io.FileIO):
    """A file descriptor that takes everything, also once it cannot be written."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def secure_streams() -> None:
    """Call it before any file is opened: that would get the number of a stream that is closed, and its text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    lossy = io.BufferedWriter(Unread(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(lossy, errors="backslashreplace", line_buffering=True)


def discard_stdout() -> None:
    """Nobody reads it any more: what is still to be flushed must not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
