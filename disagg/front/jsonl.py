"""A batch of JSON lines as a router's source. Lines are read as the router takes them, and answered in input order."""

import time
from collections.abc import Callable
from typing import Any

from disagg.front.answer import Answer, refusal
from disagg.front.lines import LONGEST, Lines
from disagg.front.output import Output
from disagg.front.parse import UserRequest, is_id, parse_request, read_object
from disagg.front.tokenizer import PromptEncoder

TAKE_S = 0.02  # how long `take` may keep the router from its other work


class JsonLines:
    """Turns valid lines into requests. An invalid line is answered at once, and does not affect the others.

    Give `deliver` to the router. `refused` is called with the answer to each invalid line.
    """

    def __init__(
        self,
        lines: Lines,
        output: Output,
        encoder: PromptEncoder,
        vocab_size: int,
        max_model_len: int,
        refused: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self._lines, self._output, self._refused = lines, output, refused
        self._parse = encoder, vocab_size, max_model_len
        self.read = 0  # lines
        self._skipped = 0  # lines that an earlier run has answered
        self._places = 0  # answers that this run will give, so far
        self._place: dict[int, int] = {}  # position of an unfinished request -> place of its answer
        self._taken = 0  # requests
        self.exhausted = False

    @property
    def total(self) -> int | None:
        """The number of all answers, including those of earlier runs. None until the whole input has been read."""
        return self._skipped + self._places if self.exhausted else None

    def take(self, most: int) -> list[UserRequest]:
        """Return the next requests, as `Source.take`.

        Raises ValueError if the input cannot be read, or does not match the existing answers.
        """
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
        """Skip a line that has its answer already.

        The existing answers must be those to the first lines, so that the file ends up as if written in one run.
        """
        answered, own = self._output.kept.popleft(), _own_id(line, self.read)
        self._skipped += 1
        if answered != own:
            raise ValueError(
                f"--existing resume: answer {self._skipped} in {self._output.path} has the id {answered!r:.60}, but "
                f"that line of the input has {own!r:.60}; the answers must be to the input's first lines"
            )


def _own_id(line: str, number: int) -> Any:
    """Return the line's own id, if it is readable and valid, or else its number."""
    try:
        own = read_object(line).get("id", number)
    except ValueError:
        return number
    return own if is_id(own) else number
