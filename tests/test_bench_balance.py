"""The benchmark of balanced experts: a recorded load's fullest rank against numbers by hand, and a run on a CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.bench.one_rank.balance import fullest
from tests.test_bench_rank import run, run_well

RECORDING = "docs/recordings/moving-decode.safetensors"
TINY = ("--shape", "tiny", "--device", "cpu")


def test_the_fullest_rank_by_hand() -> None:
    """Three experts in four slots on two ranks. Expert 0 has two slots, and half of its copies in each."""
    counts = np.array([[[6, 3, 1], [2, 2, 6]], [[0, 0, 0], [0, 0, 0]], [[0, 10, 0], [1, 1, 8]]])
    of_slot = np.array([[0, 1, 2, 0], [0, 1, 2, 0]])
    shares = fullest(counts, [of_slot] * 3, 2, 4)
    # layer 0: 0.3 + 0.3 before 0.1 + 0.3; layer 1: 0.1 + 0.2, 0.6 + 0.1; then 0 + 1 and 0.05 + 0.1, 0.8 + 0.05
    np.testing.assert_allclose(shares, [[0.3, 0.3], [0.6, 0.1], [0.0, 1.0], [0.8, 0.05]])
    np.testing.assert_allclose(fullest(counts, [of_slot] * 3, 2, 2), [[0.3, 0.3], [0.8, 0.05]])
    other = np.array([[0, 2, 1, 0], [0, 1, 2, 0]])
    np.testing.assert_allclose(fullest(counts, [other, of_slot, of_slot], 2, 4)[:2], [[0.3, 0.3], [0.6, 0.1]])


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_recorded_load_is_measured_by_kind_of_map(phase: str, tmp_path: Path) -> None:
    sizes = {"decode": ("--batch", "4", "--kv", "70"), "prefill": ("--tokens", "128", "--prompt", "64")}[phase]
    out = tmp_path / "b.json"
    said = run_well("one_rank.balance", phase, RECORDING, *TINY, *sizes, "--repeat", "2", "--out", str(out))
    assert said.count("(simulated)") == 4 and "an even load: the fullest rank has 1.000 of the mean" in said
    records = {record["name"]: record for record in json.loads(out.read_text())}
    assert len(records) == 4 + 2 and {record["kind"] for record in records.values()} == {"simulated"}
    what = f"moving-decode, {phase} at EP12 with 4 redundant experts, one rank of tiny's layers with 32 experts"
    assert all(name.startswith(what) for name in records)
    times = [
        next(record["value"] for name, record in records.items() if f"{kind} map: the step" in name)
        for kind in ("unbalanced", "static")
    ]
    gain = next(r for name, r in records.items() if "static map: throughput" in name)
    assert gain["value"] == pytest.approx(times[0] / times[1], rel=0.01)
    assert gain["reference"] == {"decode": 2.54, "prefill": 1.49}[phase]


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ("decode nowhere.safetensors", "nowhere.safetensors: not a recording"),
        (f"decode {RECORDING} --top-k 8", "--top-k 8: an expert gets 0.1"),
        (f"decode {RECORDING} --ep 5", "(experts + redundant) % ep must be 0, not 36 % 5 = 1"),
        (f"prefill {RECORDING} --tokens 100 --prompt 64", "tokens % prompt must be 0, not 100 % 64 = 36"),
    ],
)
def test_what_cannot_be_is_refused(flags: str, rule: str) -> None:
    done = run("one_rank.balance", *flags.split(), *TINY)
    assert done.returncode == 2 and rule in done.stderr.replace("\n", " "), done.stderr
