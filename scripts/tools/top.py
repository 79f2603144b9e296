"""All jobs of a deployment, live in a terminal, from the router's /metrics.

    scripts/top http://127.0.0.1:8000

A rate is the growth over the last WINDOW_S, so rates need a second look. Replicas report every few seconds. So a job's
rates are those between its reports, whose age the metrics say. Ctrl-C ends it.
"""

import argparse
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

TIMEOUT_S = 5.0
WINDOW_S = 15.0
MOST_BYTES = 64 * 2**20  # of an answer
Labels = tuple[tuple[str, str], ...]
JOB = ("role", "job")
PHASES = ("prefill", "decode")
NUMBERS = ("replicas", "run", "wait", "KV", "fullest", "tok/s", "ms/step", "overlap", "GB/s", "failed")
NUMBERS += ("balance", "look", "move")
WIDTH = 120  # where the output is no terminal


@dataclass(frozen=True)
class Scrape:
    """The samples of one answer, by name and labels."""

    at: float  # time.monotonic()
    samples: dict[str, dict[Labels, float]]

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of this name with at least these labels."""
        return sum(self.of(name, **labels).values())

    def of(self, name: str, **labels: str) -> dict[Labels, float]:
        """Return all samples of this name with at least these labels, by labels."""
        return {of: value for of, value in self.samples.get(name, {}).items() if labels.items() <= dict(of).items()}

    def jobs(self) -> list[dict[str, str]]:
        """Return role and job of each job, prefill jobs first."""
        capacities = self.samples.get("moesaic_kv_pages_capacity", {})
        found = {tuple((name, dict(of)[name]) for name in JOB) for of in capacities}
        return [dict(job) for job in sorted(found, reverse=True)]


def parse(text: str, at: float) -> Scrape:
    """Raises ValueError if it is not Prometheus' text form, or not from a router."""
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name][tuple(sample.labels.items())] = sample.value
    if "moesaic_requests" not in samples:
        raise ValueError("no metrics of a moesaic router are there")
    return Scrape(at, samples)


def fetch(url: str) -> Scrape:
    """Raises ValueError, in one line, if there are no metrics."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_S) as answer:
            return parse(answer.read(MOST_BYTES).decode(), time.monotonic())
    except urllib.error.URLError as error:
        raise ValueError(f"{url}: {getattr(error, 'reason', error)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None


def rate(before: Scrape | None, now: Scrape, name: str, **labels: str) -> float | None:
    """Return the growth per second. None without an earlier scrape, or if a counter has begun anew."""
    if before is None or now.at <= before.at:
        return None
    growth = now.sum(name, **labels) - before.sum(name, **labels)
    return growth / (now.at - before.at) if growth >= 0 else None


def job_rate(before: Scrape | None, now: Scrape, name: str, job: dict[str, str]) -> float | None:
    """Return the growth per second between the job's reports. None if there was no report in between."""
    if before is None:
        return None
    elapsed = now.at - report_age(now, job) - (before.at - report_age(before, job))
    growth = now.sum(name, **job) - before.sum(name, **job)
    return growth / elapsed if growth >= 0 and elapsed > 0.1 else None


def report_age(scrape: Scrape, job: dict[str, str]) -> float:
    """Return the mean age of the reports of a job's replicas."""
    ages = scrape.of("moesaic_report_age_seconds", **job).values()
    return sum(ages) / len(ages) if ages else 0.0


def quantile(before: Scrape | None, now: Scrape, name: str, share: float) -> float | None:
    """Return the upper bound of the bucket with this share of the observations since `before`, or None."""
    counts = dict(now.samples.get(f"{name}_bucket", {}))
    for of, count in (before.samples.get(f"{name}_bucket", {}) if before is not None else {}).items():
        counts[of] = counts.get(of, 0) - count
    bounds = sorted((float(dict(of)["le"]), count) for of, count in counts.items())
    total = bounds[-1][1] if bounds else 0
    return next((bound for bound, count in bounds if count >= share * total), None) if total > 0 else None


def shown(value: float | None, pattern: str = "{:,.0f}") -> str:
    return "-" if value is None else pattern.format(value)


def seconds(value: float | None) -> str:
    """Format a bound on a time."""
    return "-" if value is None else f"<= {value * 1e3:,.0f} ms" if value < 10 else f"<= {value:,.0f} s"


def ratio(over: float | None, under: float | None, pattern: str) -> str:
    return pattern.format(over / under) if over is not None and under else "-"


def summary(before: Scrape | None, now: Scrape) -> Text:
    """Return the lines about requests."""
    states = ", ".join(f"{now.sum('moesaic_requests', state=s):,.0f} {s}" for s in ("waiting", "queued", *PHASES))
    ended = now.samples.get("moesaic_requests_ended_total", {})
    ends = ", ".join(f"{count:,.0f} {dict(of)['reason']}" for of, count in ended.items()) or "none"
    rates = {kind: rate(before, now, "moesaic_tokens_total", kind=kind) for kind in ("prompt", "generated")}
    tokens = ", ".join(f"{shown(per_second)} {kind}" for kind, per_second in rates.items())
    times = []
    for title, name in (("TTFT", "time_to_first_token"), ("inter-token", "inter_token"), ("request", "request")):
        p50, p99 = (seconds(quantile(before, now, f"moesaic_{name}_seconds", share)) for share in (0.5, 0.99))
        times.append(f"{title} p50 {p50}, p99 {p99}")
    moved = f"{now.sum('moesaic_retries_total'):,.0f} retries, {now.sum('moesaic_migrations_total'):,.0f} migrations"
    lines = f"requests  {states}; ended: {ends}; {moved}", f"tokens/s  {tokens}", f"times     {'; '.join(times)}"
    return Text("\n".join(lines))


def table(before: Scrape | None, now: Scrape) -> Table:
    """Return a row per job."""
    made = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("role", "job"):
        made.add_column(name, no_wrap=True)
    for name in NUMBERS:
        made.add_column(name, justify="right", no_wrap=True)
    for job in now.jobs():
        made.add_row(job["role"], job["job"], *_numbers(before, now, job))
    return made


def _numbers(before: Scrape | None, now: Scrape, job: dict[str, str]) -> Iterable[str]:
    pages, capacity = (now.of(name, **job) for name in ("moesaic_kv_pages", "moesaic_kv_pages_capacity"))
    shares = [used / capacity[replica] for replica, used in pages.items() if capacity.get(replica)]
    yield str(len(capacity))
    yield shown(now.sum("moesaic_running_requests", **job))
    yield shown(now.sum("moesaic_waiting_requests", **job))
    yield ratio(sum(pages.values()) if pages else None, sum(capacity.values()), "{:.0%}")
    yield shown(max(shares, default=None), "{:.0%}")
    yield shown(job_rate(before, now, "moesaic_step_tokens_total", job))
    steps, time_spent = (job_rate(before, now, f"moesaic_{name}_total", job) for name in ("steps", "step_seconds"))
    yield ratio(None if time_spent is None else time_spent * 1e3, steps, "{:.1f}")
    yield ratio(job_rate(before, now, "moesaic_overlapped_steps_total", job), steps, "{:.0%}")
    moved, busy = (job_rate(before, now, f"moesaic_transfer_{name}_total", job) for name in ("bytes", "seconds"))
    yield ratio(None if moved is None else moved / 1e9, busy, "{:.2f}")
    yield shown(now.sum("moesaic_transfer_failures_total", **job))
    yield shown(max(now.of("moesaic_balancedness", **job).values(), default=None), "{:.3f}")
    for what in ("look", "move"):
        yield shown(max(now.of(f"moesaic_expert_{what}_age_seconds", **job).values(), default=None), "{:,.0f} s")


def view(before: Scrape | None, now: Scrape) -> RenderableType:
    return Group(summary(before, now), Text(), table(before, now))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/top", description=__doc__.partition("\n")[0])
    parser.add_argument("url", metavar="URL", help="where the router's HTTP listens, for example http://127.0.0.1:8000")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (2)")
    parser.add_argument("--once", action="store_true", help="print one look without rates, and end")
    args = parser.parse_args(argv)
    if not 0.1 <= args.every <= 3600:
        parser.error(f"--every is {args.every:g}; it must be in 0.1..3600")
    if not args.url.startswith(("http://", "https://")):
        parser.error(f"URL is {args.url!r}; it must begin with http:// or https://")
    return args


def main() -> int:
    args, console = parse_args(), Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    try:
        looks = deque([fetch(args.url)])
        if args.once:
            console.print(view(None, looks[0]))
            return 0
        with Live(view(None, looks[0]), console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                time.sleep(args.every)
                problem = Text()
                try:
                    looks.append(fetch(args.url))
                except ValueError as error:  # the router may come back
                    problem = Text(f"\n{error}", style="bold")
                while len(looks) > 2 and looks[-1].at - looks[0].at > WINDOW_S:
                    looks.popleft()
                before = looks[0] if len(looks) > 1 else None
                live.update(Group(view(before, looks[-1]), problem), refresh=True)
    except ValueError as error:
        print(f"scripts/top: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
