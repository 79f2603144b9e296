"""Role: the interface between the step loop and the unified, prefill and decode roles."""

from abc import ABC, abstractmethod
from collections import abc
from itertools import islice

from disagg.acceptance import Acceptance
from disagg.control.messages import MOST_LEFT, Forget, Load, ToWorker, Updates
from disagg.engine import Engine
from disagg.handoff.protocol import LinkEvent
from disagg.scheduler import Plan, Sequence
from disagg.step import Step

Event = ToWorker | Forget | LinkEvent
NOT_FINITE = "the model's logits are not finite numbers; its weights may be damaged"


class Role(ABC):
    """The requests of one attention replica.

    `handle` and `take_up` get the same arguments on every rank of the replica, in the same order. So their schedulers
    and page caches stay equal without further communication. In each turn the loop calls: `collect`, `handle` for
    each event, `admit`, `schedule`, `launched` with the new step, `take_up` with the previous one, `news`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.scheduler = engine, engine.scheduler
        self.acceptance = Acceptance(engine.settings.speculate)

    def collect(self) -> abc.Sequence[Event]:
        """Return the events that only this rank saw since the last turn. The loop shares them within the replica."""
        return []

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Handle an event of the replica."""

    def admit(self) -> None:  # noqa: B027 - optional for a role, as is `launched`
        """Begin the requests that can begin now."""

    def schedule(self) -> Plan:
        """Plan the next step, and give pages to the requests that enter the batch with it."""
        return self.scheduler.schedule()

    def launched(self, step: Step) -> None:  # noqa: B027
        """Called when a step of this replica has just been launched."""

    @abstractmethod
    def take_up(self, step: Step) -> int:
        """Use the tokens of a step; the next step may have been launched already. Returns how many were useful."""

    @abstractmethod
    def news(self) -> Updates | None:
        """Return the news for the router since the last call, if any."""

    @property
    @abstractmethod
    def is_waiting(self) -> bool:
        """Is anything in progress outside the scheduler that will soon make work?"""

    def load(self) -> Load:
        """Return the replica's load. It takes less than a microsecond per request."""
        scheduler = self.scheduler
        return Load(
            queued_tokens=scheduler.queued_tokens,
            kv_pages=scheduler.cache.capacity - scheduler.cache.num_free,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            tokens_left=tokens_left(s for s in scheduler.running if s.in_prompt),
        )

    def stats(self) -> dict[str, float]:
        """Return what only this rank knows. The statistics of a replica are the sums over its ranks."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free the role's resources. Called when the loop has ended."""


def tokens_left(sequences: abc.Iterable[Sequence]) -> dict[int, int]:
    """Return uid -> prompt tokens left, for up to MOST_LEFT of the prompts that have begun."""
    begun = ((s.uid, max(0, s.prompt_len - s.computed)) for s in sequences if s.computed)
    return dict(islice(begun, MOST_LEFT))
