"""The engine's benchmark with transformers as its peer, on the shipped model's shape."""

from pathlib import Path

from scripts.bench.lib.measurements import load
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
