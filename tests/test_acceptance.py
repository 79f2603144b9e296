"""Acceptance: a rate is that of the drafts, whatever ends the requests, and steps without drafts have no part in it.

Drafts are taken as right by a draw here (`scripts/bench/lib/forced.py`), so their rate is known.
"""

from pathlib import Path

import pytest
import torch

from disagg.acceptance import Acceptance
from disagg.control.messages import Submit
from disagg.draft_policy import DraftPolicy
from disagg.engine import Engine
from disagg.pipeline import Pipeline, Turn
from disagg.request import Request
from disagg.unified import Unified
from scripts.bench.lib.forced import forced_acceptance
from tests.news import singly
from tests.test_speculation import RandomDrafts, make_engine, prompts_of

CPU = torch.device("cpu")


def serve(engine: Engine, requests: list[Request], accept: float) -> tuple[Unified, dict[int, list[int]]]:
    """Answer requests with forced acceptance. Returns the role, and the tokens by uid."""
    role, tokens = Unified(engine), {request.uid: [] for request in requests}
    pipeline = Pipeline(role, engine, engine.mesh)
    for request in requests:
        role.handle(Submit(request, None))
    with forced_acceptance(accept, CPU):
        while pipeline.turn() == Turn.WORKED:
            pass
    for update in singly(role.updates):
        assert not update.error
        tokens[update.uid] += update.tokens
    return role, tokens


def shares(role: Unified, drafts: int) -> list[tuple[float, float]]:
    """How many drafts in each place were verified, and how many of them were right."""
    stats = role.stats()
    return [(stats[f"verified_drafts_{i}"], stats[f"accepted_drafts_{i}"]) for i in range(1, drafts + 1)]


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_right_drafts_are_all_right_wherever_a_request_ends(tiny: Path, drafts: int) -> None:
    """By its limit or by a stop token, in every place among a step's tokens."""
    engine, prompt = make_engine(tiny, drafts), prompts_of(tiny)[8]
    text = serve(engine, [Request(0, prompt, 14, ignore_eos=True)], 1.0)[1][0]
    limits = [Request(i, prompt, i, ignore_eos=True) for i in range(1, 14)]
    stops = [Request(100 + i, prompt, 14, ignore_eos=True, stop_token_ids=[token]) for i, token in enumerate(text)]
    for requests in (limits, stops):
        role, tokens = serve(engine, requests, 1.0)
        assert len({len(each) % (drafts + 1) for each in tokens.values()}) == drafts + 1
        assert all(verified == right > 0 for verified, right in shares(role, drafts))


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_wrong_drafts_count_up_to_the_token_before_the_last(tiny: Path, drafts: int) -> None:
    """Each step gives one token, so the last ones could have used fewer drafts: of n tokens, n - 1 - i in place i."""
    role, tokens = serve(make_engine(tiny, drafts), [Request(0, prompts_of(tiny)[8], 14, ignore_eos=True)], 0.0)
    assert len(tokens[0]) == 14 and role.stats()["verifications"] == 13
    assert shares(role, drafts) == [(13 - i, 0) for i in range(1, drafts + 1)]


@pytest.mark.parametrize("output", [3, 6, 40])
def test_the_policy_learns_the_same_from_short_requests(tiny: Path, output: int) -> None:
    """Three of five drafts after right ones are right. Of requests of three tokens none has a second draft."""
    drafts, count = 4, 1600 // output
    engine = make_engine(tiny, drafts, max_batch=64, max_tokens_per_step=320)
    role, _ = serve(engine, [Request(i, [i % 100], output, ignore_eos=True) for i in range(count)], 0.6)
    judged, right = role.acceptance.counts()[:drafts], role.acceptance.counts()[drafts:]
    assert judged[0] == role.stats()["verified_drafts_1"]
    known = [(of, n) for of, n in zip(judged, right, strict=True) if of > 80]
    assert len(known) == min(drafts, output - 2) or output > 3
    for of, n in known:
        assert abs(n / of - 0.6) < 4 * (0.6 * 0.4 / of) ** 0.5
    policy = DraftPolicy(drafts)
    policy.count_drafts(role.acceptance.counts())
    assert policy._chances.tokens()[1] == pytest.approx(1.6, abs=0.05)


def test_steps_without_drafts_are_no_verifications(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So under `--speculate auto` the tokens per verification are those of steps that verified some."""
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", RandomDrafts)
    engine, works = make_engine(tiny, 2, max_batch=1, adapts=True), []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda work: (works.append(work), run(work))[1])
    role, tokens = serve(engine, [Request(0, prompts_of(tiny)[9], 60, ignore_eos=True)], 1.0)
    verified = [work.drafts.verified for work in works if work.decodes.pages]
    given, took = 1, 0  # the first token comes with the prompt
    for each in verified:
        if given < 60:
            took, given = took + (each > 0), given + 1 + each
    assert 0 in verified and role.stats()["verifications"] == took < len(verified)


def test_counts_by_hand() -> None:
    acceptance = Acceptance(3)
    acceptance.add(3, 1, 9)  # right, wrong, and one that follows on the wrong one
    acceptance.add(3, 2, 2)  # right, right, and one that could give nothing
    acceptance.add(3, 0, 0)
    acceptance.add(0, 0, 5)
    assert acceptance.stats() == {
        "verifications": 3,
        "verified_drafts_1": 2, "verified_drafts_2": 2, "verified_drafts_3": 1,
        "accepted_drafts_1": 2, "accepted_drafts_2": 1, "accepted_drafts_3": 0,
    }  # fmt: skip
    assert acceptance.counts() == [2, 2, 0, 2, 1, 0]
