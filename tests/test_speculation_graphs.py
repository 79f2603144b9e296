"""Captured steps with drafts: on a CPU, a part that is replayed runs the code that was captured, in the same tensors.

So all is tested here but CUDA's own capture, which `test_gpu_speculation.py` needs a GPU for.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from disagg.step import Drafts
from model.batch import Batch
from tests.rerun import captured
from tests.test_speculation import Answer, all_kinds, make_engine, same, serve


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[int, Answer]:
    """The answers to all kinds of requests without drafts."""
    return serve(make_engine(tiny, 0), all_kinds(tiny))[0]


def test_replayed_steps_give_the_same_answers(
    tiny: Path, plain: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled requests, and greedy ones beside them, replay the same parts. Only who asks for experts stops it."""
    requests, engine = all_kinds(tiny), make_engine(tiny, 2, overlap="on")
    body, halves = engine.model.body, []

    def run_body(batch: Batch, pool: torch.Tensor, dispatcher: object, both: tuple, *rest: Any) -> torch.Tensor:
        halves.extend([half.num_tokens for half in both] for _ in range(batch.max_q == 0))
        return body(batch, pool, dispatcher, both, *rest)

    monkeypatch.setattr(engine.model, "body", run_body)
    graphs = captured(engine)
    assert len(graphs.captured) == 3 * len(engine.decode.buckets)
    got, stats = serve(engine, requests)
    same(got, plain)
    steps = engine.graph_replays
    assert 0 < steps < stats["decode_steps"]
    assert graphs.reruns == dict.fromkeys(("_verify", "_draft_first", "_draft_next"), steps)
    assert len(halves) > steps and all(first == second > 0 for first, second in halves)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    others = [request for request in requests if not request.processes_logits]
    same(serve(engine, others)[0], {request.uid: plain[request.uid] for request in others})


def test_a_step_may_verify_and_make_any_number_of_drafts(
    tiny: Path, plain: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 0 to N, each step anew. What was not drafted is wrong at worst."""
    requests, drafts, rng = all_kinds(tiny), 3, random.Random(2)
    engine, seen = make_engine(tiny, drafts), Counter()
    graphs = captured(engine)

    def some() -> Drafts:
        seen[chosen := Drafts(rng.randrange(drafts + 1), rng.randrange(drafts + 1))] += 1
        return chosen

    works, run = [], engine.run
    monkeypatch.setattr(engine, "_drafts", some)
    monkeypatch.setattr(engine, "run", lambda work: (works.append(work), run(work))[1])
    same(serve(engine, requests)[0], plain)
    captured_ones = [w for w in works if not w.mixed and not w.eager and w.drafts.verified == drafts]
    assert graphs.reruns["_verify"] == len(captured_ones) > 0
    assert any(few.made < few.verified for few in seen) and any(few.made > few.verified for few in seen)


def test_the_warm_up_runs_the_draft_layer_in_all_that_it_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is not run, none of its kernels is compiled. A prefill job's first drafts have as many rows as
    prompts end in a step."""
    for decodes in (False, True):
        engine = make_engine(tiny, 2, decodes=decodes)
        bodies, drafted, masked = set(), set(), engine.dispatchers.masked
        body, draft = engine.model.body, engine.model.draft

        def run_body(batch: Batch, pool: torch.Tensor, dispatcher: object, *rest: Any) -> torch.Tensor:
            bodies.add((batch.num_tokens, batch.num_decodes, dispatcher is masked))  # noqa: B023
            return body(batch, pool, dispatcher, *rest)  # noqa: B023

        def run_draft(hidden: torch.Tensor, batch: Batch, pool: torch.Tensor, dispatcher: object) -> torch.Tensor:
            drafted.add((batch.num_tokens, batch.num_decodes, dispatcher is masked))  # noqa: B023
            return draft(hidden, batch, pool, dispatcher)  # noqa: B023

        monkeypatch.setattr(engine.model, "body", run_body)
        monkeypatch.setattr(engine.model, "draft", run_draft)
        engine.run_every_size(list)
        assert bodies <= drafted
        assert {(size, 0, False) for size in (1, 2, 4, 8, 16, 32, 63, 64)} <= bodies
        assert {(rows, rows, decodes) for rows in engine.decode.buckets} <= drafted
