"""The draft layer's experts are counted, placed and moved by their own loads, never by those of the model's layers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from disagg.engine import Engine
from disagg.experts import balance_stats, balanced, make_draft_placement
from disagg.front.metrics import Metrics
from disagg.request import Request
from disagg.scheduler import Plan
from disagg.step import Work
from model.config import ModelConfig
from model.weights import ExpertReader
from parallel.eplb import balancedness
from parallel.load_counter import load_draft_recording, load_recording, save_recording
from tests.test_rebalance import EXTRA, first_of_two, generate, make, random_map, settle
from tests.test_speculation import prompts_of, serve
from tests.worlds import run_world, sub_mesh

EXPERTS, LAYERS = 32, 4  # of the shipped model
DRAFTS = 2


def texts(folder: Path, count: int = 3, first: int = 0) -> list[Request]:
    prompts = prompts_of(folder)[first : first + count]
    return [Request(uid, prompt[:60], 14 + 3 * uid, ignore_eos=True) for uid, prompt in enumerate(prompts)]


def watched(engine: Engine) -> list[list[Tensor]]:
    """Where the gates' choices go: the slots of each call, by layer. The draft layer is the last."""
    model, seen = engine.model, []
    assert model.mtp is not None
    for block in [*model.layers, model.mtp.block]:
        if isinstance(getattr(block.mlp, "gate", None), nn.Module):
            calls: list[Tensor] = []
            block.mlp.gate.register_forward_hook(lambda _, __, chosen, calls=calls: calls.append(chosen[0]))
            seen.append(calls)
    return seen


def test_each_layer_counts_what_its_own_gate_chooses(tiny: Path, tmp_path: Path) -> None:
    """A step's rows count whether its drafts are right or wrong: all of them visit experts."""
    path = tmp_path / "seen.safetensors"
    engine = make(tiny, interval=0, speculate=DRAFTS, record_experts=str(path))
    calls, rows = watched(engine), Counter()
    lay_out = engine.lay_out

    def watch(plan: Plan, *rest: Any) -> Work:
        work = lay_out(plan, *rest)
        prompts = sum(count for _, count in plan.prefills)
        rows["model"] += len(plan.decodes) * (1 + DRAFTS) + prompts
        rows["drafts"] += DRAFTS * len(work.sequences)
        return work

    engine.lay_out = watch
    answers, _ = serve(engine, texts(tiny))
    engine.close()
    counts, drafts = load_recording(path, LAYERS, EXPERTS).sum(0), load_draft_recording(path, EXPERTS).sum(0)
    by_hand = torch.stack([torch.cat([c[c >= 0] for c in layer]).bincount(minlength=EXPERTS) for layer in calls])
    assert torch.equal(torch.cat((counts, drafts)), by_hand)
    top_k = engine.config.num_experts_per_tok
    assert counts.sum(1).tolist() == [top_k * rows["model"]] * LAYERS and drafts.sum() == top_k * rows["drafts"]
    computed = sum(len(request.prompt) + len(answers[request.uid].tokens) for request in texts(tiny))
    assert rows["model"] > computed, "no draft was wrong"


def test_any_maps_at_any_time_change_no_token_no_draft_and_no_count(tiny: Path, tmp_path: Path) -> None:
    """A draft layer with another expert's weights would draft other tokens."""
    without, _ = serve(make(tiny, interval=0), texts(tiny))
    unmoved = make(tiny, interval=0, redundant=EXTRA, speculate=DRAFTS, record_experts=str(tmp_path / "seen"))
    still, _ = serve(unmoved, texts(tiny))
    engine = make(tiny, redundant=EXTRA, speculate=DRAFTS)
    rebalancer = engine.rebalancer
    assert rebalancer.map.shape == (LAYERS + 1, EXPERTS + EXTRA)

    def ask(_: object, turn: int) -> None:
        if turn % 4 == 0:
            rebalancer.request(random_map(LAYERS + 1, EXPERTS, EXPERTS + EXTRA, turn))

    moved, _ = serve(engine, texts(tiny), ask)
    settle(engine)
    assert {uid: answer.tokens for uid, answer in moved.items()} == {uid: a.tokens for uid, a in without.items()}
    assert {uid: answer.accepted for uid, answer in moved.items()} == {uid: a.accepted for uid, a in still.items()}
    assert rebalancer.stats["rebalances_total"] > 1 and not rebalancer.stats["rebalance_failures"]
    both = engine.model.placement, engine.model.mtp.placement
    assert torch.equal(torch.cat([one.expert_of_slot for one in both]), rebalancer.map)
    assert torch.equal(rebalancer.identity, rebalancer.map), "another expert's weights"
    for before, counter in zip(unmoved.model.load_counters, engine.model.load_counters, strict=True):
        counts = before.total()
        assert (counts - counter.total()).abs().sum() <= 0.002 * counts.sum()  # a near tie may fall otherwise
    engine.close()


@pytest.mark.parametrize(("threshold", "moved"), [(0.8, [4]), (0.85, [0, 2, 4]), (0.6, [])])
def test_the_draft_layer_moves_by_its_own_balancedness(tiny: Path, threshold: float, moved: list[int]) -> None:
    """That of the model's layers is 0.75 and 0.9 in turns, 0.825 on average, and the draft layer's is 2/3.

    With it the average would be 0.79.
    """
    rebalancer = first_of_two(tiny, ExpertReader, 1, threshold, drafts=True)
    of_model, of_drafts = (counter.by_expert for counter in rebalancer.counters)
    for by_expert, hot, more in ((of_model[::2], 8, 2), (of_model[1::2], 4, 1), (of_drafts, 8, 4)):
        by_expert += 1
        by_expert[:, :hot] += more
    rebalancer.step()
    while not rebalancer.idle or rebalancer.vote():
        rebalancer.advance((rebalancer.vote(),))
    rebalancer.close()
    assert rebalancer.stats["balancedness"] == pytest.approx(0.825)
    assert rebalancer.stats["draft_balancedness"] == pytest.approx(2 / 3)
    assert (rebalancer.map != torch.arange(EXPERTS)).any(1).nonzero()[:, 0].tolist() == moved
    assert torch.equal(rebalancer.identity, rebalancer.map[:, :16])


def test_the_summary_says_the_draft_layers_balance_apart() -> None:
    stats = balance_stats(np.array([0.5, 0.75, 0.9]), 2)
    assert stats == {"balancedness": 0.625, "balancedness_0": 0.5, "balancedness_1": 0.75, "draft_balancedness": 0.9}
    metrics = Metrics()
    metrics.replica_left("unified", stats)
    assert "balancedness 0.625 (layers 0.500 to 0.750, draft layer 0.900)" in metrics.table()


def test_a_recording_has_the_draft_layers_loads_apart(tmp_path: Path) -> None:
    windows, path = [torch.randint(1, 100, (LAYERS + 1, EXPERTS)) for _ in range(3)], tmp_path / "r.safetensors"
    save_recording(path, windows, LAYERS, EXPERTS)
    together = torch.stack(windows)
    assert torch.equal(load_recording(path, LAYERS, EXPERTS), together[:, :LAYERS])
    assert torch.equal(load_draft_recording(path, EXPERTS), together[:, LAYERS:])
    save_recording(path, [window[:LAYERS] for window in windows], LAYERS, EXPERTS)
    assert load_draft_recording(path, EXPERTS) is None
    for window in windows:
        window[LAYERS:] = 0  # --speculate auto found that no draft pays
    save_recording(path, windows, LAYERS, EXPERTS)
    assert load_draft_recording(path, EXPERTS) is None
    save_file({"counts": together, "draft_counts": together.clone()}, path)
    with pytest.raises(ValueError, match=rf"it has draft_counts \[3, 5, 32\], must be \[windows, 1, {EXPERTS}\]"):
        load_draft_recording(path, EXPERTS)
    save_file({"counts": together, "draft_counts": -together[:, :1]}, path)
    with pytest.raises(ValueError, match="draft_counts must be int64, not negative"):
        load_draft_recording(path, EXPERTS)


def body(rank: int, tiny: Path, scratch: Path) -> None:
    """A job that drafts and moves experts; one that is balanced by its recording; one whose recording has no drafts."""
    config = ModelConfig.from_pretrained(tiny)
    mine = texts(tiny, 2 - rank, 4 * rank)
    expected = generate(make(tiny, interval=0), mine)
    path = scratch / "seen.safetensors"
    mesh = sub_mesh(0, 2)
    assert mesh is not None
    engine = make(tiny, mesh, EXTRA, interval=4, speculate=DRAFTS, record_experts=str(path))
    equal = engine.model.mtp.placement.expert_of_slot.clone()
    assert generate(engine, mine) == expected
    settle(engine)
    moved = engine.model.mtp.placement.expert_of_slot
    assert engine.rebalancer.stats["rebalances_total"] and not torch.equal(moved, equal)
    assert torch.equal(engine.rebalancer.identity, engine.rebalancer.map[:, engine.rebalancer.mine])
    assert 0 < engine.stats()["draft_balancedness"] <= 1
    engine.close()
    dist.barrier()

    loads, model_loads = load_draft_recording(path, EXPERTS).sum(0), load_recording(path).sum(0)
    engine = make(tiny, mesh, EXTRA, interval=0, speculate=DRAFTS, expert_map=str(path))
    assert generate(engine, mine) == expected
    for placement, known in ((engine.model.placement, model_loads), (engine.model.mtp.placement, loads)):
        wanted = balanced(known, EXPERTS + EXTRA, config.n_group, mesh).expert_of_slot
        assert torch.equal(placement.expert_of_slot, wanted)
    before, now = (balancedness(loads, of_slot.numpy(), 2) for of_slot in (equal, wanted))
    assert now > before
    engine.close()

    said, without = [], scratch / f"without-{rank}.safetensors"
    save_file({"counts": load_recording(path)}, without)
    placement = make_draft_placement(config.drafting(), mesh, EXTRA, str(without), said.append)
    assert torch.equal(placement.expert_of_slot, equal)
    assert len(said) == 1 and said[0].startswith(f"--expert-map {without}: no loads of the draft layer were recorded")


def test_ranks_that_draft_balance_the_draft_layer(tiny: Path, tmp_path: Path) -> None:
    run_world(2, body, tiny, tmp_path)
