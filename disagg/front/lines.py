"""The lines of a file, a pipe or stdin, as they arrive.

A thread reads ahead a little, so that the router never waits for a disk or for the writer of a pipe.
"""

import codecs
import io
import os
import queue
import select
import stat
import threading
from collections import deque

BLOCK = 2**16  # bytes
AHEAD = 32  # blocks that may be read ahead
LONGEST = 2**25  # characters per line; the rest of a longer line is dropped
OTHER_FORMATS = {  # the first bytes of a file -> its format
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Lines:
    """Reads lines. `next` returns them in order, without their ends: "\\n", "\\r\\n" or "\\r".

    Bytes that are not UTF-8 become surrogates (PEP 383). A byte-order mark at the beginning is skipped.

    splitlines() is no alternative: it also splits at U+2028 and other separators, which JSON strings may contain.
    """

    def __init__(self, path: str) -> None:
        """`path` may be "-" for stdin. Raises ValueError if it cannot be read, or is a file of another format."""
        self.path = path
        try:
            self._file = self._open()
            self.stat = os.fstat(self._file.fileno())
            if stat.S_ISREG(self.stat.st_mode):  # a pipe's first line may come much later
                self._refuse_other_formats(os.pread(self._file.fileno(), BLOCK, 0))
        except OSError as error:
            raise self._unreadable(error) from None
        self._blocks: queue.Queue[bytes | OSError] = queue.Queue(AHEAD)  # b"" at the end
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        self._lines: deque[str] = deque()
        self._begun: list[str] = []  # the pieces so far of an incomplete line
        self._length = 0  # of that line, so far
        self._read_all, self._checked = False, False
        threading.Thread(target=self._read, name="input", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Has `next` returned all lines?"""
        return self._read_all and not self._lines

    def next(self) -> str | None:
        """Return the next line, or None if there is none yet. Never waits.

        A line longer than LONGEST is cut after one more character. Raises ValueError if the input cannot be read.
        """
        while not self._lines and not self._read_all:
            try:
                block = self._blocks.get_nowait()
            except queue.Empty:
                return None
            if isinstance(block, OSError):
                raise self._unreadable(block)
            self._split(block)
        return self._lines.popleft() if self._lines else None

    def _open(self) -> io.FileIO:
        if self.path == "-":
            return io.FileIO(0, closefd=False)
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        file = io.FileIO(self.path, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
        os.set_blocking(file.fileno(), True)
        return file

    def _read(self) -> None:
        """Run in the thread: read blocks into the queue."""
        block = b"more"
        while block:
            try:
                select.select([self._file], [], [])  # otherwise a FIFO without a writer yet would look ended
                block = self._file.read(BLOCK)
            except OSError as error:
                self._blocks.put(error)
                return
            self._blocks.put(block)

    def _split(self, block: bytes) -> None:
        rest, *lines = self._decoder.decode(block, final=not block).split("\n")
        self._add(rest)
        for line in lines:
            self._end_line()
            self._add(line)
        if not block:
            self._end_line()
            self._read_all = True

    def _add(self, piece: str) -> None:
        piece = piece[: LONGEST + 1 - self._length]
        self._begun.append(piece)
        self._length += len(piece)

    def _end_line(self) -> None:
        line = "".join(self._begun)
        self._begun.clear()
        self._length = 0
        if not self._checked and line.strip():
            self._checked = True
            self._refuse_other_formats(line.encode(errors="surrogateescape"))
        self._lines.append(line)

    def _refuse_other_formats(self, beginning: bytes) -> None:
        """Raise ValueError for a known other format. `beginning`: the first line, or enough of it to decide."""
        names = [name for magic, name in OTHER_FORMATS.items() if beginning.startswith(magic)]
        text = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
        if text.startswith(b"["):
            names.append("a JSON array")
        if text.splitlines()[:1] == [b"{"]:
            names.append("JSON spread over several lines")
        if names:
            raise ValueError(f"--input {self.path}: it is {names[0]}; it must be text in UTF-8, one JSON object a line")

    def _unreadable(self, error: OSError) -> ValueError:
        return ValueError(f"--input {self.path}: cannot be read ({error.strerror})")
