"""Benchmarks of drafts: acceptance is forced as asked and said so, and counts of real drafts are the engine's own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disagg import speculation
from disagg.control.messages import Submit
from disagg.pipeline import Pipeline
from disagg.request import Request
from disagg.unified import Unified
from model.batch import page_rows
from model.sampling import accepted
from scripts.bench.lib.forced import ForcedAcceptance, forced_acceptance
from scripts.bench.lib.measurements import load
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.one_rank import deepep_times
from scripts.bench.one_rank.drafts import DraftingStep
from scripts.bench.one_rank.simulated_load import SimulatedLoad
from tests.processes import run_module
from tests.test_speculation import make_engine, prompts_of

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


@pytest.mark.parametrize("drafts", [1, 3])
def test_one_ranks_step_is_the_engines(tiny: Path, drafts: int) -> None:
    """With the engine's dispatcher and real acceptance, from the same fronts and KV, it makes the same fronts."""
    engine = make_engine(tiny, drafts)
    role, model = Unified(engine), engine.model
    pipeline = Pipeline(role, engine, engine.mesh)
    for uid, prompt in enumerate(prompts_of(tiny)[4:7]):
        role.handle(Submit(Request(uid, prompt, 60, ignore_eos=True), None))
    pipeline.turn()
    fronts = engine.speculation
    before, start, pool = fronts.tokens[:3].clone(), fronts.positions[:3].clone(), engine.pool.clone()
    table = page_rows([sequence.pages for sequence in engine.scheduler.running])
    rank = SimpleNamespace(
        model=model, pool=pool, config=engine.config, ep=1, ops=model.ops, device=CPU, dtype=model.dtype,
        even=lambda tokens: (SimulatedLoad.even(tokens, 1, 4, 32),),
    )  # fmt: skip
    step = DraftingStep(rank, 3, 128, drafts, 0.6)
    step.tokens.copy_(before)
    step.start, step.table = start, torch.from_numpy(table).to(torch.int32)
    step.dispatcher, step.accepted = engine.dispatchers.masked, accepted
    pipeline.turn()
    right = step.run()
    assert torch.equal(step.tokens, fronts.tokens[:3]) and not torch.equal(step.tokens, before)
    assert torch.equal(start + right + 1, fronts.positions[:3])


def test_one_rank_that_drafts_on_a_cpu(tmp_path: Path) -> None:
    """All drafts are taken as right, so a step of 4 sequences gives 12 tokens. Figures say what was forced."""
    out = tmp_path / "r.json"
    flags = "--shape tiny --layers 3 --redundant 4 --device cpu --ep 4 --batch 4 --kv 100 --speculate 2 --accept 1"
    run = run_module("scripts.bench.one_rank.drafts", *flags.split(), "--repeat", "2", "--out", str(out))
    assert run.returncode == 0, run.stderr
    records = json.loads(out.read_text())
    of = "one rank of tiny at EP4, decode 4 x 100, simulated arrivals (skew 1), drafts: "
    values = {record["name"].removeprefix(of): record for record in records}
    label = "2, forced acceptance 1: "
    names = ("the step, computation alone", "tok/s a node, plain")
    assert {f"{drafts}{name}" for drafts in ("0: ", label) for name in names} <= values.keys()
    assert {"0: MLA core of 1 tokens, a MoE layer", f"{label}MLA core of 3 tokens, a MoE layer"} <= values.keys()
    delays = deepep_times.low_latency(SHAPES["tiny"], 4)
    whole, single = (1e3 * sum(delays(what, n).total for what in ("dispatch", "combine")) for n in (12, 4))
    ms = values[f"{label}{names[0]}"]["value"] + 3 * whole + single  # two layers with experts, and the draft layer
    assert values[f"{label}{names[1]}"]["value"] == pytest.approx(8 * 4 * 3 / ms * 1e3, abs=1)
    beside = values[f"{label}{names[1]}, against no drafts"]
    assert beside["reference"] == values[f"0: {names[1]}"]["value"] and beside["kind"] == "modelled"
    assert all(record["kind"] == ("modelled" if "tok/s" in record["name"] else "measured") for record in records)


def test_one_rank_needs_room_for_its_drafts() -> None:
    flags = "--shape tiny --device cpu --ep 4 --redundant 4 --batch 4 --kv 3 --speculate 1"
    run = run_module("scripts.bench.one_rank.drafts", *flags.split())
    assert run.returncode == 2 and "--kv 3: with 1 drafts it must be at least 4" in run.stderr
