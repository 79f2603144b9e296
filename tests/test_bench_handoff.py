"""The handoff's benchmark on a CPU, over gloo: every part runs, and the figures fit together."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.measurements import load
from tests.conftest import ROOT

TINY = "--device cpu --repeat 3 --prompts 64,256 --kv-layers 2 --wire-bytes 1000000 --interval 0.02"
STEPS = "--shape tiny --layers 2 --ep 4 --batch 4 --kv 64 --tokens 128"


def test_all_parts_run_and_their_figures_fit_together(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    command = [sys.executable, "scripts/bench_handoff.py", *TINY.split(), *STEPS.split(), "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tokens of 1 prefill + 1 decode ranks equal those of one process" in run.stdout
    records = {record.name.removeprefix("handoff 1 + 1: "): record for record in load(out)}

    mb, ms = 256 * 2 * 576 * 2 / 1e6, records["scattered pages of 256 tokens, one prompt alone (0.6 MB)"].value
    receiving = records["scattered pages of 256 tokens, while receiving"]
    assert receiving.reference == records["one large tensor, torch.distributed"].value > 0
    assert (
        mb == pytest.approx(0.6, abs=0.05) and mb / ms < 2 * receiving.value
    )  # alone it is packed, told and unpacked too

    for length in (64, 256):
        row = {
            name.split(", ")[1]: record.value
            for name, record in records.items()
            if name.startswith(f"prompt {length} in chunks of 64, ") and record.unit == "ms"
        }
        assert min(row.values()) > 0, row  # also what remains of the TTFT beside its parts
        assert row["prefill"] < row["TTFT"]
    killed = {name.split(": ")[1]: record.value for name, record in records.items() if "SIGKILL" in name}
    assert killed["requests that end with an error"] == 0
    assert 0 < killed["the router notices after"] < 5000


def test_a_part_that_does_not_exist_is_refused() -> None:
    command = [sys.executable, "scripts/bench_handoff.py", "--only", "wire,fast"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "--only fast: the parts are tokens, wire" in run.stderr
