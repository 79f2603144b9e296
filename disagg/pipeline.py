"""Pipeline: one turn of the step loop: schedule, agree, launch a step, take up the one before.

A step is scheduled before the tokens of the step before it have been looked at. A decode step is also launched then.
While the GPU computes it, the CPU takes up those tokens, tells the router, and schedules the next step.

The ranks of the job agree once per turn, in one collective, on what kind of step it is and on whether experts move
before it. After that no rank returns early: a rank without work runs an empty batch.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import partial
from time import perf_counter
from typing import NamedTuple

from disagg.engine import Engine
from disagg.role import Role
from disagg.scheduler import Plan
from disagg.step import Step
from parallel.mesh import Mesh

# What a rank says of its job's end: it serves; it cannot be told, or not by itself; it has its Finish; it leaves now.
GOING_ON, CUT_OFF, FINISHED, LEAVING = range(4)


class Turn(Enum):
    """What a turn came to."""

    WORKED, IDLE, OVER = range(3)


class Agreement(NamedTuple):
    """What all ranks of the job know of a turn; the same on each."""

    prefill_tokens: tuple[int, ...]  # by rank
    decodes: tuple[int, ...]
    ends: tuple[int, ...]
    votes: tuple[int, ...]

    @property
    def is_over(self) -> bool:
        """Any rank leaves, or every rank that can be told has its Finish."""
        return LEAVING in self.ends or (FINISHED in self.ends and GOING_ON not in self.ends)

    @property
    def has_work(self) -> bool:
        return any(self.prefill_tokens) or any(self.decodes)

    @property
    def most_tokens(self) -> int:
        """Of the fullest replica."""
        return max(map(sum, zip(self.prefill_tokens, self.decodes, strict=True)))


class Pipeline:
    """At most one step runs while the next is scheduled."""

    def __init__(
        self, role: Role, engine: Engine, mesh: Mesh, waiting: Callable[[], AbstractContextManager] = nullcontext
    ):
        """`waiting` is entered around the collective."""
        self.role, self.engine, self.mesh, self.waiting = role, engine, mesh, waiting
        self.stats: Counter = Counter()
        self._running: Step | None = None
        self._seen = 0.0  # when the tokens of the latest step that was taken up were there

    def turn(self, end: int = GOING_ON) -> Turn:
        """Collective. `end`: what this rank says of its job's end."""
        self.role.admit()
        plan = self.role.schedule()
        agreed = self._agree(plan, end)
        before, self._running = self._running, None
        if agreed.is_over:
            self._take_up(before)  # its pages are released only now
            return Turn.OVER
        self.engine.rebalance(agreed.votes)
        if agreed.has_work:
            self._running = self._launch(plan, agreed, meanwhile=partial(self._take_up, before))
        else:
            self._take_up(before)
        return Turn.IDLE if before is None and self._running is None else Turn.WORKED

    def _agree(self, plan: Plan, end: int) -> Agreement:
        with self.waiting():
            told = self.mesh.agree(plan.num_prefill_tokens, len(plan.decodes), end, self.engine.vote())
        return Agreement(*zip(*told, strict=True))

    def _launch(self, plan: Plan, agreed: Agreement, meanwhile: Callable[[], None]) -> Step:
        rows = None if any(agreed.prefill_tokens) else self.engine.decode.bucket(max(agreed.decodes))
        step = self.engine.launch(plan, rows, agreed.most_tokens, meanwhile)
        self.role.launched(step)
        return step

    def _take_up(self, step: Step | None) -> None:
        if step is None:
            return
        began = max(step.started, self._seen)  # a step that was launched ahead begins when the one before it ends
        tokens = self.role.take_up(step)
        self._seen = perf_counter()
        self._count(step, tokens, self._seen - began)

    def _count(self, step: Step, tokens: int, seconds: float) -> None:
        """A step in which any rank has prompt tokens counts as prefill on all of them."""
        phase = "prefill" if step.work.mixed else "decode"
        self.stats[f"{phase}_steps"] += 1
        self.stats[f"{phase}_seconds"] += seconds
        self.stats["prompt_tokens"] += step.work.plan.num_prefill_tokens
        self.stats[f"{phase}_step_tokens"] += tokens
        self.stats[f"{phase}_overlapped"] += step.work.overlapped
