"""Pipeline: one turn of the step loop: schedule, agree, launch a step, take up the previous one.

A step is scheduled before the previous step's tokens have been read. One that decodes, or that runs in graphs, is also
launched before that. While the GPU computes it, the CPU takes up those tokens, reports to the router, and schedules the
next step.

The ranks of the job agree once per turn, in one collective, on the kind of step, on whether experts move before it, and
on how many drafts it makes. After that no rank returns early: a rank without work runs an empty batch.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import partial
from time import perf_counter
from typing import NamedTuple

from disagg.draft_policy import DraftPolicy
from disagg.engine import Engine
from disagg.role import Role
from disagg.scheduler import Plan
from disagg.step import Step
from parallel.mesh import Mesh

# A rank's state, for deciding together when the job ends.
GOING_ON = 0  # serves
CUT_OFF = 1  # has no port to the router, or has lost it: it cannot receive a Finish
FINISHED = 2  # has received its Finish
LEAVING = 3  # must end now


class Turn(Enum):
    """The outcome of a turn."""

    WORKED, IDLE, OVER = range(3)


class Agreement(NamedTuple):
    """The state of all ranks of the job in a turn, by rank. Equal on all ranks."""

    prefill_tokens: tuple[int, ...]
    decodes: tuple[int, ...]
    ends: tuple[int, ...]  # GOING_ON to LEAVING
    votes: tuple[int, ...]  # on moving experts
    returns_experts: tuple[int, ...]  # does a request of its step ask for its chosen experts?
    makes: tuple[int, ...]  # the drafts that the step shall make; that of rank 0 counts

    @property
    def is_over(self) -> bool:
        """Does any rank leave, or has every rank that can receive a Finish received it?"""
        return LEAVING in self.ends or (FINISHED in self.ends and GOING_ON not in self.ends)

    @property
    def has_work(self) -> bool:
        return any(self.prefill_tokens) or any(self.decodes)

    def most_tokens(self, each: int) -> int:
        """Return the tokens of the fullest replica. `each`: those of a decoding sequence."""
        return max(prompts + each * decodes for prompts, decodes in zip(self.prefill_tokens, self.decodes, strict=True))


class Pipeline:
    """Runs turns. At most one step is in flight while the next is scheduled."""

    def __init__(
        self,
        role: Role,
        engine: Engine,
        mesh: Mesh,
        waiting: Callable[[], AbstractContextManager] = nullcontext,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        """`waiting()` is a context that is entered around the turn's collective.

        `report()` is called when a step has been taken up. The launch that follows may take as long as a step.
        """
        self.role, self.engine, self.mesh, self.waiting, self.report = role, engine, mesh, waiting, report
        self.stats: defaultdict[str, float] = defaultdict(int)
        self._running: Step | None = None
        self._seen = 0.0  # time.perf_counter() when the latest step had been taken up
        settings = engine.settings
        self._adapts = len(settings.drafts_per_step) > 1
        self._policy = DraftPolicy(settings.speculate) if self._adapts and mesh.rank == 0 else None
        self._rows, self._mixed = 1, False  # of the latest step: its bucket, and if it has prompt tokens

    def turn(self, end: int = GOING_ON) -> Turn:
        """Collective. `end`: this rank's state, GOING_ON to LEAVING."""
        self.role.admit()
        plan = self.role.schedule()
        agreed = self._agree(plan, end)
        before, self._running = self._running, None
        if agreed.is_over:
            self._take_up(before)  # which releases its pages
            return Turn.OVER
        self.engine.rebalance(agreed.votes)
        if agreed.has_work:
            self._running = self._launch(plan, agreed, meanwhile=partial(self._take_up, before))
        else:
            self._take_up(before)
        return Turn.IDLE if before is None and self._running is None else Turn.WORKED

    def _agree(self, plan: Plan, end: int) -> Agreement:
        makes = self.engine.settings.speculate if self._policy is None else self._policy.choose(self._rows, self._mixed)
        mine = plan.num_prefill_tokens, len(plan.decodes), end, self.engine.vote(), plan.returns_experts, makes
        counts = self.role.acceptance.counts() if self._adapts else []
        if not self.mesh.leads:  # the replica's other ranks count the same
            counts = [0] * len(counts)
        with self.waiting():
            columns = list(zip(*self.mesh.agree(*mine, *counts), strict=True))
        if self._policy is not None:
            self._policy.count_drafts([sum(column) for column in columns[len(mine) :]])
        return Agreement(*columns[: len(mine)])

    def _launch(self, plan: Plan, agreed: Agreement, meanwhile: Callable[[], None]) -> Step:
        self._rows, self._mixed = self.engine.decode.bucket(max(agreed.decodes)), any(agreed.prefill_tokens)
        rows, tokens = None if self._mixed else self._rows, agreed.most_tokens(self.engine.scheduler.decode_tokens)
        eager, makes = any(agreed.returns_experts), agreed.makes[0]
        step = self.engine.launch(plan, rows, tokens, meanwhile, eager, makes)
        self.role.launched(step)
        return step

    def _take_up(self, step: Step | None) -> None:
        if step is None:
            return
        began = max(step.started, self._seen)  # a step that was launched ahead begins when the previous one ends
        tokens = self.role.take_up(step)
        self._seen = perf_counter()
        self.report()
        self._count(step, tokens, self._seen - began)

    def _count(self, step: Step, tokens: int, seconds: float) -> None:
        """A step in which any rank has prompt tokens counts as prefill on all of them."""
        phase = "prefill" if step.work.mixed else "decode"
        self.stats[f"{phase}_steps"] += 1
        self.stats[f"{phase}_seconds"] += seconds
        self.stats["prompt_tokens"] += step.work.plan.num_prefill_tokens
        self.stats[f"{phase}_step_tokens"] += tokens
        self.stats[f"{phase}_overlapped"] += step.work.overlapped
        if self._policy is not None and (drafts := step.work.drafts) is not None:
            if step.work.decode_rows is None:
                self._policy.count_mixed(step.work.most_tokens, seconds)
            else:
                self._policy.count_step(step.work.decode_rows, *drafts, seconds)
