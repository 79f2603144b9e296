"""Role: what the step loop asks of the unified, the prefill and the decode role."""

from abc import ABC, abstractmethod

from disagg.control.messages import Forget, ToWorker, Updates
from disagg.engine import Engine
from disagg.handoff.protocol import Open, RoomEnded
from disagg.scheduler import Plan
from disagg.step import Step

Event = ToWorker | Forget | Open | RoomEnded


class Role(ABC):
    """The requests of one attention replica.

    `handle` and `take_up` get the same arguments on every rank of the replica, in the same order. So their schedulers
    and page allocators stay equal without further communication. The loop calls, in each turn: `collect`, `handle` for
    each event, `admit`, `schedule`, `launched` with the new step, `take_up` with the one before, `news`.
    """

    def __init__(self, engine: Engine):
        self.engine, self.scheduler = engine, engine.scheduler

    def collect(self) -> list[Event]:
        """What happened to this rank alone since the last turn; the loop tells the rest of the replica."""
        return []

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Something happened to the replica."""

    def admit(self) -> None:  # noqa: B027 - not every role has something to do here, or in `launched`
        """Begin what can begin now."""

    def schedule(self) -> Plan:
        """Choose the next step, and give pages to the requests that enter the batch with it."""
        return self.scheduler.schedule()

    def launched(self, step: Step) -> None:  # noqa: B027
        """A step of this replica has just been launched."""

    @abstractmethod
    def take_up(self, step: Step) -> int:
        """Use the tokens of a step; the next one may have been launched already. Returns how many were wanted."""

    @abstractmethod
    def news(self) -> Updates | None:
        """What the router should hear, once."""

    @property
    @abstractmethod
    def is_waiting(self) -> bool:
        """Is something under way outside the scheduler that will soon make work?"""

    def stats(self) -> dict[str, float]:
        return {}

    @abstractmethod
    def close(self) -> None:
        """The loop has ended."""
