"""On a CPU, steps without drafts put off filling the draft layer's KV. Drafts and pages are as if they had not."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from disagg import late_fill
from disagg.control.messages import Abort, Submit
from disagg.draft_policy import DraftPolicy
from disagg.engine import Engine
from disagg.pipeline import Pipeline, Turn
from disagg.request import Request
from disagg.scheduler import Sequence
from disagg.unified import Unified
from model.pages import PAGE
from tests.test_speculation import drafts_after, make_engine, prompts_of, same, serve

DRAFTS = 2


class Now(DraftPolicy):
    """Makes as many drafts as it is told."""

    script: ClassVar[Iterator[int]]

    def choose(self, bucket: int, mixed: bool = False) -> int:
        return next(self.script)


@pytest.fixture
def engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", Now)
    return make_engine(tiny, DRAFTS, max_batch=3, adapts=True)


def rarely(*runs: int) -> Iterator[int]:
    """After each run of so many steps without drafts, one step makes some. After the last run, none does."""
    for run in runs:
        yield from (0,) * run
        yield DRAFTS
    yield from itertools.repeat(0)


def request(tiny: Path, uid: int, output: int) -> Request:
    return Request(uid, prompts_of(tiny)[2 * uid], output, ignore_eos=True)


@pytest.mark.parametrize("ahead", [False, True])
def test_drafts_after_steps_without_any_are_those_of_the_text(
    engine: Engine, tiny: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many such steps came before. Meanwhile requests come, end and are aborted."""
    assert late_fill.MOST < PAGE and engine.speculation is not None
    Now.script = rarely(3, 1, 0, 68, 3, 2, 4, 1)
    if ahead:
        monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    requests = [request(tiny, uid, output) for uid, output in enumerate((70, 100, 100, 10))]
    late, speculation, fronts, waited = request(tiny, 4, 30), engine.speculation, {}, []
    fill = late_fill.LateFill.fill

    def watched(self: late_fill.LateFill) -> None:
        waited.append(len(self._left))
        fill(self)

    monkeypatch.setattr(late_fill.LateFill, "fill", watched)

    def between(role: Unified, turn: int) -> None:
        if turn == 12:
            role.handle(Abort(1))
        if turn == 74:
            role.handle(Submit(late, None))
        if engine._made:
            for row, sequence in enumerate(engine._latest.sequences):
                front = speculation.tokens[row, : engine._made + 1].tolist()
                fronts[sequence.uid, int(speculation.positions[row])] = front

    answers, _ = serve(engine, requests, between)
    want, _ = serve(make_engine(tiny, 0), [*requests, late])
    assert len(answers[1].tokens) < 100, "it was aborted"
    del answers[1], want[1]
    same(answers, want)
    checked = 0
    for (uid, position), (token, *drafted) in fronts.items():
        text = [*prompts_of(tiny)[2 * uid], *answers[uid].tokens][: position + 1] if uid != 1 else []
        if len(text) == position + 1:
            assert token == text[-1]
            assert drafted == drafts_after(engine.model, text, DRAFTS, 0.0, 0), (uid, position)
            checked += 1
    assert checked > 12 and max(waited) == late_fill.MOST and sum(0 < n < late_fill.MOST for n in waited) > 0


def test_nothing_is_written_to_pages_that_were_let_go(engine: Engine, tiny: Path) -> None:
    """Another sequence may own them by then, with KV that came from a prefill job."""
    Now.script = rarely()
    role = Unified(engine)
    pipeline = Pipeline(role, engine, engine.mesh)

    def answer(uid: int) -> list[int]:
        role.handle(Submit(request(tiny, uid, 20), None))
        pages = []
        while pipeline.turn() == Turn.WORKED:
            pages += [page for sequence in role.sequences.values() for page in sequence.pages]
        return pages

    owned, other = answer(0), Sequence(request(tiny, 1, 20))
    assert engine.scheduler.reserve(other, other.limit) and set(other.pages) == set(owned)
    engine.pool[:, other.pages] = 7.0
    assert set(answer(2)).isdisjoint(owned)
    assert (engine.pool[:, other.pages] == 7.0).all()


def test_the_pages_of_a_sequence_that_ended_have_the_layers_kv(engine: Engine, tiny: Path) -> None:
    """Others find them in the prefix cache. So it is there as soon as the sequence lets go of them."""
    Now.script, pages, filled = rarely(), {}, []

    def between(role: Unified, turn: int) -> None:
        pages.update({sequence.uid: list(sequence.pages) for sequence in role.sequences.values() if sequence.pages})
        if 0 in pages and 0 not in role.sequences and not filled:
            filled.append(engine.pool[-1, pages[0]].flatten(0, 1)[: len(prompts_of(tiny)[0]) + 49].clone())

    serve(engine, [request(tiny, 0, 50), request(tiny, 1, 60)], between)
    assert filled and filled[0].abs().sum(-1).min() > 0


def test_requests_that_want_more_than_tokens_get_it(engine: Engine, tiny: Path) -> None:
    """Without drafts, as in a step of which they are the only requests."""
    Now.script = rarely()
    for wants in ({"return_experts": True}, {"logprobs": 2}):
        requests = [msgspec.structs.replace(request(tiny, uid, 20), **wants) for uid in (0, 1)]
        answers, _ = serve(engine, requests)
        same(answers, serve(make_engine(tiny, 0), requests)[0])
        assert all(answer.experts or answer.logprobs for answer in answers.values())
