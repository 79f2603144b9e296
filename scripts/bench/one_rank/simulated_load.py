"""How many tokens a rank of N receives, SIMULATED, and which share of all tokens needs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, prod


@dataclass(frozen=True)
class SimulatedLoad:
    """The rows that this rank receives in one dispatch."""

    counts: tuple[int, ...]  # rows per local expert
    tokens: int  # distinct tokens: one that needs several local experts arrives once

    @classmethod
    def even(
        cls, tokens: int, ranks: int, top_k: int, slots: int, skew: float = 1.0, distinct: float | None = None
    ) -> "SimulatedLoad":
        """Return the load when `ranks` ranks send `tokens` tokens each, which choose `top_k` of `slots` slots.

        slots / ranks of the slots are here. `skew`: the fullest expert's rows over the mean, at most 2; the others
        decrease linearly from it, and the mean stays. `distinct`: the share of all tokens that arrive here
        (`share_of_tokens`); None: as few as possible. Raises ValueError for values that contradict each other.
        """
        if slots % ranks:
            raise ValueError(f"slots % ranks must be 0, not {slots} % {ranks} = {slots % ranks}")
        if not 1 <= skew <= 2:
            raise ValueError(f"skew is {skew}; it must be in [1, 2]")
        local = slots // ranks
        mean = tokens * ranks * top_k / slots
        slope = 0.0 if local == 1 else 2 / (local - 1)
        counts = _whole([mean * (1 + (skew - 1) * (1 - slope * i)) for i in range(local)])
        least = max(max(counts), -(-sum(counts) // top_k))
        return cls(counts, max(least, round((distinct or 0.0) * tokens * ranks)))

    @classmethod
    def of_shares(cls, shares: Sequence[float], tokens: int, ranks: int, top_k: int) -> "SimulatedLoad":
        """Return the load when each of this rank's experts gets a given share of all choices.

        `ranks` ranks have `tokens` tokens each, which choose `top_k` slots. Choices of different experts are taken to
        be independent. Raises ValueError for a share that needs more tokens than there are.
        """
        if max(shares) * top_k > 1:
            raise ValueError(f"shares * top_k must be at most 1, not {max(shares):.4f} * {top_k}")
        counts = _whole([share * tokens * ranks * top_k for share in shares])
        least = max(max(counts), -(-sum(counts) // top_k))
        return cls(counts, max(least, round(tokens * ranks * (1 - prod(1 - share * top_k for share in shares)))))


def _whole(parts: list[float]) -> tuple[int, ...]:
    """Round the parts so that they add up to the rounded sum. The largest remainders are rounded up."""
    counts = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])
    for i in by_remainder[: round(sum(parts)) - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def share_of_tokens(experts: int, places: int, top_k: int, groups: int = 1, groups_chosen: int = 1) -> float:
    """Return the share of tokens that need an expert in one of `places`, under uniform group-limited routing.

    Places are ranks, or nodes of ranks. A place holds a part of one group, or whole groups. A token needs the place if
    it chooses such a group, and not all of its experts are in other places.
    """
    local, within = max(1, experts // places), experts * groups_chosen // groups
    local_groups = max(1, groups * local // experts)
    share = 0.0
    for chosen in range(1, min(local_groups, groups_chosen) + 1):
        likely = comb(local_groups, chosen) * comb(groups - local_groups, groups_chosen - chosen)
        likely /= comb(groups, groups_chosen)
        share += likely * (1 - comb(within - local // local_groups * chosen, top_k) / comb(within, top_k))
    return share
