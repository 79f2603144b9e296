"""A batch of JSON lines as a router's source. Lines are read as the router takes them, and answered in input order."""

import time
from collections.abc import Callable
from typing import Any

from disagg.front.answer import Answer, refusal
from disagg.front.lines import LONGEST, Lines
from disagg.front.output import Output
from disagg.front.parse import Served, UserRequest, is_id, parse_line, read_object
from disagg.front.source import Asked

TAKE_S = 0.02  # how long `take` may keep the router from its other work
MOST_HELD = 2**27  # characters of answers that wait for an earlier one, while lines are read


class Line:
    """The client of one line."""

    def __init__(self, place: int, deliver: Callable[[int, Answer], None]) -> None:
        """`place`: of the line's answer in the output."""
        self._place, self._deliver = place, deliver

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        """Ignore it: an answer is written as a whole."""

    def deliver(self, answer: Answer) -> None:
        self._deliver(self._place, answer)


class JsonLines:
    """Turns valid lines into requests. An invalid line is answered at once, and does not affect the others.

    `answered` is called after each answer, `refused` before it with the answer to each invalid line.
    """

    def __init__(
        self,
        lines: Lines,
        output: Output,
        served: Served,
        answered: Callable[[Answer], None] = lambda answer: None,
        refused: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self._lines, self._output, self._served = lines, output, served
        self._answered, self._refused = answered, refused
        self.read = 0  # lines
        self._skipped = 0  # lines that an earlier run has answered
        self._places = 0  # answers that this run will give, so far
        self.exhausted = False

    @property
    def total(self) -> int | None:
        """The number of all answers, including those of earlier runs. None until the whole input has been read."""
        return self._skipped + self._places if self.exhausted else None

    def take(self, most: int) -> list[Asked]:
        """Return the next requests, as `Source.take`.

        Raises ValueError if the input cannot be read, or does not match the existing answers.
        """
        until, taken = time.monotonic() + TAKE_S, []
        while len(taken) < most and time.monotonic() < until and self._output.held < MOST_HELD:
            if (line := self._lines.next()) is None:
                break
            self.read += 1
            if not line.strip():
                continue
            if self._output.kept:
                self._skip(line)
                continue
            place, self._places = self._places, self._places + 1
            try:
                taken.append((self._request(line), Line(place, self._deliver)))
            except ValueError as error:
                answer = refusal(_own_id(line, self.read), f"line {self.read}: {error}")
                self._refused(answer)
                self._deliver(place, answer)
        if self._lines.ended:
            if self._output.kept:
                count = self._skipped + len(self._output.kept)
                raise ValueError(
                    f"--existing resume: {self._output.path} has {count} answers, the input {self._skipped} lines"
                )
            self.exhausted = True
        return taken

    def _deliver(self, place: int, answer: Answer) -> None:
        self._output.put(place, answer)
        self._answered(answer)

    def _request(self, line: str) -> UserRequest:
        if len(line) > LONGEST:
            raise ValueError(f"it is too long; a line must have at most {LONGEST:,} characters")
        return parse_line(line, self.read, self._served)

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
