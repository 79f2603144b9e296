"""The kernel benchmarks' table: each row is printed when it is measured, and kept as a figure."""

import torch

from scripts.bench.lib.measurements import Measurement

RECORDS: list[Measurement] = []


def header() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'op':24} {'shape':34} {'ours us':>9} {'vendor us':>9} {'ratio':>6} {'rate':>9}")


def report(op: str, shape: str, ours: float, vendor: float | None, work: float, unit: str, name: str = "") -> None:
    """Add a row. `ours`, `vendor`: microseconds. `work`: FLOP or bytes. `unit`: of work / time. `name`: the vendor."""
    theirs = f"{vendor:9.1f} {vendor / ours:6.2f}" if vendor else f"{'-':>9} {'-':>6}"
    print(f"{op:24} {shape:34} {ours:9.1f} {theirs} {work / ours / 1e6:9.2f} {unit} {name}", flush=True)
    source = f"{name}, same run" if vendor else ""
    full = f"{op}, {shape}" + (f", against {name}" if vendor else "")
    RECORDS.append(Measurement(full, round(ours, 2), "us", "lower", vendor and round(vendor, 2), source))
