"""Captured steps: on a CPU, a part that is replayed runs the code that was captured, in the same tensors.

Whatever reads the logits of another part than the latest finds NaN there (`rerun.py`).

So all is tested here but CUDA's own capture, which `test_gpu_speculation.py` needs a GPU for.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from disagg.warm_up import run_every_size
from model.batch import Batch
from tests.rerun import captured
from tests.test_speculation import RandomDrafts, all_kinds, make_engine, same, serve, without_drafts


def test_replayed_steps_give_the_same_answers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled requests, and greedy ones beside them, replay the same parts. Only who asks for experts stops it."""
    requests, engine = all_kinds(tiny), make_engine(tiny, 2, overlap="on")
    body, halves = engine.model.body, []

    def run_body(batch: Batch, pool: torch.Tensor, dispatcher: object, both: tuple, *rest: Any) -> torch.Tensor:
        halves.extend([half.num_tokens for half in both] for _ in range(batch.max_q == 0))
        return body(batch, pool, dispatcher, both, *rest)

    monkeypatch.setattr(engine.model, "body", run_body)
    graphs = captured(engine)
    assert len(graphs.captured) == 4 * len(engine.decode.buckets)
    got, stats = serve(engine, requests)
    same(got, without_drafts(tiny, requests))
    steps = engine.graph_replays
    assert 0 < steps < stats["decode_steps"]
    assert graphs.reruns == {"_verify": steps, "_accept": steps, "_draft": 2 * steps}
    assert len(halves) > steps and all(first == second > 0 for first, second in halves)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    others = [request for request in requests if not request.processes_logits]
    same(serve(engine, others)[0], without_drafts(tiny, others))


def test_a_step_may_verify_and_make_any_number_of_drafts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is captured once, whatever the step before it did."""
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", RandomDrafts)
    requests, engine = all_kinds(tiny), make_engine(tiny, 3, adapts=True)
    graphs = captured(engine)
    assert len(graphs.captured) == (4 + 4 + 3) * len(engine.decode.buckets)
    same(serve(engine, requests)[0], without_drafts(tiny, requests))
    assert graphs.reruns["_verify"] == graphs.reruns["_accept"] == engine.graph_replays > 0


def test_replayed_steps_without_drafts_give_the_same_answers(tiny: Path) -> None:
    requests, engine = all_kinds(tiny), make_engine(tiny, 0)
    graphs = captured(engine)
    assert len(graphs.captured) == len(engine.decode.buckets)
    same(serve(engine, requests)[0], without_drafts(tiny, requests))
    assert graphs.reruns == {"_forward": engine.graph_replays} and engine.graph_replays > 0


@pytest.mark.parametrize("drafts", [0, 3])
def test_no_graph_has_logits_of_its_own(tiny: Path, drafts: int) -> None:
    """Whatever part, and of whatever size: they begin where the engine's buffer begins."""
    engine = make_engine(tiny, drafts, adapts=drafts > 0)
    assert engine.logits.shape == (5 * (1 + drafts), engine.config.vocab_size)
    returned = [result for _, result in captured(engine).captured.values() if result is not None]
    tensors = [item for result in returned for item in (result if isinstance(result, tuple) else [result])]
    logits = [x for x in tensors if isinstance(x, torch.Tensor) and x.dtype == torch.float32]
    assert len(logits) == len(engine.decode.buckets) * (4 + 3 if drafts else 1)
    assert {x.data_ptr() for x in logits} == {engine.logits.data_ptr()}


def test_the_warm_up_runs_the_draft_layer_in_all_that_it_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is not run, none of its kernels is compiled. It fills for what the target runs over. Drafts have as
    many rows as sequences get a token, also in a step with prompts."""
    for decodes in (False, True):
        engine = make_engine(tiny, 2, decodes=decodes)
        ran, masked = {"body": set(), "fill_draft": set(), "draft": set()}, engine.dispatchers.masked

        def watch(name: str) -> None:
            inner = getattr(engine.model, name)  # noqa: B023

            def run(*args: Any) -> Any:
                (batch,) = (arg for arg in args if isinstance(arg, Batch))
                ran[name].add((batch.num_tokens, batch.num_decodes, masked in args))  # noqa: B023
                return inner(*args)

            monkeypatch.setattr(engine.model, name, run)  # noqa: B023

        for name in ran:
            watch(name)
        run_every_size(engine)
        assert {shape[:2] for shape in ran["body"]} == {shape[:2] for shape in ran["fill_draft"]}
        assert {(size, 0, False) for size in (1, 2, 4, 8, 16, 32, 63, 64)} <= ran["body"]
        kinds = (False, True) if decodes else (False,)
        assert {(rows, rows, kind) for rows in engine.decode.buckets for kind in kinds} == ran["draft"]
