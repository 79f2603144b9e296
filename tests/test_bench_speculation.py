"""Benchmarks of drafts: acceptance is forced as asked and said so, and counts of real drafts are the engine's own."""

import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from disagg import speculation
from disagg.control.messages import Submit
from disagg.pipeline import Pipeline
from disagg.request import Request
from disagg.unified import Unified
from model.batch import Batch, page_rows
from model.sampling import accepted
from scripts.bench.lib.forced import ForcedAcceptance, forced_acceptance
from scripts.bench.lib.measurements import load
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.one_rank import deepep_times
from scripts.bench.one_rank.drafts import DraftingStep
from scripts.bench.one_rank.simulated_load import SimulatedLoad
from scripts.bench.speculation import auto
from scripts.bench.speculation import run as bench
from scripts.tools.tiny_text import DOMAINS
from tests.processes import run_module
from tests.test_speculation import make_engine, prompts_of, serve

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
    flags = *work.split(), "--device", "cpu", "--speculate", "2,auto:2", "--accept", "1"
    run = run_module("scripts.bench.engine", *flags, "--out", str(tmp_path / "r.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    records = {record.name: record for record in load(tmp_path / "r.json")}
    label, adapting = ", drafts: 2, forced acceptance 1", ", drafts: auto:2, forced acceptance 1"
    for batch in (1, 3):
        name = f"tiny, decode, batch {batch} after 20"
        drafted, beside = records[f"{name}{label}"], records[f"{name}, against no drafts{label}"]
        assert drafted.value == beside.value > 0 and beside.reference == records[name].value > 0
        each = records[f"tiny, tokens per step and request, batch {batch}{label}"]
        assert each.value == each.reference == 3
        adapted = records[f"{name}, against no drafts{adapting}"]
        assert adapted.value > 0 and adapted.reference == records[name].value
        assert 1 <= records[f"tiny, tokens per step and request, batch {batch}{adapting}"].value <= 3
    plain = [name for name in records if not name.endswith((label, adapting))]
    assert len(plain) == len([name for name in records if name.endswith(label) and "against" not in name]) - 2
    assert all(label in line or adapting in line for line in run.stdout.splitlines() if "drafts" in line)


@pytest.mark.parametrize("drafts", [1, 3])
def test_one_ranks_step_is_the_engines(tiny: Path, monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    """With the engine's dispatcher and real acceptance, from the same fronts and KV, it makes the same fronts.

    The draft layer is filled for as many rows as in the engine's step, and runs on as many.
    """
    engine = make_engine(tiny, drafts)
    role, model = Unified(engine), engine.model
    pipeline = Pipeline(role, engine, engine.mesh)
    for uid, prompt in enumerate(prompts_of(tiny)[4:8]):
        role.handle(Submit(Request(uid, prompt, 60, ignore_eos=True), None))
    pipeline.turn()
    fronts = engine.speculation
    before, start, pool = fronts.tokens[:4].clone(), fronts.positions[:4].clone(), engine.pool.clone()
    table = page_rows([sequence.pages for sequence in engine.scheduler.running])
    rank = SimpleNamespace(
        model=model, pool=pool, config=engine.config, ep=1, ops=model.ops, device=CPU, dtype=model.dtype,
        even=lambda tokens: (SimulatedLoad.even(tokens, 1, 4, 32),),
    )  # fmt: skip
    step = DraftingStep(rank, 4, 128, drafts, 0.6)
    step.tokens.copy_(before)
    step.start, step.table = start, torch.from_numpy(table).to(torch.int32)
    step.dispatcher, step.accepted = engine.dispatchers.masked, accepted
    rows: list[tuple[str, int]] = []

    def seen(name: str, inner: Any, *args: Any) -> Any:
        rows.extend((name, arg.num_tokens) for arg in args if isinstance(arg, Batch))
        return inner(*args)

    for name in ("body", "fill_draft", "draft"):
        monkeypatch.setattr(model, name, partial(seen, name, getattr(model, name)))
    pipeline.turn()
    engines = rows.copy()
    rows.clear()
    right = step.run()
    assert rows == engines == [("body", 4 * (1 + drafts)), ("fill_draft", 4 * (1 + drafts)), *[("draft", 4)] * drafts]
    assert torch.equal(step.tokens, fronts.tokens[:4]) and not torch.equal(step.tokens, before)
    assert torch.equal(start + right + 1, fronts.positions[:4])


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
    ms = values[f"{label}{names[0]}"]["value"] + 2 * whole + 2 * single  # two layers with experts, and two drafts
    rate = 8 * 4 * 3 / ms * 1e3
    rounded = 0.5 + rate * 0.0005 / ms  # the step's time is rounded, too
    assert values[f"{label}{names[1]}"]["value"] == pytest.approx(rate, abs=1.01 * rounded)
    beside = values[f"{label}{names[1]}, against no drafts"]
    assert beside["reference"] == values[f"0: {names[1]}"]["value"] and beside["kind"] == "modelled"
    assert all(record["kind"] == ("modelled" if "tok/s" in record["name"] else "measured") for record in records)


def test_one_rank_needs_room_for_its_drafts() -> None:
    flags = "--shape tiny --device cpu --ep 4 --redundant 4 --batch 4 --kv 3 --speculate 1"
    run = run_module("scripts.bench.one_rank.drafts", *flags.split())
    assert run.returncode == 2 and "--kv 3: with 1 drafts it must be at least 4" in run.stderr


def test_the_shipped_models_figures_are_the_engines_counts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Tokens per step, and the steps whose drafts were right up to a place, from another run of the requests."""
    streams = {domain: np.array(sum(prompts_of(tiny)[i::3], []), np.uint16) for i, domain in enumerate(DOMAINS)}
    monkeypatch.setattr(bench, "held_out", lambda wordnet, stdlib: streams)
    flags = "--device cpu --requests 3 --prompt 6 --output 12 --drafts 2 --timed 1 --repeat 1 --out"
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split(), str(tmp_path / "r.json")])
    bench.main()
    values = {record.name.removeprefix("tiny, held-out "): record for record in load(tmp_path / "r.json")}
    for domain, stream in streams.items():
        prompts = bench.pieces(stream, 3, 6)
        assert len(prompts) == 3 and prompts[0] == stream[:6].tolist()
        answers, _ = serve(make_engine(tiny, 2), [Request(i, p, 12, ignore_eos=True) for i, p in enumerate(prompts)])
        accepted_tokens = sum(answer.accepted for answer in answers.values())
        steps = 3 * (12 - 1) - accepted_tokens
        name = f"{domain}, greedy, drafts: 2"
        assert values[f"{name}: tokens per step"].value == pytest.approx(3 * 11 / steps, abs=1e-3)
        first, second = (values[f"{name}: right up to place {place}"].value for place in (1, 2))
        most, least = (100 * accepted_tokens / of for of in (steps - 3 * 2, steps))  # last steps verify fewer
        assert first >= second and least - 0.1 <= first + second <= most + 0.1
        timed = f"{domain}, greedy, one request at a time, drafts: "
        assert values[f"{timed}2"].reference == values[f"{timed}0"].value > 0
    assert "parted" not in capsys.readouterr().out


def test_auto_is_compared_with_the_best_number_and_with_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--device cpu --batch 2 --drafts 1,2 --most 2 --output 8 --round 6 --learning 1 --repeat 2 --out"
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split(), str(tmp_path / "r.json")])
    rates, rate = defaultdict(list), auto.Served.rate

    def watched(served: auto.Served, tokens: int) -> float:
        settings = served.engine.settings
        rates[settings.speculate, settings.adapts].append(rate(served, tokens))
        return rates[settings.speculate, settings.adapts][-1]

    monkeypatch.setattr(auto.Served, "rate", watched)
    auto.main()
    of = "tiny, 2 requests at once, drafts: "
    values = {record.name.removeprefix(of): record for record in load(tmp_path / "r.json")}
    over_none = "auto:2: its rate over that without drafts"
    assert values.keys() == {"0", "1", "2", "auto:2", over_none}
    best = max("012", key=lambda name: values[name].value)
    assert values["auto:2"].reference == values[best].value and values["auto:2"].source.startswith(f"{best} drafts")
    assert values["1"].reference == values["2"].reference == values["0"].value > 0
    assert values["auto:2"].value > 0 and values["0"].reference is None
    ratios = [mine / none for mine, none in zip(rates[2, True], rates[0, False], strict=True)]
    assert len(ratios) == 3 and values[over_none].value == pytest.approx(sum(ratios[1:]) / 2, abs=5.1e-4)


def test_prompts_may_be_as_long_as_wanted() -> None:
    assert {len(prompt) for prompt in auto.read_prompts(70)} == {70}
    plain, cut = auto.read_prompts(None), auto.read_prompts(3)
    assert len({len(prompt) for prompt in plain}) > 1 and cut == [prompt[:3] for prompt in plain]


def test_another_corpus_than_that_of_the_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def documents(*where: Path) -> dict[str, list[tuple[str, bool]]]:
        return {domain: [("In the beginning", True), ("And", False)] for domain in DOMAINS}

    monkeypatch.setattr(bench, "read_documents", documents)
    with pytest.raises(ValueError, match="bible: 0 tokens are held out, and 47,104 were in training: another corpus"):
        bench.held_out(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="--requests 3 --prompt 6: a domain has only 17 held-out tokens"):
        bench.pieces(np.arange(17), 3, 6)
