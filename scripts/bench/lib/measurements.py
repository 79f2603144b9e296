"""The project's figures: docs/measurements.json, and how benchmarks make them.

A benchmark collects measurements and writes them to a file with `save`. On a machine without the repository's history
their commit is empty. `python -m scripts.bench.lib.report --merge FILE` fills it in when it adds them to the store.
"""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.bench.lib.store import STORE, rows

ROOT = Path(__file__).parents[3]
KINDS = ("measured", "simulated", "modelled")
LOCAL = ("--out", "--trace", "--chart", "--peer-python", "--generator-python")
PACKAGES = ("torch", "triton", "deep_gemm", "flash_mla", "deep_ep", "transformers")


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    return f"CPU, {platform.machine()}"


@cache
def versions() -> dict[str, str]:
    """Return the versions of the installed packages that matter, by import name."""
    found = {"python": platform.python_version()}
    distributions = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        for distribution in distributions.get(package, [])[:1]:
            found[package] = importlib.metadata.version(distribution)
    return found


@cache
def commit() -> str:
    """Return the commit that is checked out; empty where there is no history."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


def command() -> str:
    """Return the command that runs, without the paths of files and environments on this machine."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    kept = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    spec = sys.modules["__main__"].__spec__
    kept += ["-m", spec.name.removesuffix(".__main__")] if spec is not None else sys.argv[:1]
    words = iter(sys.argv[1:])
    for word in words:
        if word in LOCAL:
            next(words, None)
        elif word.split("=")[0] not in LOCAL:
            kept.append(word)
    return shlex.join(kept)


@dataclass(frozen=True)
class Measurement:
    """One figure. `reference` is a value to compare it with, in the same unit; `source` says where that comes from."""

    name: str
    value: float
    unit: str
    better: str = "higher"  # or "lower"
    reference: float | None = None
    source: str = ""
    kind: str = "measured"
    machine: str = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command)
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.better not in ("higher", "lower"):
            raise ValueError(f"{self.name}: better is {self.better!r}; it must be higher or lower")

    @property
    def ratio(self) -> float | None:
        """How many times as good as the reference: over 1 is better, for rates and for times. None without one."""
        if self.reference is None:
            return None
        good, other = (self.value, self.reference) if self.better == "higher" else (self.reference, self.value)
        return good / other if other else None


class Report:
    """A benchmark's figures: the first rank prints each when it is measured, and every rank keeps them."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.records: list[Measurement] = []

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def keep(self, figure: Measurement) -> None:
        line = f"{figure.name:90} {figure.value:12,.3f} {figure.unit}"
        if figure.ratio is not None:
            line += f" = {figure.ratio:.3f} of {figure.reference:,.4g}, {figure.source}"
        self.say(line.rstrip())
        self.records.append(figure)


def load(path: Path = STORE) -> list[Measurement]:
    """Read a file of measurements; none if it does not exist. Raises ValueError if it holds anything else."""
    found = rows(path)
    try:
        return [Measurement(**{k: v for k, v in row.items() if k != "ratio"}) for row in found]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark's records ({error})") from None


def save(records: list[Measurement], path: Path = STORE) -> None:
    """Write a file of measurements: JSON, with a line for each."""
    kept = [json.dumps(asdict(record) | {"ratio": record.ratio}) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(kept) + "\n]\n")


def merge(new: list[Measurement], old: list[Measurement]) -> list[Measurement]:
    """Merge by name: a new figure replaces the old one of its name, or is added at the end."""
    latest = {record.name: record for record in old} | {record.name: record for record in new}
    return list(latest.values())
