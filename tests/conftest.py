"""What all tests share: the shipped checkpoint, and one seed."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from disagg.request import UserRequest

ROOT = Path(__file__).parent.parent


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Does it come true in so many seconds?"""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Given:
    """A router's source: these requests, all of them there at once."""

    def __init__(self, requests: list[UserRequest]):
        self._left = list(requests)

    def take(self, most: int) -> list[UserRequest]:
        taken, self._left = self._left[:most], self._left[most:]
        return taken

    @property
    def exhausted(self) -> bool:
        return not self._left


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The checkpoint that the project ships."""
    return ROOT / "model" / "tiny"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The same inputs every time; on a GPU fresh ones, whose seed a failure shows."""
    seed = random.SystemRandom().randrange(2**32) if request.node.get_closest_marker("gpu") else 0
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
