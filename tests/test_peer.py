"""The engine's benchmark with transformers as its peer, on the shipped model's shape.

SGLang needs a GPU. Only what its figures are made of is tested here.
"""

from pathlib import Path

import pytest

from scripts.bench.lib.measurements import load
from tests.conftest import ROOT
from tests.processes import run_module

WORK = "--shape tiny --layers 2 --batch 1,3 --prompt 20 --output 4 --prefill-batch 2 --step-tokens 40 --repeat 1"


def test_the_benchmark_puts_a_peer_beside_the_engine(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    run = run_module("scripts.bench.engine", *WORK.split(), "--peer", "transformers", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    records = {record.name: record for record in load(out)}
    for work in ("prefill 2 x 20", "prefill 1 x 20", "decode, batch 1 after 20", "decode, batch 3 after 20"):
        ours, beside = records[f"tiny, {work}"], records[f"tiny, {work}, against transformers"]
        assert beside.value == ours.value > 0 and beside.reference > 0
        assert beside.source.startswith("transformers ") and beside.source.endswith(", same run")


def test_a_peer_that_fails_ends_the_benchmark() -> None:
    run = run_module("scripts.bench.engine", *WORK.split(), "--peer", "--peer-python", "false")
    assert run.returncode == 1 and "the peer failed (status 1)" in run.stderr


def test_sglangs_rates_are_those_of_the_steps_in_which_all_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench/engine"))
    import peer_sglang as sglang

    steps = [(1.0, b"C", 4, 0), (2.0, b"P", 2, 60), (2.5, b"D", 2, 0), (3.0, b"P", 2, 40)]  # two join, and the others
    steps += [(4.0, b"D", 4, 0), (4.5, b"D", 4, 0), (5.0, b"D", 4, 0), (9.0, b"D", 4, 0), (9.1, b"D", 1, 0)]
    path = tmp_path / "marks"
    earlier, late = (sglang.RECORD.pack(when, b"D", 4, 0) for when in (0.5, 0.9))  # steps of earlier requests
    path.write_bytes(earlier + late + b"".join(sglang.RECORD.pack(*step) for step in steps))
    marks = sglang.read(str(path), len(earlier))
    assert marks == [sglang.Mark(*step) for step in steps]
    assert sglang.prefill_rate(marks, 100) == 100 / (3.0 - 1.0)
    assert sglang.decode_rate(marks, 4) == 4 * 2 / (5.0 - 4.0)
