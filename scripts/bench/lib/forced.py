"""Forced acceptance, for benchmarks: a draft counts as right with a given probability, whatever the model chose.

The drafts of a model with random weights are hardly ever right. So a benchmark of its speed replaces the engine's
comparison of drafts with a seeded draw, and labels every figure "forced acceptance". The tokens then mean nothing. No
flag of `run.py` does this.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from disagg import speculation
from model.sampling import gumbel


class ForcedAcceptance:
    """In place of `accepted` of model/sampling.py. A draw follows from the number of the call, the row and the place.

    All of it runs on the device, and a CUDA graph can hold it. Ranks that make the same calls draw alike.
    """

    def __init__(self, accept: float, device: torch.device) -> None:
        """`accept`: how likely a draft is right if those before it are."""
        self.calls = torch.zeros(1, dtype=torch.int64, device=device)
        # Gumbel noise is below this with probability `accept`.
        self.below = math.inf if accept == 1 else -math.log(-math.log(accept)) if accept > 0 else -math.inf

    def __call__(self, drafts: Tensor, chosen: Tensor) -> Tensor:
        """Return how many of each sequence's drafts [B, N] are taken as right, [B] int64. `chosen` is not looked at."""
        self.calls += 1
        rows, places = drafts.shape
        noise = gumbel(torch.arange(rows, device=drafts.device), self.calls.expand(rows), places)
        return (noise < self.below).long().cumprod(-1).sum(-1)


@contextmanager
def forced_acceptance(accept: float, device: torch.device) -> Iterator[None]:
    """Let the engines of this process take drafts as right by a draw."""
    before = speculation.accepted
    speculation.accepted = ForcedAcceptance(accept, device)
    try:
        yield
    finally:
        speculation.accepted = before
