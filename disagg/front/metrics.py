"""Metrics: what the router counts while it serves, and the summary table at the end.

The router calls the methods. `http/metrics.py` and `progress.py` read the counts. Nothing here grows with the number of
requests.
"""

from collections import Counter

from disagg.control.messages import Parts
from disagg.front.histogram import Histogram
from disagg.front.spread import Spreads

STEP_TOKENS = {"prefill": "prompt_tokens", "decode": "decode_step_tokens"}  # phase -> the statistic of its tokens
ROLE_PHASES = {"unified": ("prefill", "decode"), "prefill": ("prefill",), "decode": ("decode",)}


def balancedness(stats: dict[str, float]) -> str:
    """Format the balancedness: averaged over the layers with experts, the range over these, and the draft layer's."""
    layers = [value for name, value in stats.items() if name.startswith("balancedness_")]
    drafts = f", draft layer {stats['draft_balancedness']:.3f}" if "draft_balancedness" in stats else ""
    return f"balancedness {stats['balancedness']:.3f} (layers {min(layers):.3f} to {max(layers):.3f}{drafts})"


def drafts_by_place(stats: dict[str, float], kind: str) -> list[float]:
    """Return how many drafts in each place were `kind`, verified or accepted, of a replica's statistics."""
    names = sorted(name for name in stats if name.startswith(f"{kind}_drafts_"))
    return [stats[name] for name in names]


class Metrics:
    """The router's numbers: latencies that it measures, and the replicas' statistics, sent when they leave."""

    def __init__(self, spreads: Spreads | None = None) -> None:
        """`spreads`: the loads of the replicas over time."""
        self._spreads = spreads or Spreads()
        self.finished: Counter[str] = Counter()  # requests, by finish_reason
        self.prompt_tokens = self.generated_tokens = 0  # of the requests that have ended
        self.retries = 0  # attempts that followed another one
        self.migrations = 0  # retries because a replica was lost
        self.refusals = 0  # what ports have refused to hear, at the end
        self.ttft, self.inter_token, self.latency = Histogram(), Histogram(), Histogram()
        self.parts = {name: Histogram() for name in Parts.__struct_fields__}  # of the TTFT of handed-over requests
        self._began = self._latest_end = 0.0  # time.monotonic()
        self._stats: list[tuple[str, dict[str, float]]] = []

    def begin(self, now: float) -> None:
        """Start the wall time."""
        self._began = self._latest_end = now

    def first_token(self, seconds: float, parts: Parts | None = None) -> None:
        """Count a request's first token, `seconds` after it was submitted."""
        self.ttft.add(seconds)
        if parts is not None:
            for name, histogram in self.parts.items():
                histogram.add(getattr(parts, name))

    def next_tokens(self, seconds: list[float]) -> None:
        """Count times between two updates of a request. Several tokens in one update are one observation.

        Most requests of a step share one time, so equal times are counted together.
        """
        for value, times in Counter(seconds).items():
            self.inter_token.add(value, times)

    def retried(self, lost: bool) -> None:
        """Count a request that begins again. `lost`: because its replica was lost, so that it must move."""
        self.retries += 1
        self.migrations += lost

    def refused(self) -> None:
        """Count a request that the front door refused, which never reached the router."""
        self.finished["error"] += 1

    def ended(self, reason: str, now: float, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """Count a request's end, `seconds` after it was submitted. `reason`: its finish_reason, or "cancelled"."""
        self.finished[reason] += 1
        if reason not in ("error", "cancelled"):
            self.latency.add(seconds)
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens
        self._latest_end = now

    def replica_left(self, role: str, stats: dict[str, float]) -> None:
        self._stats.append((role, stats))

    def table(self) -> str:
        rows = [("requests", ", ".join(f"{n} {reason}" for reason, n in sorted(self.finished.items()) if n) or "none")]
        seconds = self._latest_end - self._began
        rows.append(("wall time", f"{seconds:.2f} s"))
        rows.append(("tokens", f"{self.prompt_tokens} prompt, {self.generated_tokens} generated"))
        if seconds > 0:
            total = (self.prompt_tokens + self.generated_tokens) / seconds
            rows.append(("overall", f"{total:,.0f} tok/s, {self.generated_tokens / seconds:,.0f} generated tok/s"))
        for phase, tokens in STEP_TOKENS.items():
            if rate := self._rate(phase, tokens):
                rows.append((phase, rate))
        for name, times in (("TTFT", self.ttft), ("inter-token", self.inter_token)):
            if times.count:
                median, p99 = (times.percentile(share) * 1e3 for share in (0.5, 0.99))
                rows.append((name, f"median {median:.1f} ms, p99 {p99:.1f} ms"))
        rows += self._spreads.rows()
        if self.parts["queue"].count:
            medians = [f"{name} {times.percentile(0.5) * 1e3:.1f}" for name, times in self.parts.items()]
            rows.append(("TTFT parts", f"medians, ms: {', '.join(medians)}"))
        moved = sum(stats.get("transfer_bytes", 0) for _, stats in self._stats)
        if moved:
            busy = sum(stats["transfer_seconds"] for _, stats in self._stats if "transfer_seconds" in stats)
            speed = moved / max(busy, 1e-9) / 1e9
            rows.append(("KV transfer", f"{moved:,.0f} bytes, {speed:.3f} GB/s while receiving"))
        for role in sorted({role for role, stats in self._stats if stats.get("cache_hit_tokens")}):
            rows.append(("prefix cache", self._cache(role)))
        for role in sorted({role for role, stats in self._stats if stats.get("verifications")}):
            rows.append(("drafts", self._drafts(role)))
        for role in sorted({role for role, stats in self._stats if "rebalances_total" in stats}):
            rows.append(("rebalancing", self._rebalancing(role)))
        for role, stats in {role: stats for role, stats in self._stats if "balancedness" in stats}.items():
            if "rebalances_total" not in stats:
                rows.append(("experts", f"{role}: {balancedness(stats)}, of all that was recorded"))
        if self.retries:
            rows.append(("retries", str(self.retries)))
        if refusals := self.refusals + sum(stats.get("refusals", 0) for _, stats in self._stats):
            rows.append(("refusals", f"{refusals:,.0f} of connections, messages, links and replicas"))
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

    def _cache(self, role: str) -> str:
        """Format what a role's replicas found in their prefix caches."""
        names = ("cache_hit_tokens", "prompt_tokens", "cache_evictions", "cache_idle_pages")
        hits, computed, evicted, idle = (sum(s.get(name, 0) for of, s in self._stats if of == role) for name in names)
        share = f" ({hits / (hits + computed):.1%} of all)" if computed else ""
        return f"{role}: {hits:,.0f} prompt tokens{share}; {evicted:,.0f} pages evicted, {idle:,.0f} kept"

    def _drafts(self, role: str) -> str:
        """Format the tokens and drafts of a step that verified, per request, and the share that was right by place."""
        drafting = [stats for of, stats in self._stats if of == role and "verifications" in stats]
        steps = sum(stats["verifications"] for stats in drafting)
        verified, right = (
            [sum(counts) for counts in zip(*(drafts_by_place(stats, kind) for stats in drafting), strict=True)]
            for kind in ("verified", "accepted")
        )
        shares = ", ".join(f"{n / of:.1%}" if of else "-" for n, of in zip(right, verified, strict=True))
        rate = f"{1 + sum(right) / steps:.2f} tokens per request and step"
        return f"{role}: {rate}, of {sum(verified) / steps:.2f} drafts; right by place: {shares}"

    def _rebalancing(self, role: str) -> str:
        """Format the rebalancing of the first job to leave. A job's replicas all report the same numbers."""
        stats = next(stats for of, stats in self._stats if of == role and "rebalances_total" in stats)
        total, failed = stats["rebalances_total"], stats["rebalance_failures"]
        parts = [f"{role}: {total:.0f} times" + (f" in {stats['rebalance_seconds']:.2f} s" if total else "")]
        parts += [f"{failed:.0f} failed"] if failed else []
        parts += [f"{balancedness(stats)} at the last look"] if "balancedness" in stats else []
        return ", ".join(parts)
