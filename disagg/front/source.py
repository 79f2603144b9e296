"""Source: the interface through which a router gets its requests."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from disagg.front.parse import UserRequest


class Source(Protocol):
    """A source of requests."""

    def take(self, most: int) -> list[UserRequest]:
        """Return at most `most` next requests, within about 20 ms. The list is empty if none has arrived yet."""
        ...

    @property
    def exhausted(self) -> bool:
        """Have all requests been taken?"""
        ...


class Listed:
    """A source with all its requests known from the start."""

    def __init__(self, requests: Iterable[UserRequest]) -> None:
        self._left = deque(requests)

    def take(self, most: int) -> list[UserRequest]:
        return [self._left.popleft() for _ in range(min(most, len(self._left)))]

    @property
    def exhausted(self) -> bool:
        return not self._left
