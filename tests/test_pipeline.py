"""The step loop's pipeline: when tokens are taken up, and what is counted."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disagg.config import EngineConfig
from disagg.control.messages import Abort, Submit
from disagg.engine import Engine
from disagg.fixed_inputs import FixedInputs
from disagg.graphs import Graphs
from disagg.pipeline import LEAVING, Pipeline, Turn
from disagg.request import Request
from disagg.role import NOT_FINITE
from disagg.steps import DecodeStep, places, resolve
from disagg.unified import Unified
from kernels.ops import Ops
from model.batch import Decodes, page_rows
from model.config import ModelConfig
from parallel.mesh import Mesh
from tests.news import singly

PROMPT = [5, 6, 7]


def make_engine(tiny: Path, overlap: str, **more: Any) -> Engine:
    sizes = {"max_batch": 4, "max_tokens_per_step": 64, "kv_tokens": 1024, "max_model_len": 256}
    settings = EngineConfig(**sizes, overlap=overlap, **more)
    return Engine.from_pretrained(settings, ModelConfig.from_pretrained(tiny), tiny, Mesh(), Ops())


@pytest.fixture
def engine(tiny: Path) -> Engine:
    return make_engine(tiny, "auto")


def submit(role: Unified, uid: int, max_tokens: int, ignore_eos: bool = True) -> None:
    role.handle(Submit(Request(uid, PROMPT, max_tokens, ignore_eos=ignore_eos), None))


def watch(engine: Engine, role: Unified, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    run, take_up = engine.run, role.take_up
    monkeypatch.setattr(engine, "run", lambda work: (log.append("run"), run(work))[1])
    monkeypatch.setattr(role, "take_up", lambda step: (log.append("take up"), take_up(step))[1])
    return log


def test_tokens_do_not_wait_for_a_step_that_holds_the_host(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they wait for it to be reported."""
    role = Unified(engine)
    log = watch(engine, role, monkeypatch)
    pipeline = Pipeline(role, engine, engine.mesh, report=lambda: log.append(f"{len(role.updates)} to report"))
    submit(role, 0, 3)
    while pipeline.turn() == Turn.WORKED:
        pass
    assert log == [word for i in range(1, 4) for word in ("run", "take up", f"{i} to report")]


def test_a_step_that_runs_ahead_is_started_before_the_tokens_are_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = Unified(engine)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    pipeline, log = Pipeline(role, engine, engine.mesh), watch(engine, role, monkeypatch)
    submit(role, 0, 4)
    while pipeline.turn() == Turn.WORKED:
        pass
    assert log == ["run", "run", "take up", "run", "take up", "run", "take up", "take up"]
    assert sum(len(update.tokens) for update in singly(role.updates)) == 4


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_has_ended_counts_no_more(engine: Engine, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first token ends it, which is seen after the next step was planned."""
    monkeypatch.setattr(engine, "runs_ahead", lambda work: ahead and not work.mixed)
    role = Unified(engine)
    submit(role, 0, 1)
    pipeline = Pipeline(role, engine, engine.mesh)
    while pipeline.turn() == Turn.WORKED:
        pass
    (token,) = role.updates[0].tokens
    engine.config = replace(engine.config, eos_token_ids=(token,))
    role.updates.clear()
    pipeline = Pipeline(role, engine, engine.mesh)
    submit(role, 1, 50, ignore_eos=False)
    while pipeline.turn() == Turn.WORKED:
        pass
    assert [(u.tokens, u.finish) for u in role.updates] == [([token], "stop")]
    assert pipeline.stats["decode_step_tokens"] == 0 and pipeline.stats["prefill_step_tokens"] == 1
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_whose_logits_are_not_finite_ends_with_an_error(
    small: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token's embedding is damaged: a prompt with it fails at once, and a request that is made to say it, then.

    The request beside them gets the same tokens as without the damage.
    """
    engine = make_engine(small, "auto")
    monkeypatch.setattr(engine, "runs_ahead", lambda work: ahead and not work.mixed)
    damaged, embedding = 9, engine.model.embed_tokens.weight
    reads = {"prompt": [5, damaged, 7]}, [([], None, NOT_FINITE)]
    says = {"prompt": PROMPT, "logit_bias": {damaged: 100.0}}, [([damaged], None, None), ([], None, NOT_FINITE)]

    def serve(way: dict[str, Any], other: dict[str, Any]) -> dict[int, list[tuple]]:
        role, said = Unified(engine), {}
        pipeline = Pipeline(role, engine, engine.mesh)
        for uid, fields in enumerate(({"prompt": PROMPT} | way, other | way)):
            role.handle(Submit(Request(uid, max_tokens=6, ignore_eos=True, **fields), None))
        while pipeline.turn() == Turn.WORKED:
            pass
        for update in singly(role.updates):
            said.setdefault(update.uid, []).append((update.tokens, update.finish, update.error))
        assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
        return said

    for way in ({}, {"temperature": 0.9, "seed": 3}, {"logprobs": 2, "repetition_penalty": 1.5}):
        for fields, expected in (reads, says):
            whole, before = embedding[damaged].clone(), serve(way, fields)
            embedding[damaged] = float("nan")
            got = serve(way, fields)
            embedding[damaged] = whole
            assert [len(tokens) for tokens in before.values()] == [6, 6]
            assert got == {0: before[0], 1: expected}


def test_a_step_in_flight_when_all_stop_is_still_taken_up(engine: Engine) -> None:
    role = Unified(engine)
    pipeline = Pipeline(role, engine, engine.mesh)
    submit(role, 0, 1)
    assert pipeline.turn() == Turn.WORKED
    assert not role.updates
    assert pipeline.turn(LEAVING) == Turn.OVER
    assert [update.finish for update in role.updates] == ["length"]
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    assert pipeline.stats["prefill_seconds"] > 0


def test_a_graphless_cpu_never_runs_ahead(engine: Engine) -> None:
    work = engine.lay_out(Unified(engine).schedule(), engine.decode.bucket(1), 0)
    assert not engine.runs_ahead(work) and not work.mixed
    assert not engine.run(work).sampled()


def live(engine: Engine, seed: int) -> dict[int, list]:
    """What each request was answered: they come, end and are aborted at random, so that the rows of the others move."""
    rng, role, answers = random.Random(seed), Unified(engine), {}
    pipeline, requests, aborts = Pipeline(role, engine, engine.mesh), [], {}
    for uid in range(12):
        prompt = [rng.randrange(4096) for _ in range(rng.choice((1, 3, 70)))]
        more = rng.choice(({}, {}, {"logprobs": 2}, {"temperature": 0.9}))
        requests.append(Request(uid, prompt, rng.randrange(1, 24), seed=uid, ignore_eos=uid % 2 == 0, **more))
    for turn in range(1_000):
        if requests and rng.random() < 0.4:
            uid = requests[0].uid
            role.handle(Submit(requests.pop(0), None))
            aborts[turn + rng.randrange(24)] = uid if uid % 4 == 3 else -1
        if turn in aborts:
            role.handle(Abort(aborts[turn]))
        busy = pipeline.turn() == Turn.WORKED
        for update in singly(role.updates):
            answers.setdefault(update.uid, []).append((update.tokens, update.logprobs, update.finish))
        role.updates.clear()
        if not busy and not requests:
            break
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    return answers


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_whoever_joins_or_leaves_a_step_computes_what_its_sequences_need(
    small: Path, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each decode step's inputs are those that are made anew from its sequences; and where the tokens are not seen yet
    when it is launched, which these inputs then stand for, the answers are the same."""
    engine = make_engine(small, overlap, prefix_cache="off")  # chunks that begin elsewhere round otherwise
    engine.config = replace(engine.config, eos_token_ids=tuple(range(0, 4096, 16)))
    run, forward, works, checked = engine.run, engine.decode._forward, [], []
    monkeypatch.setattr(engine, "run", lambda work: (works.append(work), run(work))[1])

    def check(rows: int, chosen: None) -> torch.Tensor:
        decode, work = engine.decode, works[-1]
        ids, positions = decode.inputs.columns[:2, :rows]
        expected = torch.zeros(2, rows, dtype=torch.int64)
        pages = [()] * rows
        for row, sequence in zip(work.rows, work.plan.decodes, strict=True):
            expected[:, row] = torch.tensor((sequence.tokens[sequence.computed - 1], sequence.computed - 1))
            pages[row] = sequence.pages
        assert torch.equal(torch.stack((resolve(ids, engine.tokens), positions)), expected)
        table = decode.inputs.page_table
        assert table[:rows].tolist() == page_rows(pages, table.shape[1]).tolist()
        checked.append(len(work.plan.decodes))
        return forward(rows, chosen)

    for seed in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(engine.decode, "_forward", check)
            expected = live(engine, seed)
        monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
        answers = live(engine, seed)
        monkeypatch.setattr(engine, "runs_ahead", lambda work: False)
        assert answers.keys() == expected.keys()
        for uid, answer in answers.items():
            most = min(len(answer), len(expected[uid])) if uid % 4 == 3 else None  # aborted, a token sooner or later
            assert answer[:most] == expected[uid][:most], f"{seed=} {uid=}"
    assert {1, 2, 3, 4} <= set(checked)


def test_a_step_is_staged_the_same_whatever_was_staged_before() -> None:
    """Other ranks may need more rows or fewer for the same sequences, and halves of them move the places."""
    rng = random.Random(0)

    def make() -> DecodeStep:
        forward = lambda batch, halves, *_: torch.zeros(batch.num_tokens, 5)  # noqa: E731
        inputs = FixedInputs(2, 8, 3, torch.device("cpu"))
        tokens = torch.zeros(8, dtype=torch.int64)
        return DecodeStep(forward, tokens, [2, 4, 8], inputs, Graphs(), lambda rows: rows == 4)

    one = make()
    pages = [list(range(3 * i + 1, 3 * i + 1 + rng.randrange(1, 4))) for i in range(6)]
    sequences = rng.sample(pages, 2)
    for _ in range(200):
        if rng.random() < 0.3:
            sequences = rng.sample(pages, rng.randrange(7))
        rows = rng.choice([rows for rows in one.buckets if rows >= len(sequences)])
        ids, positions = (np.array([rng.randrange(-8, 60) for _ in sequences], np.int64) for _ in range(2))
        decodes, fresh = Decodes(ids, positions.clip(0), sequences), make()
        one.run(decodes, rows)
        fresh.run(decodes, rows)
        mine, theirs = one.inputs, fresh.inputs
        assert torch.equal(mine.columns[:, :rows], theirs.columns[:, :rows])
        assert torch.equal(mine.page_table[:rows], theirs.page_table[:rows])
        at = places(len(sequences), rows, rows == 4)
        assert (mine.columns.numpy()[:, at] == (decodes.ids, decodes.positions)).all()
        assert [[page for page in row if page] for row in mine.page_table[at].tolist()] == sequences
