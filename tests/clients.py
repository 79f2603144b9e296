"""Clients that keep what a router gives them."""

from collections.abc import Callable, Iterable

from disagg.front.answer import Answer
from disagg.front.parse import UserRequest
from disagg.front.source import Listed


class Keeper:
    """Hands each answer over with its position, and each piece of text."""

    def __init__(
        self, position: int, deliver: Callable[[int, Answer], None], show: Callable[[int, str], None] | None = None
    ) -> None:
        self._position, self._deliver, self._show = position, deliver, show

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        if self._show is not None:
            self._show(self._position, piece)

    def deliver(self, answer: Answer) -> None:
        self._deliver(self._position, answer)


def listed(
    users: Iterable[UserRequest],
    deliver: Callable[[int, Answer], None],
    show: Callable[[int, str], None] | None = None,
) -> Listed:
    """Return a source of these requests. `deliver` and `show` get a request's position as their first argument."""
    return Listed((user, Keeper(i, deliver, show)) for i, user in enumerate(users))
