"""A batch of JSON lines as a router's source: read as the router takes them, and each answered in the input's order."""

import time
from collections.abc import Callable
from typing import Any

from disagg.front.answer import Answer, refusal
from disagg.front.lines import LONGEST, Lines
from disagg.front.output import Output
from disagg.front.parse import UserRequest, is_id, parse_request, read_object
from disagg.front.tokenizer import PromptEncoder

TAKE_S = 0.02  # how long the router may be kept from its other work


class JsonLines:
    """Good lines become requests. Bad ones are answered at once, and ruin only themselves. Give `deliver` to the
    router. `refused` hears of the answers to bad lines."""

    def __init__(
        self,
        lines: Lines,
        output: Output,
        encoder: PromptEncoder,
        vocab_size: int,
        max_model_len: int,
        refused: Callable[[Answer], None] = lambda answer: None,
    ):
        self._lines, self._output, self._refused = lines, output, refused
        self._parse = encoder, vocab_size, max_model_len
        self.read = 0  # lines
        self._skipped = 0  # of them, lines whose answer is there already
        self._places = 0  # of all answers that this run gives
        self._place: dict[int, int] = {}  # of a request that is under way, by its position
        self._taken = 0
        self.exhausted = False

    @property
    def total(self) -> int | None:
        """Answers in all, those of earlier runs too; None before the end has been read."""
        return self._skipped + self._places if self.exhausted else None

    def take(self, most: int) -> list[UserRequest]:
        """ValueError if the input cannot be read on, or does not fit to the answers that are there."""
        until, taken = time.monotonic() + TAKE_S, []
        while len(taken) < most and time.monotonic() < until and (line := self._lines.next()) is not None:
            self.read += 1
            if not line.strip():
                continue
            if self._output.kept:
                self._skip(line)
                continue
            place, self._places = self._places, self._places + 1
            try:
                taken.append(self._request(line))
            except ValueError as error:
                answer = refusal(_own_id(line, self.read), f"line {self.read}: {error}")
                self._output.put(place, answer)
                self._refused(answer)
            else:
                self._place[self._taken] = place
                self._taken += 1
        if self._lines.ended:
            if self._output.kept:
                count = self._skipped + len(self._output.kept)
                raise ValueError(
                    f"--existing resume: {self._output.path} has {count} answers, the input {self._skipped} lines"
                )
            self.exhausted = True
        return taken

    def deliver(self, position: int, answer: Answer) -> None:
        self._output.put(self._place.pop(position), answer)

    def _request(self, line: str) -> UserRequest:
        if len(line) > LONGEST:
            raise ValueError(f"it is too long; a line must have at most {LONGEST:,} characters")
        return parse_request(line, self.read, *self._parse)

    def _skip(self, line: str) -> None:
        """The answers that are there must be those to the first lines, so the file ends up as if written in one run."""
        there, own = self._output.kept.popleft(), _own_id(line, self.read)
        self._skipped += 1
        if there != own:
            raise ValueError(
                f"--existing resume: answer {self._skipped} in {self._output.path} has the id {there!r:.60}, but "
                f"that line of the input has {own!r:.60}; the answers must be to the input's first lines"
            )


def _own_id(line: str, number: int) -> Any:
    """The id that a line gives itself, if it can be read that far; else its number."""
    try:
        own = read_object(line).get("id", number)
    except ValueError:
        return number
    return own if is_id(own) else number
