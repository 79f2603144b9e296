"""Speculation on a GPU: the tokens of a job without, where rounding leaves no choice, and with graphs those without."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disagg.engine import Engine
from disagg.request import Request
from disagg.warm_up import warm_up
from kernels.backend import choose
from model.config import ModelConfig
from model.transformer import op_shape
from parallel.mesh import Mesh
from tests.test_gpu_engine import capture_no_prompts, differences
from tests.test_gpu_engine import serve as serve_joining
from tests.test_speculation import (
    Answer,
    RandomDrafts,
    all_kinds,
    counted_steps,
    ends_cut_the_same_tokens,
    make_engine,
    prompts_of,
    same,
    serve,
    sharing_pages,
)
from tests.worlds import run_world, sub_mesh

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
MESH = Mesh(device=DEVICE)


def engine_of(
    folder: Path,
    drafts: int,
    dtype: torch.dtype,
    graphs: str = "auto",
    mesh: Mesh = MESH,
    overlap: str = "auto",
    adapts: bool = False,
    prompts: bool = False,
    prefix_cache: str = "off",
) -> Engine:
    """`prompts`: capture steps of prompts, too. Their padding may change how they are rounded."""
    ops, _ = choose(op_shape(ModelConfig.from_pretrained(folder)), dtype, DEVICE)
    name, how = str(dtype).removeprefix("torch."), {"graphs": graphs, "overlap": overlap, "adapts": adapts}
    engine = make_engine(folder, drafts, mesh, ops, dtype=name, prefix_cache=prefix_cache, **how)
    if not prompts:
        capture_no_prompts(engine)
    warm_up(engine)
    assert bool(engine.graphs.captured) == (graphs == "auto")
    return engine


@pytest.mark.parametrize(("drafts", "adapts"), [(1, False), (2, False), (4, False), (3, True)])
def test_every_kind_of_request_gets_the_same_answer_in_float32(
    tiny: Path, drafts: int, adapts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps run ahead of the host here, but for those of requests that change their logits. With `adapts` each has any
    number of drafts."""
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", RandomDrafts)
    requests, plain = all_kinds(tiny), engine_of(tiny, 0, torch.float32)
    drafting = engine_of(tiny, drafts, torch.float32, adapts=adapts)
    same(serve(drafting, requests)[0], serve(plain, requests)[0])
    assert drafting.graph_replays > 0
    for engine in (plain, drafting):
        engine.close()


@pytest.mark.parametrize(("drafts", "graphs"), [(1, "auto"), (3, "auto"), (2, "off")])
def test_prompts_that_share_pages_get_the_same_answers_in_float32(tiny: Path, drafts: int, graphs: str) -> None:
    work, plain = sharing_pages(), engine_of(tiny, 0, torch.float32)
    drafting = engine_of(tiny, drafts, torch.float32, graphs, prefix_cache="auto")
    want = serve(plain, work)[0]
    first, again = (serve(drafting, work)[0] for _ in range(2))
    same(first, want)
    same(again, want)
    assert drafting.scheduler.cache.hits >= 2 * len(work) - 3
    assert [first[request.uid].accepted for request in work] == [again[request.uid].accepted for request in work]
    for engine in (plain, drafting):
        engine.close()


@pytest.mark.parametrize("drafts", [1, 4])
def test_ends_among_accepted_tokens_in_float32(tiny: Path, drafts: int) -> None:
    ops, _ = choose(op_shape(ModelConfig.from_pretrained(tiny)), torch.float32, DEVICE)
    ends_cut_the_same_tokens(tiny, (drafts,), ops, MESH)


def test_each_request_of_a_batch_has_another_number_of_right_drafts_in_float32(tiny: Path) -> None:
    requests = [Request(i, prompts_of(tiny)[at], 64, ignore_eos=True) for i, at in enumerate((1, 5, 9))]
    plain, drafting = (engine_of(tiny, n, torch.float32) for n in (0, 4))
    with counted_steps() as steps:
        same(serve(drafting, requests)[0], serve(plain, requests)[0])
    assert any(len(set(counts)) == 3 for counts in steps)
    for engine in (plain, drafting):
        engine.close()


def against_one_rank(rank: int, folder: Path, want: dict[int, Answer]) -> None:
    """Replicas with other requests, the fourth with none."""
    work = all_kinds(folder)
    for ranks, attn_tp, overlap, drafts in ((2, 1, "off", 1), (2, 2, "on", 3), (4, 2, "on", 1), (4, 1, "on", 2)):
        mesh = sub_mesh(0, ranks, attn_tp)
        if mesh is None:
            continue
        mine = work[mesh.replica :: 3] if mesh.replica < 3 else []
        engine = engine_of(folder, drafts, torch.float32, mesh=replace(mesh, device=DEVICE), overlap=overlap)
        got, stats = serve(engine, mine)
        if mesh.leads:  # the other ranks of a replica report no experts
            same(got, {request.uid: want[request.uid] for request in mine})
        assert engine.graph_replays > 0 and (stats["decode_overlapped"] > 0) == (overlap == "on"), stats
        mesh.agree(0)
        engine.close()
    dist.barrier()


def test_several_ranks_that_draft_give_the_answers_of_one_without_in_float32(tiny: Path) -> None:
    plain = engine_of(tiny, 0, torch.float32)
    want = serve(plain, all_kinds(tiny))[0]
    plain.close()
    run_world(4, against_one_rank, tiny, want, timeout_s=280, device="cuda")


@pytest.mark.parametrize(("drafts", "overlap"), [(1, "off"), (3, "off"), (2, "on")])
def test_graphs_change_nothing(tiny: Path, drafts: int, overlap: str) -> None:
    """Sampled requests, and greedy ones beside them, replay the same graphs. Nor does doing it once more."""
    work, answers = all_kinds(tiny), []
    for graphs in ("off", "auto"):
        engine = engine_of(tiny, drafts, torch.bfloat16, graphs, overlap=overlap)
        for _ in range(2):
            answers.append(serve_joining(engine, work))
        assert (engine.graph_replays > 0) == (graphs == "auto")
        engine.close()
    for again in answers[1:]:
        assert not differences(again, answers[0])


def on_ranks(rank: int, folder: Path) -> None:
    """Replicas with other requests, the fourth with none."""
    work = all_kinds(folder)
    for ranks, attn_tp, overlap in ((2, 1, "off"), (2, 2, "on"), (4, 2, "off"), (4, 1, "on")):
        mesh, answers = sub_mesh(0, ranks, attn_tp), []
        if mesh is None:
            continue
        mesh = replace(mesh, device=DEVICE)
        mine = work[mesh.replica :: 3] if mesh.replica < 3 else []
        for graphs in ("off", "auto"):
            engine = engine_of(folder, 2, torch.bfloat16, graphs, mesh, overlap)
            answers.append(serve_joining(engine, mine))
            torch.cuda.synchronize()
            mesh.agree(0)
            engine.close()
        assert not differences(answers[1], answers[0]), f"{ranks=} {attn_tp=} {overlap=} {rank=}"
    dist.barrier()


def test_graphs_change_nothing_on_several_ranks(tiny: Path) -> None:
    """Where one rank has sampled requests and another has none, both replay the same graphs."""
    run_world(4, on_ranks, tiny, timeout_s=280, device="cuda")


@pytest.mark.parametrize("drafts", [1, 3])
def test_in_bf16_tokens_part_only_where_two_are_as_likely(tiny: Path, drafts: int) -> None:
    """One row and N + 1 rows are rounded differently. Where a text parts, that decides between the two tokens.

    So their log probabilities differ by at most twice what rounding changes in tokens before, where no text has parted.
    """
    work = [Request(i, p, 48, ignore_eos=True, logprobs=8) for i, p in enumerate(prompts_of(tiny))]
    plain, drafting = (engine_of(tiny, n, torch.bfloat16) for n in (0, drafts))
    want, (got, stats) = serve(plain, work)[0], serve(drafting, work)
    parts_only_where_two_are_as_likely(want, got)
    print(f"{stats['decode_step_tokens'] / stats['decode_steps']:.2f} tokens a step")
    for engine in (plain, drafting):
        engine.close()


def parts_only_where_two_are_as_likely(want: dict[int, Answer], got: dict[int, Answer]) -> None:
    rounding, gaps = 0.0, []
    for uid, answer in want.items():
        other = got[uid]
        for at, (one, two) in enumerate(zip(answer.tokens, other.tokens, strict=True)):
            mine, theirs = dict(answer.logprobs[at]), dict(other.logprobs[at])
            if one != two:
                assert two in mine, f"request {uid}, token {at}"
                gaps.append(mine[one] - mine[two])
                break
            rounding = max(rounding, *(abs(mine[t] - theirs[t]) for t in mine.keys() & theirs.keys()))
    print(f"{len(gaps)} of {len(want)} texts part, at gaps of {gaps}; rounding {rounding:.3f}")
    assert rounding < 0.5 and all(gap <= 2 * rounding for gap in gaps)
    assert len(gaps) <= len(want) // 2
