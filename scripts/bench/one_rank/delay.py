"""Delay: the time that a simulated dispatch or combine takes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Delay:
    """Simulated seconds of one dispatch or combine: `send` and `receive` hold all SMs; `flight` lies between them."""

    flight: float
    send: float = 0.0
    receive: float = 0.0

    @property
    def busy(self) -> float:
        """Seconds during which all SMs are held."""
        return self.send + self.receive

    @property
    def total(self) -> float:
        return self.flight + self.busy


DelayModel = Callable[[str, int], Delay]  # ("dispatch" or "combine", tokens that a rank sends) -> delay
