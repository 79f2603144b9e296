"""Steps of prompts whose layers are replayed give the tokens of steps that run eagerly, whatever the padding holds.

On a CPU, a replay runs what was captured, in the same tensors. `test_gpu_prompt_graphs.py` captures on a GPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from disagg.buckets import CONTEXT, MOST_TOKENS, make_prompt_sizes
from disagg.captures import Captures
from disagg.config import EngineConfig
from disagg.control.messages import Abort, Submit
from disagg.engine import Engine
from disagg.pipeline import Pipeline, Turn
from disagg.prompt_graphs import SEQUENCES
from disagg.request import Request
from disagg.step import Step, Work
from disagg.unified import Unified
from kernels import ref
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.config import ModelConfig
from model.pages import NULL_PAGE, PAGE, pages_for
from parallel.mesh import Group, Mesh
from tests.rerun import captured
from tests.test_prefix_cache import VOCAB, make_engine, serve, tokens
from tests.test_speculation import all_kinds, same, without_drafts
from tests.test_speculation import make_engine as make_drafting
from tests.test_speculation import serve as serve_all

SIZES = make_prompt_sizes(192, 576)  # (64, 64), (64, 576), (128, 128), ...
NAN = float("nan")
STEP = {"max_tokens_per_step": 192, "max_batch": 20, "kv_tokens": 64 * PAGE}


def one_at_a_time(engine: Engine, prompts: list[list[int]]) -> list[list[list[int]]]:
    return [serve(engine, [prompt]) for prompt in prompts]


def test_prompts_of_any_length_give_the_same_tokens(small: Path) -> None:
    """One token, page and size boundaries, several steps; then once more, with pages from the cache."""
    plain, engine = make_engine(small, **STEP), make_engine(small, **STEP)
    graphs = captured(engine, SIZES)
    base = tokens(6 * PAGE, 1)
    prompts = [base[-n:] for n in (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 384)]
    for replayed in (14, 12):  # the last two take two steps, unless they find pages
        before, steps = engine.graph_replays, graphs.reruns["_layers"]
        assert one_at_a_time(engine, prompts) == one_at_a_time(plain, prompts)
        assert graphs.reruns["_layers"] - steps == replayed
        assert engine.graph_replays > before
    assert plain.graph_replays == 0 and engine.scheduler.cache.hits


def test_ragged_prompts_in_one_step_give_the_same_tokens(small: Path) -> None:
    """With and without tokens before, until a step has too many of them or sees too much."""
    plain, engine = make_engine(small, **STEP), make_engine(small, **STEP)
    graphs = captured(engine, SIZES)
    base = tokens(3 * PAGE, 2)
    for lengths in ((1, 1, 1), (63, 1), (64, 64), (100, 3, 29), (5,) * SEQUENCES, (150, 40, 70, 90)):
        prompts = [tokens(n, 100 * i + n) for i, n in enumerate(lengths)]
        assert serve(engine, prompts) == serve(plain, prompts), lengths
        talks = [base[: PAGE * (1 + i % 3)] + prompt for i, prompt in enumerate(prompts)]
        assert serve(engine, talks) == serve(plain, talks), lengths
    assert engine.scheduler.cache.hits and graphs.reruns["_layers"] >= 10


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_every_kind_of_request_gets_the_same_answer(tiny: Path, drafts: int) -> None:
    requests, engine = all_kinds(tiny), make_drafting(tiny, drafts)
    graphs = captured(engine, make_prompt_sizes(64, 300))
    same(serve_all(engine, requests)[0], without_drafts(tiny, requests))
    assert graphs.reruns["_layers"] > 0


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_step_in_graphs_runs_ahead_of_the_host(tiny: Path, drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: it is launched before the host has seen the tokens of the step before it. Any other waits."""
    requests, engine = [r for r in all_kinds(tiny) if not r.processes_logits], make_drafting(tiny, drafts)
    graphs, run, found = captured(engine, make_prompt_sizes(64, 300)), engine.run, []

    def watched(work: Work) -> Step:
        before = graphs.reruns["_layers"]
        step = run(work)
        found.append((work.mixed, engine.prompt_graphs.serves(work), graphs.reruns["_layers"] - before))
        return step

    monkeypatch.setattr(engine, "run", watched)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed or engine.prompt_graphs.serves(work))
    want = without_drafts(tiny, requests)
    same(serve_all(engine, requests)[0], want)
    for request in requests:
        same(serve_all(engine, [request])[0], {request.uid: want[request.uid]})
    assert all(served == bool(replayed) for _, served, replayed in found)
    assert {(mixed, served) for mixed, served, _ in found} == {(False, False), (True, False), (True, True)}


def test_a_prefill_job_captures_prompts_alone(tiny: Path) -> None:
    engine = make_drafting(tiny, 2, decodes=False)
    graphs = captured(engine, make_prompt_sizes(64, 128))
    assert set(graphs.captured) == {("prompts", (64, 64)), ("prompts", (64, 128))}


def test_an_aborted_prompt_leaves_nothing_to_those_after_it(small: Path) -> None:
    plain, engine = make_engine(small, **STEP), make_engine(small, **STEP)
    captured(engine, SIZES)
    role = Unified(engine)
    pipeline = Pipeline(role, engine, engine.mesh)
    role.handle(Submit(Request(0, tokens(500, 3), 5), None))
    for _ in range(2):
        assert pipeline.turn() == Turn.WORKED
    role.handle(Abort(0))
    while pipeline.turn() == Turn.WORKED:
        pass
    assert engine.graph_replays == 2 and engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    prompts = [tokens(90, 4), tokens(500, 3)]
    assert one_at_a_time(engine, prompts) == one_at_a_time(plain, prompts)


def test_the_loads_of_experts_are_those_without_graphs(small: Path) -> None:
    """Padding visits none of them."""
    totals = []
    for sizes in ((), SIZES):
        engine = make_engine(small, **STEP, prefix_cache="off")
        engine.model.count_loads()
        captured(engine, sizes)
        (counter,) = engine.model.load_counters
        counter.forget()
        serve(engine, [tokens(70, 5)])
        serve(engine, [tokens(3, 6), tokens(80, 7)])
        assert (engine.prompt_graphs.graphs.reruns["_layers"] > 0) == bool(sizes)
        totals.append(counter.total())
    assert torch.equal(*totals) and totals[0].sum() > 0


def chunks(*spans: tuple[int, int], vocab: int = VOCAB) -> list[Chunk]:
    """A chunk for each (first position, tokens), in pages of its own."""
    made, page = [], NULL_PAGE + 1
    for i, (start, count) in enumerate(spans):
        pages = range(page, page := page + pages_for(start + count))
        made.append(Chunk([token % vocab for token in tokens(count, 50 + i)], start, list(pages)))
    return made


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1)],
        [(0, 64)],
        [(0, 65)],
        [(0, 30), (0, 1), (0, 40)],
        [(130, 5), (0, 60), (64, 1)],
        [(400, 100)],
    ],
)
def test_padding_changes_nothing_whatever_it_holds(small: Path, spans: list[tuple[int, int]]) -> None:
    """NaN in the null page, in the rows behind all sequences, and in what attention returns for padding."""
    torch.manual_seed(8)
    engine = make_engine(small, **STEP)
    real = sum(count for _, count in spans)

    def attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = ref.prefill_attention(q, *rest)
        out[real:] = NAN
        return out

    for layer in engine.model.layers:
        layer.self_attn.ops = replace(engine.ops, prefill_attention=attention)
    pool, batch = engine.pool, Batch.build([], chunks(*spans), "cpu")
    pool.copy_(torch.randn(pool.shape))
    before = pool.clone()
    want = engine.model.body(batch, pool, engine.dispatchers.contiguous)
    written = pool.clone()
    captured(engine, SIZES)
    layers = engine.prompt_graphs
    for poisoned in (before[:, NULL_PAGE], layers.hidden):
        poisoned.fill_(NAN)
    layers.columns.fill_(PAGE)
    layers.context_rows.fill_(NULL_PAGE * PAGE)
    pool.copy_(before)
    got = layers.body(batch, engine.dispatchers.contiguous)
    assert layers.graphs.reruns["_layers"] == 1 and layers.size_of(batch).tokens >= real
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[:, NULL_PAGE + 1 :], written[:, NULL_PAGE + 1 :], rtol=1e-5, atol=1e-5)


def test_padding_is_finite_whatever_was_in_memory(small: Path) -> None:
    """Otherwise the null page would hold NaN, which decode steps read: from memory that attention does not write, or
    from pages of an earlier step, whose KV may be damaged."""
    engine = make_engine(small, **STEP)

    def attention(q: torch.Tensor, k: torch.Tensor, rope: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor,
                  *rest: Any) -> torch.Tensor:  # fmt: skip
        out = ref.prefill_attention(q, k, rope, v, q_starts, *rest)
        out[q_starts[-1] :] = NAN
        return out

    for layer in engine.model.layers:
        layer.self_attn.ops = replace(engine.ops, prefill_attention=attention)
    captured(engine, SIZES)
    layers, pool = engine.prompt_graphs, engine.pool
    later = [chunk._replace(pages=[page + 20 for page in chunk.pages]) for chunk in chunks((130, 2), (0, 7))]
    for prompts in (chunks((300, 2), (0, 70)), later):
        layers.hidden.fill_(NAN)
        batch = Batch.build([], prompts, "cpu")
        assert layers.body(batch, engine.dispatchers.contiguous).isfinite().all()
        assert layers.hidden[: layers.size_of(batch).tokens].isfinite().all() and pool[:, NULL_PAGE].isfinite().all()
        pool[:, NULL_PAGE + 1 : 20] = NAN


def test_steps_that_do_not_fit_run_as_they_are(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(small, **STEP)
    graphs = captured(engine, SIZES)
    layers, contiguous, body = engine.prompt_graphs, engine.dispatchers.contiguous, engine.model.body
    seen = []

    def run(batch: Batch, *rest: Any) -> torch.Tensor:
        seen.append(batch)
        return body(batch, *rest)

    monkeypatch.setattr(engine.model, "body", run)
    few, many = chunks((0, 5)), chunks(*[(0, 1)] * (SEQUENCES + 1))
    for decodes, prompts in (
        (few, chunks((0, 9))),  # decodes
        ([], chunks((0, 193))),  # too many tokens
        ([], chunks((500, 3), (500, 3))),  # sees too much
        ([], many),
        ([], many[:-1]),  # and its padding
        ([], []),
    ):
        decodes = [chunk._replace(token_ids=chunk.token_ids[:1]) for chunk in decodes]
        batch = Batch.build(decodes, prompts, "cpu")
        layers.body(batch, contiguous)
        assert seen.pop() is batch and not seen
    whole = Batch.build([], chunks(*[(0, 4)] * SEQUENCES), "cpu")
    layers.body(whole, contiguous)
    assert seen.pop() is not whole and graphs.reruns["_layers"] == 1, "64 tokens need no padding"


def test_requests_for_more_than_tokens_run_as_they_are(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of their steps is said to run in a graph."""
    for overlap, wanted in (("off", {"return_experts": True}), ("off", {"prompt_logprobs": 0}), ("on", {})):
        engine = make_engine(small, **STEP, overlap=overlap)
        graphs, run, mixed = captured(engine, SIZES), engine.run, []

        def watched(work: Work, engine: Engine = engine, run: Any = run, mixed: list[bool] = mixed) -> Step:
            assert not engine.prompt_graphs.serves(work), work
            mixed.append(work.mixed)
            return run(work)

        monkeypatch.setattr(engine, "run", watched)
        serve(engine, [tokens(20, 1)], **wanted)
        assert graphs.reruns["_layers"] == 0 and any(mixed)


def test_sizes_are_few_and_hold_every_step_up_to_the_largest() -> None:
    for most, context in ((1, 1), (1, 20), (64, 80), (100, 5000), (1024, 100_000), (16384, 100_000), (700, 720)):
        sizes = make_prompt_sizes(most, context)
        tokens = sorted({size.tokens for size in sizes})
        assert list(sizes) == sorted(sizes) and len(sizes) <= 2 * len(tokens) <= 16
        assert tokens[-1] == min(most, MOST_TOKENS)
        assert {size.context for size in sizes} == {*tokens, min(CONTEXT, context)}
        assert all(b <= 2 * a for a, b in zip(tokens, tokens[1:], strict=False))
    assert make_prompt_sizes(1024, 100_000)[-2:] == ((1024, 1024), (1024, CONTEXT))


def test_the_smallest_size_that_holds_a_step_is_taken(small: Path) -> None:
    engine = make_engine(small, **STEP)
    captured(engine, SIZES)
    fitting = engine.prompt_graphs.fitting
    for count in range(1, 193):
        for before in (0, 1, 200, 512):
            size = fitting(count, before + count, 1)
            holding = [s for s in SIZES if s.tokens >= count and s.context >= before + s.tokens]
            assert size == (min(holding) if holding else None)


def test_what_is_captured_and_why_not(small: Path) -> None:
    config = ModelConfig.from_pretrained(small)
    settings, ops = EngineConfig(max_model_len=512), Ops(capturable=frozenset({"decodes", "prompts"}))
    gpu, prefill = Mesh(device=torch.device("cuda")), replace(settings, decodes=False)
    sizes = make_prompt_sizes(1024, 1024 + 512)
    assert Captures.of(settings, config, Mesh(), ops) == Captures(False, (), "")
    both = Captures.of(settings, config, gpu, ops)
    assert both == Captures(True, sizes, "decode steps; up to 1,024 tokens of prompts")
    alone = Captures.of(prefill, config, gpu, ops)
    assert alone == Captures(False, sizes, "up to 1,024 tokens of prompts")
    off = Captures.of(replace(settings, graphs="off"), config, gpu, ops)
    assert off == Captures(False, (), "none: --graphs off")
    two = replace(gpu, size=2, ep=Group(2))
    for mesh in (two, replace(two, attn=Group(2), ep=Group())):  # experts on two ranks, or slices of all on both
        found = Captures.of(settings, config, mesh, ops)
        assert found == Captures(True, (), "decode steps; not prompts: only a job of one rank can")
        assert Captures.of(prefill, config, mesh, ops) == Captures(False, (), "not prompts: only a job of one rank can")
    torch_serves = Captures.of(settings, config, gpu, Ops())
    assert not torch_serves.decodes and not torch_serves.prompts
    assert torch_serves.why.count("torch serves ops that wait for the host") == 2
