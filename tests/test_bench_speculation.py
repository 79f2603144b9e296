"""Benchmarks of drafts: acceptance is forced as asked and said so, and counts of real drafts are the engine's own."""

from pathlib import Path

import pytest
import torch

from disagg import speculation
from model.sampling import accepted
from scripts.bench.lib.forced import ForcedAcceptance, forced_acceptance
from scripts.bench.lib.measurements import load
from tests.processes import run_module

CPU = torch.device("cpu")


@pytest.mark.parametrize(("accept", "drafts"), [(0.0, 2), (0.3, 4), (0.6, 1), (0.6, 2), (1.0, 3)])
def test_a_draft_is_taken_as_right_with_the_probability_if_those_before_it_are(accept: float, drafts: int) -> None:
    forced, chosen = ForcedAcceptance(accept, CPU), torch.zeros(500, drafts + 1, dtype=torch.int64)
    counts = torch.stack([forced(chosen[:, 1:], chosen) for _ in range(40)])
    again = ForcedAcceptance(accept, CPU)
    assert torch.equal(again(chosen[:, 1:], chosen), counts[0]), "ranks draw alike"
    assert accept in (0, 1) or not torch.equal(counts[0], counts[1])
    for place in range(1, drafts + 1):
        reached, right = (counts >= place - 1).sum().item(), (counts >= place).sum().item()
        spread = 4 * (accept * (1 - accept) / max(reached, 1)) ** 0.5
        assert abs(right - accept * reached) <= spread * reached, place
    assert counts.min() >= 0 and counts.max() <= drafts


def test_it_is_forced_only_meanwhile() -> None:
    with forced_acceptance(0.6, CPU):
        assert isinstance(speculation.accepted, ForcedAcceptance)
    assert speculation.accepted is accepted


def test_the_engines_rates_with_drafts_say_what_was_forced(tmp_path: Path) -> None:
    """All drafts are taken as right, so that a step gives exactly three tokens."""
    work = "--shape tiny --layers 2 --batch 1,3 --prompt 20 --output 12 --prefill-batch 2 --step-tokens 40 --repeat 1"
    flags = *work.split(), "--device", "cpu", "--speculate", "2", "--accept", "1"
    run = run_module("scripts.bench.engine", *flags, "--out", str(tmp_path / "r.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    records = {record.name: record for record in load(tmp_path / "r.json")}
    label = ", drafts: 2, forced acceptance 1"
    for batch in (1, 3):
        name = f"tiny, decode, batch {batch} after 20"
        drafted, beside = records[f"{name}{label}"], records[f"{name}, against no drafts{label}"]
        assert drafted.value == beside.value > 0 and beside.reference == records[name].value > 0
        each = records[f"tiny, tokens per step and request, batch {batch}{label}"]
        assert each.value == each.reference == 3
    plain = [name for name in records if not name.endswith(label)]
    assert len(plain) == len([name for name in records if name.endswith(label) and "against" not in name]) - 2
    assert all(label in line for line in run.stdout.splitlines() if "drafts" in line)
