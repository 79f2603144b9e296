"""The step loop's pipeline: when tokens are taken up, and what is counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from disagg.control import Submit
from disagg.engine import Engine, EngineConfig
from disagg.request import Request
from disagg.unified import Unified
from disagg.worker import Pipeline
from kernels.backend import Ops
from model.config import ModelConfig
from parallel.mesh import Mesh

PROMPT = [5, 6, 7]


@pytest.fixture
def engine(tiny: Path) -> Engine:
    settings = EngineConfig(max_batch=4, max_tokens_per_step=64, kv_tokens=1024, max_model_len=256)
    return Engine.from_pretrained(settings, ModelConfig.from_pretrained(tiny), tiny, Mesh(), Ops())


def submit(role: Unified, uid: int, max_tokens: int, ignore_eos: bool = True) -> None:
    role.handle(Submit(Request(uid, PROMPT, max_tokens, ignore_eos=ignore_eos), None))


def watch(engine: Engine, role: Unified, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    run, after = engine.run, role.after
    monkeypatch.setattr(engine, "run", lambda work: (log.append("run"), run(work))[1])
    monkeypatch.setattr(role, "after", lambda step: (log.append("take up"), after(step))[1])
    return log


def test_tokens_do_not_wait_for_a_step_that_holds_the_host(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    role = Unified(engine)
    pipeline, log = Pipeline(role, engine, engine.mesh), watch(engine, role, monkeypatch)
    submit(role, 0, 3)
    while pipeline.turn():
        pass
    assert log == ["run", "take up", "run", "take up", "run", "take up"]


def test_a_step_that_runs_ahead_is_started_before_the_tokens_are_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = Unified(engine)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    pipeline, log = Pipeline(role, engine, engine.mesh), watch(engine, role, monkeypatch)
    submit(role, 0, 4)
    while pipeline.turn():
        pass
    assert log == ["run", "run", "take up", "run", "take up", "run", "take up", "take up"]
    assert sum(len(update.tokens) for update in role.updates) == 4


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_has_ended_counts_no_more(engine: Engine, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first token ends it, which is seen after the next step was planned."""
    monkeypatch.setattr(engine, "runs_ahead", lambda work: ahead and not work.mixed)
    role = Unified(engine)
    submit(role, 0, 1)
    pipeline = Pipeline(role, engine, engine.mesh)
    while pipeline.turn():
        pass
    (token,) = role.updates[0].tokens
    engine.config = replace(engine.config, eos_token_ids=(token,))
    role.updates.clear()
    pipeline = Pipeline(role, engine, engine.mesh)
    submit(role, 1, 50, ignore_eos=False)
    while pipeline.turn():
        pass
    assert [(u.tokens, u.finish) for u in role.updates] == [([token], "stop")]
    assert pipeline.stats["decode_step_tokens"] == 0 and pipeline.stats["prefill_step_tokens"] == 1
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.capacity


def test_a_step_in_flight_when_all_stop_is_still_taken_up(engine: Engine) -> None:
    role = Unified(engine)
    pipeline = Pipeline(role, engine, engine.mesh)
    submit(role, 0, 1)
    assert pipeline.turn()
    assert not role.updates
    assert pipeline.turn(stop=True) is None
    assert [update.finish for update in role.updates] == ["length"]
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.capacity
    assert pipeline.stats["prefill_seconds"] > 0


def test_a_graphless_cpu_never_runs_ahead(engine: Engine) -> None:
    work = engine.prepare(Unified(engine).plan(), engine.decode.bucket(1), 0)
    assert not engine.runs_ahead(work) and not work.mixed
    assert torch.equal(engine.run(work).tokens, torch.zeros(0, dtype=torch.int64))
