"""The project's figures: docs/measurements.json, one record a figure, and how benchmarks make such records.

A benchmark collects records and writes them with `save`; on a machine without the repository's history the commit is
filled in when `report.py --merge FILE` takes them over.
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

ROOT = Path(__file__).parents[3]
STORE = ROOT / "docs" / "measurements.json"
KINDS = ("measured", "simulated", "modelled")
LOCAL = ("--out", "--trace", "--chart", "--peer-python")
PACKAGES = ("torch", "triton", "deep_gemm", "flash_mla", "deep_ep", "transformers")


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    return f"CPU, {platform.machine()}"


@cache
def versions() -> dict[str, str]:
    """What is installed of the packages that matter, by import or distribution name."""
    found = {"python": platform.python_version()}
    distributions = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        for distribution in distributions.get(package, [])[:1]:
            found[package] = importlib.metadata.version(distribution)
    return found


@cache
def commit() -> str:
    """The commit that is checked out; empty where there is no history."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


def command() -> str:
    """What was run, without where files and environments lie on this machine."""
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
class Record:
    """One figure. `reference` is what it is held against, in the same unit, and `source` where that comes from."""

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
        """How many times as good as the reference; over 1 is better, whichever way the unit points."""
        if self.reference is None:
            return None
        good, other = (self.value, self.reference) if self.better == "higher" else (self.reference, self.value)
        return good / other if other else None


def load(path: Path = STORE) -> list[Record]:
    """ValueError if the file holds anything else."""
    if not path.exists():
        return []
    try:
        return [Record(**{k: v for k, v in row.items() if k != "ratio"}) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a benchmark's records ({error})") from None


def save(records: list[Record], path: Path = STORE) -> None:
    rows = [asdict(record) | {"ratio": record.ratio} for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def merge(new: list[Record], old: list[Record]) -> list[Record]:
    """`new` replaces figures of the same name, and goes last otherwise."""
    latest = {record.name: record for record in old} | {record.name: record for record in new}
    return list(latest.values())
