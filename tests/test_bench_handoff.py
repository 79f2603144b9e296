"""The benchmark of the handoff, on a CPU over gloo: every part runs, and its figures are consistent."""

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.multiprocessing as mp

from scripts.bench.handoff.jobs import TALKERS, after_the_kill
from scripts.bench.handoff.traffic import AHEAD
from scripts.bench.lib.measurements import load
from tests.processes import ForkedPopen, run_module

TINY = "--device cpu --repeat 12 --prompts 64,128 --kv-layers 2 --wire-bytes 1000000 --interval 0.02"
JOBS = "scripts.bench.handoff.jobs"
QUICK = {f"{JOBS}.Popen": ForkedPopen, f"{JOBS}.TO_STREAM": 8, f"{JOBS}.BURST": 8}
QUICK["torch.multiprocessing.spawn"] = functools.partial(mp.start_processes, start_method="forkserver")
STEPS = "--shape tiny --layers 2 --ep 4 --batch 4 --kv 64 --tokens 128"


def test_all_parts_run_and_their_figures_fit_together(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    flags = f"{TINY} {STEPS} --out {out}"
    run = run_module("scripts.bench.handoff", *flags.split(), timeout=240, constants=QUICK)
    assert run.returncode == 0, run.stdout + run.stderr
    records = {record.name.removeprefix("handoff 1 + 1: "): record for record in load(out)}

    assert records["the shipped model's tokens, all equal to those of one process"].value > 400
    copy, wire = records["copy within one process"].value, records["one large tensor, torch.distributed"]
    assert wire.value > 0 and wire.reference == copy > 0
    for tokens, megabytes in ((64, 0.1), (128, 0.3)):  # x 2 layers x 576 bf16
        what = f"scattered pages of {tokens} tokens, "
        assert records[f"{what}one prompt alone ({megabytes} MB)"].value > 0
        for rate in (f"{AHEAD} prompts at once", "while receiving"):
            assert records[what + rate].value > 0 and records[what + rate].reference == copy

    beside = "transfers of what prefill computes", "transfers without a pause"
    assert all(records[f"{transfers}, beside steps"].value > 0 for transfers in beside)
    for phase in ("prefill", "decode"):
        what = f"a {phase} step of tiny, 2 layers (simulated arrivals), mean"
        idle = records[what].value
        assert all(records[f"{what}, beside {transfers}"].reference == idle > 0 for transfers in beside)

    for length in (64, 128):
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


def test_prefill_jobs_may_be_tensor_parallel(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    flags = f"{TINY} --pairs 2 --prefill-tp 2 --only tokens,requests --out {out}"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": f"{i} is", "max_tokens": 9}) + "\n" for i in range(6)))
    constants = QUICK | {f"{JOBS}.PROMPTS": str(prompts)}
    run = run_module("scripts.bench.handoff", *flags.split(), timeout=240, constants=constants)
    assert run.returncode == 0, run.stdout + run.stderr
    prefix = "handoff 2 + 2, prefill with attention TP 2: "
    records = {record.name.removeprefix(prefix): record.value for record in load(out)}
    assert 6 <= records["the shipped model's tokens, all equal to those of one process"] <= 54
    assert records["prompt 128 in chunks of 64, TTFT"] > 0


def test_the_gap_that_a_kill_falls_into_is_of_after_it() -> None:
    steady, stalled = [0.0, 1, 2, 3, 4, 5, 6], [0.0, 1.5, 2, 3, 5, 6, 9]
    tokens = {talker: stalled if talker == 1 else steady for talker in range(TALKERS)} | {7: [5.5], 8: [4.2]}
    answers = {7: SimpleNamespace(error=None), 8: SimpleNamespace(error=None)}
    router = SimpleNamespace(tokens=tokens, lost_at=[4.0], retried={7: 4.1}, answers=answers)
    found = after_the_kill(router, {"talking": 0.0, "killed": 3.5, "answered": 6.0}, [7, 8])
    assert (found["gap before"], found["gap after"]) == (1.5, 2)
    assert (found["noticed"], found["retried"], found["errors"]) == (0.5, 1, 0)
    assert found["last of them answered"] == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    (
        ("--only wire,fast", "--only fast: the parts are tokens, wire"),
        ("--prompts 64,40000", "--prompts 40000: it must be at most 32704"),
        ("--pairs 2 --prefill-tp 3", "--pairs % --prefill-tp must be 0, not 2 % 3 = 2"),
        ("--pairs 2 --prefill-tp 2", "--prefill-tp 2: it is for --only tokens,requests,kill"),
        ("--only kill --talk 32705", "--talk 32705: it must be at most 32704"),
    ),
)
def test_what_cannot_be_is_refused(flags: str, told: str) -> None:
    run = run_module("scripts.bench.handoff", *flags.split(), timeout=60)
    assert run.returncode == 2 and told in run.stderr


@pytest.mark.parametrize("transport, module", [("nixl", "nixl_cu13"), ("mooncake", "mooncake")])
def test_a_library_is_timed_by_itself_and_in_the_handoff(transport: str, module: str, tmp_path: Path) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    out = tmp_path / "records.json"
    flags = f"{TINY} --transport {transport} --only wire,pages --out {out}"
    run = run_module("scripts.bench.handoff", *flags.split(), timeout=120, constants=QUICK)
    assert run.returncode == 0, run.stdout + run.stderr
    records = {record.name.removeprefix(f"handoff 1 + 1, {transport}: "): record for record in load(out)}
    own = records["the library's own loop, 1 MB of scattered pages of one layer"]
    assert own.reference == records["copy within one process"].value > 0
    for rate in (f"{AHEAD} prompts at once", "while receiving"):
        record = records[f"scattered pages of 128 tokens, {rate}"]
        assert record.value > 0 and record.reference == own.value > 0
