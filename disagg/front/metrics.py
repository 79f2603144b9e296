"""Metrics: the numbers of a run, as a table."""

import math
from collections import Counter
from statistics import median

from disagg.control.messages import Parts
from disagg.front.spread import Spreads

ROLE_PHASES = {"unified": ("prefill", "decode"), "prefill": ("prefill",), "decode": ("decode",)}


def percentile(values: list[float], share: float) -> float:
    """Return the nearest-rank percentile, or nan for an empty list."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def balancedness(stats: dict[str, float]) -> str:
    """Format the balancedness: averaged over the layers with experts, and the range over these layers."""
    layers = [value for name, value in stats.items() if name.startswith("balancedness_")]
    return f"balancedness {stats['balancedness']:.3f} (layers {min(layers):.3f} to {max(layers):.3f})"


class Metrics:
    """The router's numbers: latencies that it measures, and the replicas' statistics, sent when they leave."""

    def __init__(self, spreads: Spreads | None = None) -> None:
        """`spreads`: the loads of the replicas over time."""
        self.spreads = spreads or Spreads()
        self.finished: Counter = Counter()  # by finish_reason
        self.prompt_tokens = self.generated_tokens = self.retries = 0
        self.ttft: list[float] = []
        self.inter_token: list[float] = []
        self.parts: list[Parts] = []  # of the TTFT of each handed-over request
        self.first_submit = self.last_finish = 0.0
        self._stats: list[tuple[str, dict[str, float]]] = []

    def replica_left(self, role: str, stats: dict[str, float]) -> None:
        self._stats.append((role, stats))

    def table(self) -> str:
        rows = [("requests", ", ".join(f"{n} {reason}" for reason, n in sorted(self.finished.items()) if n) or "none")]
        seconds = self.last_finish - self.first_submit
        rows.append(("wall time", f"{seconds:.2f} s"))
        rows.append(("tokens", f"{self.prompt_tokens} prompt, {self.generated_tokens} generated"))
        if seconds > 0:
            total = (self.prompt_tokens + self.generated_tokens) / seconds
            rows.append(("overall", f"{total:,.0f} tok/s, {self.generated_tokens / seconds:,.0f} generated tok/s"))
        for phase, tokens in (("prefill", "prompt_tokens"), ("decode", "decode_step_tokens")):
            if rate := self._rate(phase, tokens):
                rows.append((phase, rate))
        for name, values in (("TTFT", self.ttft), ("inter-token", self.inter_token)):
            if values:
                rows.append(
                    (name, f"median {median(values) * 1e3:.1f} ms, p99 {percentile(values, 0.99) * 1e3:.1f} ms")
                )
        rows += self.spreads.rows()
        if self.parts:
            names = Parts.__struct_fields__
            medians = [f"{name} {median(getattr(p, name) for p in self.parts) * 1e3:.1f}" for name in names]
            rows.append(("TTFT parts", f"medians, ms: {', '.join(medians)}"))
        moved = sum(stats.get("transfer_bytes", 0) for _, stats in self._stats)
        if moved:
            busy = sum(stats["transfer_seconds"] for _, stats in self._stats if "transfer_seconds" in stats)
            speed = moved / max(busy, 1e-9) / 1e9
            rows.append(("KV transfer", f"{moved:,.0f} bytes, {speed:.3f} GB/s while receiving"))
        for role in sorted({role for role, stats in self._stats if "rebalances_total" in stats}):
            rows.append(("rebalancing", self._rebalancing(role)))
        for role, stats in {role: stats for role, stats in self._stats if "balancedness" in stats}.items():
            if "rebalances_total" not in stats:
                rows.append(("experts", f"{role}: {balancedness(stats)}, of all that was recorded"))
        if self.retries:
            rows.append(("retries", str(self.retries)))
        return "\n".join(f"{name:>12}  {value}" for name, value in rows)

    def _rate(self, phase: str, tokens: str) -> str:
        """Format one phase's tokens per second. The replicas work in parallel, so the longest time counts."""
        stats = [stats for role, stats in self._stats if phase in ROLE_PHASES[role]]
        done = sum(s.get(tokens, 0) for s in stats)
        seconds = max((s.get(f"{phase}_seconds", 0.0) for s in stats), default=0.0)
        steps = max((s.get(f"{phase}_steps", 0) for s in stats), default=0)
        if not steps:
            return ""
        overlapped = max((s.get(f"{phase}_overlapped", 0) for s in stats), default=0)
        rate = f"{done / seconds:,.0f} tok/s in {steps:.0f} steps of {seconds / steps * 1e3:.1f} ms"
        return rate + (f", {overlapped:.0f} of them overlapped" if overlapped else "")

    def _rebalancing(self, role: str) -> str:
        """Format the rebalancing of the first job to leave. A job's replicas all report the same numbers."""
        stats = next(stats for of, stats in self._stats if of == role and "rebalances_total" in stats)
        total, failed = stats["rebalances_total"], stats["rebalance_failures"]
        parts = [f"{role}: {total:.0f} times" + (f" in {stats['rebalance_seconds']:.2f} s" if total else "")]
        parts += [f"{failed:.0f} failed"] if failed else []
        parts += [f"{balancedness(stats)} at the last look"] if "balancedness" in stats else []
        return ", ".join(parts)
