"""The lines of a file, a pipe or stdin as they come. A thread reads ahead a little, so that nobody waits for a disk or
for whoever writes into the pipe."""

import codecs
import io
import os
import queue
import select
import stat
import threading
from collections import deque

BLOCK = 2**16  # bytes
AHEAD = 32  # blocks that are read and not yet looked at
LONGEST = 2**25  # characters of a line; what is longer is not kept
OTHER_FORMATS = {  # what a file begins with -> what it is
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Lines:
    """`next` gives the lines in order, without their ends: "\\n", "\\r\\n" or "\\r". Bytes that are not UTF-8 become
    surrogates (PEP 383). A byte-order mark at the beginning is skipped.

    Not splitlines(), which also splits at U+2028 and its like: JSON strings may hold those.
    """

    def __init__(self, path: str):
        """`path` may be "-", which is stdin. ValueError if it cannot be read, or is a file of another format."""
        self.path = path
        try:
            self._file = self._open()
            self.stat = os.fstat(self._file.fileno())
            if stat.S_ISREG(self.stat.st_mode):  # of a pipe, the first line may come much later
                self._refuse_other_formats(os.pread(self._file.fileno(), BLOCK, 0))
        except OSError as error:
            raise self._unreadable(error) from None
        self._blocks: queue.Queue[bytes | OSError] = queue.Queue(AHEAD)  # b"" at the end
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        self._lines: deque[str] = deque()
        self._begun: list[str] = []  # pieces of the line that has not ended yet
        self._length = 0  # of that line
        self._read_all, self._checked = False, False
        threading.Thread(target=self._read, name="input", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Have all lines been given?"""
        return self._read_all and not self._lines

    def next(self) -> str | None:
        """The next line, or None while none is there. One that is over LONGEST is cut there. Does not wait."""
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
        # Opening a FIFO would wait for who writes into it.
        file = io.FileIO(self.path, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
        os.set_blocking(file.fileno(), True)
        return file

    def _read(self) -> None:
        """The thread."""
        block = b"more"
        while block:
            try:
                select.select([self._file], [], [])  # a FIFO is at its end, too, before anybody writes into it
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
        """`beginning` reaches to the end of the first line, or is longer than any that is refused here."""
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
