"""The one-rank benchmark on a CPU, with the tiny shape: its parts and gaps sum to the layer, and it says simulated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PHASES = {
    "decode": ("--ep", "4", "--batch", "4", "--kv", "100", "--skew", "1.5"),
    "prefill": ("--ep", "4", "--tokens", "128", "--prompt", "64"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_parts_sum_to_the_layer(phase: str, tmp_path: Path) -> None:
    flags = (
        "--shape",
        "tiny",
        "--redundant",
        "4",
        "--repeat",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r.json"),
    )
    command = [sys.executable, "scripts/bench_rank.py", phase, *PHASES[phase], *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "arrivals simulated" in done.stdout
    records = json.loads((tmp_path / "r.json").read_text())
    assert all("simulated" in record["name"] for record in records)
    values = {record["name"].split(": ")[1]: record["value"] for record in records}
    layer, step = values.pop("a MoE layer"), values.pop("the step, computation alone")
    assert sum(values.values()) == pytest.approx(layer, abs=0.001) and step > layer
    core = {"MLA core, a MoE layer", "routed experts, a MoE layer", "router, a MoE layer", "gaps, a MoE layer"}
    assert core < values.keys()


def test_slots_that_do_not_divide_are_refused() -> None:
    command = [sys.executable, "scripts/bench_rank.py", "decode", "--shape", "tiny", "--ep", "5", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode and "(experts + redundant) % ep must be 0, not 64 % 5 = 4" in done.stderr
