"""Whatever a client sends is answered, or refused with a reason; the door serves on."""

from pathlib import Path

from tests.hostile import attack
from tests.http_door import open_door


def test_hostile_bodies_are_answered_or_refused_and_the_door_serves_on(tiny: Path) -> None:
    """`python -m tests.hostile 2000` sends more of them."""
    with open_door(tiny) as door:
        seen = attack(door, 300)
        assert seen.keys() <= {200, 400, 404} and seen[200] > 10 and seen[400] > 100, seen
        assert not door.front.router._tracked
