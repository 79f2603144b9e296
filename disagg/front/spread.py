"""Spread: how evenly the load lies over the replicas, now and over a run."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from disagg.front.replica import Replica


@dataclass(frozen=True)
class Spread:
    """The least and the most loaded replica, and the mean of all of them."""

    least: float
    mean: float
    most: float


def spread(replicas: Iterable[Replica]) -> dict[str, Spread]:
    """Return the spread of "queued tokens" (tokens) and "KV" (share of the pool), each where any replica has it.

    Decode replicas have no queued tokens, and prefill replicas have no KV to keep. The loads are those that routing
    goes by: what the router has sent, and the latest reports.
    """
    replicas = list(replicas)
    loads = {
        "queued tokens": [r.queued_tokens for r in replicas if r.hello.role != "decode"],
        "KV": [r.kv_share for r in replicas if r.hello.role != "prefill"],
    }
    return {name: Spread(min(each), sum(each) / len(each), max(each)) for name, each in loads.items() if each}


@dataclass
class Spreads:
    """The spread over a run: the mean of the spreads that were added while several replicas had any load."""

    sums: dict[str, tuple[int, float, float]] = field(default_factory=dict)  # count, least, most

    def add(self, replicas: Iterable[Replica]) -> None:
        for name, now in spread(replicas).items():
            if now.most > 0:
                count, least, most = self.sums.get(name, (0, 0.0, 0.0))
                self.sums[name] = count + 1, least + now.least, most + now.most

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary's rows."""
        rows = []
        for name, (count, least, most) in self.sums.items():
            low, high = (f"{total / count:.1%}" if name == "KV" else f"{total / count:,.0f}" for total in (least, most))
            rows.append((f"{name}"[:12], f"from {low} on the least loaded replica to {high} on the most loaded one"))
        return rows
