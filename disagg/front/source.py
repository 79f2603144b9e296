"""Where a router's requests come from."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from disagg.front.parse import UserRequest


class Source(Protocol):
    """What the router asks of it."""

    def take(self, most: int) -> list[UserRequest]:
        """The next requests, at most so many. It returns within about 20 ms, with none if none is there yet."""

    @property
    def exhausted(self) -> bool:
        """Will nothing more ever come?"""


class Listed:
    """Requests that are all there from the start."""

    def __init__(self, requests: Iterable[UserRequest]):
        self._left = deque(requests)

    def take(self, most: int) -> list[UserRequest]:
        return [self._left.popleft() for _ in range(min(most, len(self._left)))]

    @property
    def exhausted(self) -> bool:
        return not self._left
