"""Requests from a JSONL file, answers to another: a line each, in the input's order. A bad line ruins only itself."""

import json
from collections.abc import Iterator
from pathlib import Path

from disagg.request import PromptEncoder, UserRequest, is_id, parse_request, read_object
from disagg.router import Answer, refusal


class Job:
    """A batch: good lines become requests, bad ones answers at once. Give `deliver` to the router."""

    def __init__(self, lines: list[str], encoder: PromptEncoder, vocab_size: int, max_model_len: int):
        self.requests: list[UserRequest] = []
        self._place: list[int] = []  # of each request among all answers
        self.answers: list[Answer | None] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self.requests.append(parse_request(line, number, encoder, vocab_size, max_model_len))
                self._place.append(len(self.answers))
                self.answers.append(None)
            except ValueError as error:
                self.answers.append(refusal(_own_id(line, number), f"line {number}: {error}"))

    def deliver(self, position: int, answer: Answer) -> None:
        self.answers[self._place[position]] = answer

    @property
    def num_refused(self) -> int:
        return len(self.answers) - len(self.requests)


class Writer:
    """Writes answers in order, each as soon as those before it are there."""

    def __init__(self, path: str, source: str):
        """ValueError if `path` cannot be written, or is the input itself."""
        try:
            if Path(path).exists() and Path(path).samefile(source):
                raise ValueError(f"--output {path}: it is the --input file")
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the batch runs)
        except OSError as error:
            raise ValueError(f"--output {path}: cannot be written ({error.strerror})") from None
        self._written = 0

    def flush(self, answers: list[Answer | None]) -> None:
        """ValueError if the disk refuses."""
        try:
            for answer in self._ready(answers):
                self._file.write(json.dumps(answer.as_dict()) + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(f"--output {self._file.name}: cannot be written ({error.strerror})") from None

    def _ready(self, answers: list[Answer | None]) -> Iterator[Answer]:
        while self._written < len(answers) and answers[self._written] is not None:
            yield answers[self._written]
            self._written += 1

    def close(self) -> None:
        self._file.close()


def read_lines(path: str) -> list[str]:
    """ValueError if `path` cannot be read. Bytes that are not UTF-8 become surrogates, for `read_object` to refuse."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror})") from None
    return text.split("\n")  # not splitlines(): JSON strings may hold U+2028 and its like


def _own_id(line: str, number: int):
    """The id that a bad line gives itself, if it can be read that far; else its number."""
    try:
        own = read_object(line).get("id", number)
    except ValueError:
        return number
    return own if is_id(own) else number
