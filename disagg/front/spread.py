"""Spread: how evenly the load lies over the replicas, now and over a run."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from disagg.front.replica import Replica


@dataclass(frozen=True)
class Spread:
    """A load of the least and the most loaded replica, and the mean of all."""

    replicas: int
    least: float
    mean: float
    most: float


def spread(replicas: Iterable[Replica]) -> dict[str, Spread]:
    """Return the spread of `queued` (prompt tokens) and `KV` (share of the pool), each if any replica has that load.

    Decode replicas have no queue of prompts, and routing asks for no prefill replica's KV. The loads are those that it
    goes by: requests that were sent, and the latest reports.
    """
    loads: dict[str, list[float]] = {"queued": [], "KV": []}
    for replica in replicas:
        if replica.hello.role != "decode":
            loads["queued"].append(replica.queued_tokens)
        if replica.hello.role != "prefill":
            loads["KV"].append(replica.kv_share)
    return {
        name: Spread(len(each), min(each), sum(each) / len(each), max(each)) for name, each in loads.items() if each
    }


@dataclass
class Spreads:
    """The mean spread of a run, over the moments when several replicas had any load."""

    _sums: dict[str, tuple[int, float, float]] = field(default_factory=dict)  # moments, least, most

    def add(self, replicas: Iterable[Replica]) -> None:
        for name, now in spread(replicas).items():
            if now.replicas > 1 and now.most > 0:
                moments, least, most = self._sums.get(name, (0, 0.0, 0.0))
                self._sums[name] = moments + 1, least + now.least, most + now.most

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary's rows, as names and values."""
        rows = []
        for name, (moments, least, most) in self._sums.items():
            low, high = least / moments, most / moments
            values = f"{low:.1%} to {high:.1%}" if name == "KV" else f"{low:,.0f} to {high:,.0f} prompt tokens"
            rows.append((name, f"{values} on the least and the most loaded replica, on average"))
        return rows
