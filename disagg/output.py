"""Output: the file of the answers, a line each. What an earlier run wrote there is not lost by accident."""

import fcntl
import json
import os
import stat
from collections import deque

from disagg.router import INTERRUPTED, Answer


class Output:
    """Writes answers in the input's order, each as soon as those before it are there. What the file holds stays as it
    is until the first answer is written: a run that cannot start changes nothing.

    overwrite: the answers take the place of what is there.
    resume: they go on behind the answers that are there. A last line that was not written to its end is cut off. So is
    all from the first answer on that Ctrl-C interrupted: the order of the lines allows no gap. `kept` are the ids of
    the answers that stay.
    """

    def __init__(self, path: str, source: os.stat_result, overwrite: bool = False, resume: bool = False):
        """`source` is the input. ValueError if `path` cannot be written, or holds what must stay."""
        self.path = path
        self.kept: deque[str | int] = deque()
        self._size = 0  # bytes of what stays
        self._lines: dict[int, str] = {}  # by place among the answers, those that wait for one before them
        self._written = 0
        self._begun = False
        try:
            self._fd = os.open(path, (os.O_RDWR if resume else os.O_WRONLY) | os.O_CREAT, 0o666)
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if resume and not self._regular:
                raise self._refusal("--resume needs a file that can be read again")
            if self._regular:
                self._claim(source)
                if resume:
                    self._read_answers()
                elif os.fstat(self._fd).st_size and not overwrite:
                    raise self._refusal("it exists; --overwrite replaces it, --resume goes on behind its answers")
        except OSError as error:
            raise self._unwritable(error) from None

    def put(self, place: int, answer: Answer) -> None:
        """ValueError if the disk refuses."""
        self._lines[place] = json.dumps(answer.as_dict()) + "\n"
        ready = []
        while self._written in self._lines:
            ready.append(self._lines.pop(self._written))
            self._written += 1
        if ready:
            self._write("".join(ready).encode())

    def close(self) -> None:
        """The run is over."""
        if not self.kept:  # else it ended before it was sure that these are answers to this input
            self._write(b"")
        os.close(self._fd)

    def _claim(self, source: os.stat_result) -> None:
        if os.path.samestat(os.fstat(self._fd), source):
            raise self._refusal("it is the --input file")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal("another process writes it") from None
        except OSError:
            pass  # a file system without locks

    def _read_answers(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(line)
                    error, own_id = answer.get("error"), answer["id"]
                except (ValueError, AttributeError, LookupError, RecursionError):
                    raise self._refusal(f"line {number} is no answer, and --resume goes on behind answers") from None
                if error == INTERRUPTED:
                    break
                self.kept.append(own_id)
                self._size += len(line)

    def _write(self, text: bytes) -> None:
        try:
            if self._regular and not self._begun:
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            self._begun = True
            while text:
                text = text[os.write(self._fd, text) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ValueError:
        return self._refusal(f"cannot be written ({error.strerror})")

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"--output {self.path}: {why}")
