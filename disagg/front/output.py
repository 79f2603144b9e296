"""Output: the file of answers, one per line. It protects the answers of an earlier run from accidental loss."""

import fcntl
import io
import json
import os
import stat
from typing import BinaryIO

from disagg.front.answer import INTERRUPTED, Answer


class Kept:
    """The ids of the answers that stay, in order. They are read again when needed, because a file may have millions."""

    def __init__(self, file: BinaryIO | None, count: int) -> None:
        """`file`: at its first answer. None: there are none."""
        self._file, self._left = file, count

    def __len__(self) -> int:
        return self._left

    def popleft(self) -> str | int:
        assert self._file is not None and self._left > 0
        self._left -= 1
        return json.loads(self._file.readline())["id"]


class Output:
    """Writes answers in input order, each as soon as all answers before it are known.

    The file stays unchanged until the first answer is written, so a run that cannot start changes nothing.

    overwrite: the new answers replace the file's content.
    resume: they are appended. An incomplete last line is cut off. So is everything from the first interrupted answer
    on, because the order of the lines allows no gap. `kept` has the ids of the answers that stay.

    Memory is bounded by `held`, what waits for an earlier answer. Read no more input while that is large.
    """

    def __init__(self, path: str, source: os.stat_result, existing: str = "refuse") -> None:
        """`path` may be "-" for stdout. `source`: the input's status. `existing`: refuse, overwrite or resume.

        Raises ValueError if `path` cannot be written, or `existing` does not allow to change it.
        """
        self.path = path
        self.kept = Kept(None, 0)
        self.held = 0  # characters of answers, while an earlier answer is missing
        self._size = 0  # bytes that stay
        self._lines: dict[int, str] = {}  # place -> answer, while an earlier answer is missing
        self._written = 0
        self._begun = False
        resume = existing == "resume"
        try:
            self._file = io.FileIO(os.dup(1), "w") if path == "-" else io.FileIO(path, "a+" if resume else "a")
        except OSError as error:
            raise self._unwritable(error) from None
        status = os.fstat(self._file.fileno())
        self._regular = stat.S_ISREG(status.st_mode) and path != "-"  # what stdout is, is the shell's business
        try:
            if stat.S_ISREG(status.st_mode) and os.path.samestat(status, source):
                raise self._refusal("it is the --input file")
            if self._regular:
                self._claim()
            if resume:
                self._read_answers()
            elif self._regular and status.st_size and existing != "overwrite":
                raise self._refusal("it exists; --existing overwrite replaces it, --existing resume goes on behind it")
        except ValueError:
            self._file.close()  # and release the lock
            raise

    def put(self, place: int, answer: Answer) -> None:
        """Write the answer at this place, once all answers before it are known. Raises ValueError if writing fails."""
        line = self._lines[place] = json.dumps(answer.as_dict()) + "\n"
        self.held += len(line)
        ready = []
        while self._written in self._lines:
            ready.append(self._lines.pop(self._written))
            self._written += 1
        if ready:
            text = "".join(ready)
            self.held -= len(text)
            self._write(text.encode())

    def close(self) -> None:
        """End the file."""
        if not self.kept:  # otherwise the kept answers have not been matched to the input: leave the file as it is
            self._write(b"")
        self._file.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal("another process writes it") from None
        except OSError:
            pass  # a file system without locks

    def _read_answers(self) -> None:
        if not self._regular:
            raise self._refusal("--existing resume needs a file that can be read again")
        count = 0
        with self._reader() as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(line)
                    error, _ = answer.get("error"), answer["id"]
                except (ValueError, AttributeError, LookupError, RecursionError):
                    raise self._refusal(f"line {count + 1} is no answer, which --existing resume needs") from None
                if error == INTERRUPTED:
                    break
                count += 1
                self._size += len(line)
        self.kept = Kept(self._reader(), count)

    def _reader(self) -> BinaryIO:
        """Return a reader of the file from its beginning. Answers are appended wherever it reads."""
        self._file.seek(0)
        return open(self._file.fileno(), "rb", closefd=False)

    def _write(self, text: bytes) -> None:
        try:
            if self._regular and not self._begun:
                self._file.truncate(self._size)
            self._begun = True
            while text:
                text = text[self._file.write(text) :]
        except OSError as error:
            if self.path == "-" and isinstance(error, BrokenPipeError):
                raise  # nobody reads stdout
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ValueError:
        return self._refusal(f"cannot be written ({error.strerror})")

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"--output {self.path}: {why}")
