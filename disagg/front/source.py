"""Source: the interface through which a router takes the requests of a batch."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from disagg.front.client import Client
from disagg.front.parse import UserRequest

Asked = tuple[UserRequest, Client]


class Source(Protocol):
    """A source of requests, each with the client that waits for its answer."""

    def take(self, most: int) -> list[Asked]:
        """Return at most `most` next requests, within about 20 ms. The list is empty if none has arrived yet."""
        ...

    @property
    def exhausted(self) -> bool:
        """Have all requests been taken?"""
        ...


class Listed:
    """A source with all its requests known from the start."""

    def __init__(self, requests: Iterable[Asked]) -> None:
        self._left = deque(requests)

    def take(self, most: int) -> list[Asked]:
        return [self._left.popleft() for _ in range(min(most, len(self._left)))]

    @property
    def exhausted(self) -> bool:
        return not self._left
