"""Speculation changes no answer: not its tokens, log probabilities, experts or end, on any ranks, in any steps."""

import functools
import itertools
import json
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from disagg import pipeline
from disagg.config import EngineConfig, parse_speculate
from disagg.control.messages import Abort, Submit, Update
from disagg.draft_policy import DraftPolicy
from disagg.engine import Engine
from disagg.front.tokenizer import load_tokenizer
from disagg.interrupt import Interrupt
from disagg.pipeline import Pipeline, Turn
from disagg.request import Request
from disagg.role import NOT_FINITE
from disagg.scheduler import Sequence
from disagg.speculative_sampler import before_each
from disagg.step import Step
from disagg.unified import Unified
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.config import ModelConfig
from model.kv_cache import make_pool
from model.pages import NULL_PAGE, PAGE, pages_for
from model.sampling import SamplingRows, sample
from model.transformer import Transformer
from parallel.deepep_sizes import Sizes, low_latency_misfits
from parallel.mesh import Mesh
from tests import hf
from tests.conftest import ROOT
from tests.deployment import run
from tests.news import singly
from tests.rerun import captured
from tests.test_mtp import DOMAINS
from tests.test_worlds import SETTINGS, one_run
from tests.worlds import run_world, sub_mesh

LIMIT = 150  # --max-model-len


@dataclass
class Answer:
    """All that the router hears of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    experts: bytes = b""
    prompt_rows: bytes = b""
    accepted: int = 0  # tokens beyond one per step
    verified: int = 0  # drafts
    end: tuple[str | None, str | None] | None = None  # finish reason and error

    def hear(self, update: Update) -> None:
        assert self.end is None, "news after the end"
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.experts += update.experts
        self.prompt_rows += update.prompt_rows
        self.accepted += update.accepted
        self.verified += update.verified
        if update.finish or update.error:
            self.end = update.finish, update.error


def make_engine(folder: Path, drafts: int, mesh: Mesh | None = None, ops: Ops | None = None, **changes: Any) -> Engine:
    sizes = {"max_batch": 5, "max_tokens_per_step": 64, "kv_tokens": 2048, "max_model_len": LIMIT}
    settings, config = EngineConfig(**sizes | changes, speculate=drafts), ModelConfig.from_pretrained(folder)
    return Engine.from_pretrained(settings, config, folder, mesh or Mesh(), ops or Ops())


def serve(
    engine: Engine, requests: list[Request], between: Callable[[Unified, int], None] = lambda role, turn: None
) -> tuple[dict[int, Answer], dict[str, float]]:
    """Answer requests. Returns the answers, and the pipeline's statistics. `between(role, turn)`: after each turn."""
    role, turn = Unified(engine), 0
    pipeline = Pipeline(role, engine, engine.mesh)
    for request in requests:
        role.handle(Submit(request, None))
    while pipeline.turn() == Turn.WORKED:
        turn += 1
        between(role, turn)
    answers: defaultdict[int, Answer] = defaultdict(Answer)
    for update in singly(role.updates):
        answers[update.uid].hear(update)
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity, "a page leaked"
    assert engine.pool[:, NULL_PAGE + 1 :].isfinite().all()
    if not engine.mesh.leads:  # the other ranks of a replica count nothing
        return dict(answers), pipeline.stats
    counts, drafts = role.stats(), engine.settings.speculate
    accepted = [counts[f"accepted_drafts_{place}"] for place in range(1, drafts + 1)]
    assert sum(accepted) == sum(answer.accepted for answer in answers.values())
    verified = sum(counts[f"verified_drafts_{place}"] for place in range(1, drafts + 1))
    known = sum(answer.verified for answer in answers.values() if answer.end)  # an aborted request tells no more
    assert known <= verified and (known == verified or not all(answer.end for answer in answers.values()))
    assert all(answer.verified >= answer.accepted for answer in answers.values())
    after_first = sum(max(0, len(answer.tokens) - 1) for answer in answers.values())
    without = after_first - sum(accepted) - counts.get("verifications", 0)  # tokens of steps that verified no drafts
    assert without == 0 or not drafts or (engine.settings.adapts and without > 0), "a step gives one, and the accepted"
    return dict(answers), pipeline.stats


class RandomDrafts(DraftPolicy):
    """Makes any number of drafts, whatever was learned."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.rng, self.chosen = random.Random(most), []

    def choose(self, bucket: int, mixed: bool = False) -> int:
        super().choose(bucket, mixed)
        self.chosen.append(self.rng.randrange(self.most + 1))
        return self.chosen[-1]


def same(got: dict[int, Answer], want: dict[int, Answer]) -> None:
    """Log probabilities within rounding: products of more rows are summed in another order."""
    assert got.keys() == want.keys()
    for uid, ours in got.items():
        theirs = want[uid]
        assert ours.tokens == theirs.tokens, uid
        assert (ours.end, ours.experts) == (theirs.end, theirs.experts), uid
        assert len(ours.prompt_rows) == len(theirs.prompt_rows), uid
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in other], uid
            assert [value for _, value in mine] == pytest.approx([value for _, value in other], abs=1e-3), uid


def prompts_of(folder: Path) -> list[list[int]]:
    """docs/prompts.jsonl: four prompts of each domain."""
    encoder = load_tokenizer(folder)
    lines = [json.loads(line) for line in (ROOT / "docs" / "prompts.jsonl").read_text().splitlines()]
    return [encoder.chat(line["messages"]) if "messages" in line else encoder.text(line["prompt"]) for line in lines]


def all_kinds(folder: Path) -> list[Request]:
    """Greedy and sampled requests with every field that touches a token; prompts of one token to several chunks."""
    rng, known = random.Random(3), prompts_of(folder)
    long = [rng.randrange(4096) for _ in range(100)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 6},
        {"logprobs": 3},
        {"temperature": 0.7, "logprobs": 2, "seed": 7},
        {"presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.9, "frequency_penalty": 0.7, "logprobs": 1, "seed": 8},
        {"logit_bias": {17: 12.0, 290: 12.0}, "min_tokens": 9, "stop_token_ids": [17, 290]},
        {"return_experts": True},
        {"return_experts": True, "temperature": 0.6, "logprobs": 1, "seed": 9},
        {"prompt_logprobs": 1, "return_experts": True},
        {"prompt_logprobs": 2, "max_tokens": 0},
        {"max_tokens": 1},
        {"resumed": 2, "repetition_penalty": 1.2, "min_tokens": 3},
    ]
    made = []
    for i, fields in enumerate(kinds):
        prompt = (known[i % len(known)], long[: 20 + i * 5], [rng.randrange(4096)])[0 if i < 9 else 1 + i % 2]
        prompt = prompt if "resumed" not in fields else known[0]
        made.append(Request(i, prompt, **{"max_tokens": 20, "ignore_eos": True} | fields))
    return made


@functools.cache
def answers_to_all_kinds(folder: Path) -> dict[int, Answer]:
    return serve(make_engine(folder, 0), all_kinds(folder))[0]


def without_drafts(folder: Path, requests: list[Request]) -> dict[int, Answer]:
    """Return what an engine without drafts answers to these of `all_kinds`. It computes them once."""
    return {request.uid: answers_to_all_kinds(folder)[request.uid] for request in requests}


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_every_kind_of_request_gets_the_same_answer(tiny: Path, drafts: int) -> None:
    """In batches of five, where prompts run in chunks beside decodes."""
    requests = all_kinds(tiny)
    want = without_drafts(tiny, requests)
    assert {answer.end for answer in want.values()} == {("length", None), ("stop", None)}
    assert any(answer.experts for answer in want.values()) and any(answer.prompt_rows for answer in want.values())
    same(serve(make_engine(tiny, drafts), requests)[0], want)


@pytest.mark.parametrize(("drafts", "overlap"), [(1, "off"), (3, "on")])
def test_a_step_that_runs_ahead_of_the_host_gives_the_same(
    tiny: Path, drafts: int, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: it is laid out and launched before the host has seen the tokens of the step before it."""
    requests = [r for r in all_kinds(tiny) if not r.processes_logits]
    want, engine = without_drafts(tiny, requests), make_engine(tiny, drafts, overlap=overlap)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    got, stats = serve(engine, requests)
    same(got, want)
    overlapped = {name: stats[f"{name}_overlapped"] for name in ("prefill", "decode")}
    assert all(count == (overlap == "on") * stats[f"{name}_steps"] for name, count in overlapped.items())


def test_any_number_of_drafts_in_each_step_gives_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also none; also when steps run ahead of the host, and pages come from the cache."""
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", RandomDrafts)
    requests = [r for r in all_kinds(tiny) if not r.processes_logits]
    want, engine = without_drafts(tiny, requests), make_engine(tiny, 2, adapts=True)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
    run, works = engine.run, []
    monkeypatch.setattr(engine, "run", lambda work: (works.append(work), run(work))[1])
    for _ in range(2):
        same(serve(engine, requests)[0], want)
    assert {work.drafts for work in works if not work.mixed} == set(itertools.product(range(3), repeat=2))
    assert {work.drafts.made for work in works if work.mixed} == set(range(3)) and engine.scheduler.cache.hits


def test_the_policy_hears_of_each_step_and_of_all_drafts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, roles = [], []

    class Heard(RandomDrafts):
        def count_step(self, bucket: int, verified: int, made: int, seconds: float) -> None:
            heard.append((bucket, verified, made, seconds))

        def count_mixed(self, tokens: int, seconds: float) -> None:
            heard.append((None, tokens, seconds))

        def count_drafts(self, counts: list[int]) -> None:
            heard[len(heard) :] = [counts] if any(counts) else []

    monkeypatch.setattr("disagg.pipeline.DraftPolicy", Heard)
    engine, works = make_engine(tiny, 3, adapts=True), []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda work: (works.append(work), run(work))[1])

    def between(role: Unified, turn: int) -> None:
        roles.append(role)
        assert engine.scheduler.decode_tokens == 1 + works[-1].drafts.made, "prompts get the room that drafts leave"

    _, stats = serve(engine, all_kinds(tiny)[:8], between)
    steps = [item for item in heard if isinstance(item, tuple)]
    assert [step[:-1] for step in steps] == [
        (None, work.most_tokens) if work.mixed else (work.decode_rows, *work.drafts) for work in works
    ]
    assert sum(step[-1] for step in steps) == pytest.approx(stats["prefill_seconds"] + stats["decode_seconds"])
    assert max(work.most_tokens for work in works) > 40 and {work.decode_rows for work in works} > {None, 4, 5}
    counts, told = roles[0].stats(), [item for item in heard if isinstance(item, list)]
    assert told[-1][0] == counts["verified_drafts_1"] and told[-1][3:] == [
        counts[f"accepted_drafts_{i}"] for i in (1, 2, 3)
    ]
    for i in (1, 2):
        assert told[-1][i + 3] <= told[-1][i] <= min(told[-1][i + 2], counts[f"verified_drafts_{i + 1}"])
    assert all(a <= b for before, after in itertools.pairwise(told) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_decides_and_hears_the_drafts_of_each_replica_once(
    tiny: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another rank of the replica, which is simulated, and counts as if all its drafts were right."""
    told, works, policy = [], [], RandomDrafts(2)

    def agree(mesh: Mesh, *mine: int) -> list[list[int]]:
        other = [*mine[:5], 7 if rank == 0 else policy.choose(1), *[len(told) * (rank == 1)] * 4]
        told.append([list(mine), other] if rank == 0 else [other, list(mine)])
        return told[-1]

    monkeypatch.setattr(Mesh, "agree", agree)
    monkeypatch.setattr(Mesh, "leads", rank == 0)
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", lambda most: policy)
    engine = make_engine(tiny, 2, Mesh(rank), adapts=True)
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda work: (works.append((work, told[-1])), run(work))[1])
    role = Unified(engine)
    turns = Pipeline(role, engine, engine.mesh)
    for request in all_kinds(tiny)[:3]:
        role.handle(Submit(request, None))
    while turns.turn() == Turn.WORKED:
        pass
    assert [work.drafts.made for work, _ in works] == [first[5] for _, (first, _) in works]
    assert {work.drafts.made for work, _ in works} == {0, 1, 2}
    counts = role.acceptance.counts()
    assert counts[0] > counts[2] > 0
    assert told[-1][rank][6:] == (counts if rank == 0 else [0] * 4)
    assert policy._counts == (counts if rank == 0 else [0] * 4)


def test_any_limit_and_any_stop_cut_the_same_tokens(tiny: Path) -> None:
    ends_cut_the_same_tokens(tiny, (1, 4))


@contextmanager
def ends_within_steps() -> Iterator[Counter]:
    """Yield a counter, by reason, of the ends behind which the same step gave more tokens."""
    cut, extend = Counter(), Sequence.extend

    def extended(sequence: Sequence, several: list[int]) -> tuple[int, str | None]:
        count, reason = extend(sequence, several)
        cut[reason] += count < len(several)
        return count, reason

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sequence, "extend", extended)
        yield cut


def ends_cut_the_same_tokens(
    tiny: Path, each: tuple[int, ...], ops: Ops | None = None, mesh: Mesh | None = None
) -> None:
    """Ends fall on every place among the accepted tokens. Some requests are as long as the model's limit, a page."""
    prompt, many = prompts_of(tiny)[8], 24
    sizes = {"max_batch": 16, "max_tokens_per_step": 100, "max_model_len": 64, "mesh": mesh, "ops": ops}
    whole = Request(0, prompt, 64 - len(prompt), ignore_eos=True)
    tokens = serve(make_engine(tiny, 0, **sizes), [whole])[0][0].tokens
    limits = [Request(i, prompt, i, ignore_eos=True) for i in range(1, many)]
    stops = [
        Request(many + i, prompt, many, ignore_eos=True, stop_token_ids=[token])
        for i, token in enumerate(tokens[:many])
    ]
    full = [msgspec.structs.replace(whole, uid=100 + i) for i in range(3)]
    for drafts in each:
        with ends_within_steps() as cut:
            answers, _ = serve(make_engine(tiny, drafts, **sizes), limits + stops + full)
        assert cut["length"] and cut["stop"], cut
        for request in limits:
            answer = replace(answers[request.uid], accepted=0, verified=0)
            assert answer == Answer(tokens[: request.max_tokens], end=("length", None))
        for request in stops:
            end = tokens.index(request.stop_token_ids[0]) + 1
            assert replace(answers[request.uid], accepted=0, verified=0) == Answer(tokens[:end], end=("stop", None))
        assert all(answers[request.uid].tokens == tokens for request in full)


def test_each_request_of_a_batch_has_another_number_of_right_drafts(tiny: Path) -> None:
    requests = [Request(i, prompts_of(tiny)[at], 64, ignore_eos=True) for i, at in enumerate((1, 5, 9))]
    want, _ = serve(make_engine(tiny, 0), requests)
    with counted_steps() as steps:
        same(serve(make_engine(tiny, 4), requests)[0], want)
    assert any(len(set(counts)) == 3 for counts in steps), steps


@contextmanager
def counted_steps() -> Iterator[list[list[int]]]:
    """Yield a list to which each decode step of this process adds how many tokens it gave, by request."""
    steps: list[list[int]] = []
    take_up = Unified.take_up

    def counted(role: Unified, step: Step) -> int:
        step.wait()
        if step.counts is not None and not step.work.mixed:
            steps.append(step.counts.numpy()[step.work.rows].tolist())
        return take_up(role, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Unified, "take_up", counted)
        yield steps


@pytest.mark.parametrize("ahead", [False, True])
def test_aborts_and_late_requests_change_nothing_for_the_others(
    tiny: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [r for r in all_kinds(tiny) if not r.processes_logits]
    want, engine = without_drafts(tiny, requests), make_engine(tiny, 2)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: ahead and not work.mixed)
    late = [Request(100 + i, [7 + i] * (1 + 13 * i), 30, ignore_eos=True, return_experts=i == 2) for i in range(6)]

    def between(role: Unified, turn: int) -> None:
        if turn % 2 == 0 and turn // 2 <= len(late):
            role.handle(Submit(late[turn // 2 - 1], None))
        if turn % 5 == 0:
            role.handle(Abort(99 + turn // 5))  # soon after it came

    got, _ = serve(engine, requests, between)
    assert sum(len(got[r.uid].tokens) for r in late if r.uid in got and got[r.uid].end is None) > 5, "none was aborted"
    same({r.uid: got[r.uid] for r in requests}, want)


def sharing_pages() -> list[Request]:
    """Prompts that begin with a page of one text, and differ within the next."""
    rng = random.Random(1)
    shared = [rng.randrange(4096) for _ in range(70)]
    prompts = [shared[: 64 + more] + [rng.randrange(4096) for _ in range(3)] for more in (0, 1, 6, 0)] + [shared[:64]]
    return [Request(i, p, 16, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i, p in enumerate(prompts)]


def test_prompts_that_share_pages_get_the_same_answers(tiny: Path) -> None:
    """A page from the cache has the draft layer's KV, too, so as many drafts are right.

    Its last row may be of another text, where the next token differs: that can make a draft wrong, and no token.
    """
    work = sharing_pages()
    want, _ = serve(make_engine(tiny, 0, prefix_cache="off"), work)
    for drafts in (1, 3):
        engine = make_engine(tiny, drafts)
        first, again = (serve(engine, work)[0] for _ in range(2))
        same(first, want)
        same(again, want)
        assert engine.scheduler.cache.hits >= 2 * len(work) - 3
        accepted = [[answers[request.uid].accepted for request in work] for answers in (first, again)]
        assert accepted[0] == accepted[1] and sum(accepted[0]) > 2


def test_a_page_behind_a_stop_is_published_with_the_tokens_of_its_kv(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop cuts accepted tokens, so those of the step in flight do not follow on it. Here a page ends behind it.

    Without the stop the text goes on in one way only. So what is published must be its first page.
    """
    text, sizes = prompts_of(tiny)[8], {"max_batch": 16, "max_tokens_per_step": 256}
    text += serve(make_engine(tiny, 0), [Request(0, text, PAGE + 6 - len(text), ignore_eos=True)])[0][0].tokens
    engine, published = make_engine(tiny, 3, **sizes), set()
    cache, free = engine.scheduler.cache, engine.scheduler.cache.free
    monkeypatch.setattr(cache, "free", lambda *args: published.update(args[2]) or free(*args))
    ends = [(begin, stop) for stop in range(PAGE - 4, PAGE + 1) for begin in range(stop - 6, stop)]
    fields = {"max_tokens": 20, "ignore_eos": True}
    serve(engine, [Request(i, text[:a], stop_token_ids=[text[b]], **fields) for i, (a, b) in enumerate(ends)])
    assert published == {array("i", text[:PAGE]).tobytes()}


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_whose_logits_are_not_finite_ends_with_an_error(tiny: Path, drafts: int) -> None:
    """A token's embedding is damaged, which a request is made to say: the tokens before it stay."""
    engine, damaged, prompts = make_engine(tiny, drafts), 9, prompts_of(tiny)
    requests = [Request(i, prompts[8 + i], 12, ignore_eos=True, logprobs=i) for i in range(2)]
    want, _ = serve(engine, requests)
    embedding, whole = engine.model.embed_tokens.weight, engine.model.embed_tokens.weight.clone()
    embedding[damaged] = float("nan")
    says = Request(5, prompts[8], 12, ignore_eos=True, logit_bias={damaged: 100.0})
    reads = Request(6, [5, damaged, 7], 12, ignore_eos=True)
    got, _ = serve_dirty(engine, [*requests, says, reads])
    embedding.copy_(whole)
    same({uid: got[uid] for uid in want}, want)
    assert (got[5].tokens, got[5].end) == ([damaged], (None, NOT_FINITE))
    assert (got[6].tokens, got[6].end) == ([], (None, NOT_FINITE))


def serve_dirty(engine: Engine, requests: list[Request]) -> tuple[dict[int, Answer], dict[str, float]]:
    """Serve, then clean the pool of what is not finite: pages of requests that failed."""
    pool = engine.pool

    def clean(role: Unified, turn: int) -> None:
        if not role.scheduler.has_work:
            pool.nan_to_num_(0.0)

    return serve(engine, requests, clean)


@torch.inference_mode()
def drafts_after(model: Transformer, text: list[int], drafts: int, temperature: float, seed: int) -> list[int]:
    """Compute drafts from a text alone: the layer on its true tokens, then again and again on its own output."""
    pages = range(1, pages_for(len(text) + drafts) + 1)
    pool, dispatcher = make_pool(model.config, len(pages) + 1, torch.float32, "cpu"), hf.dispatchers(model)[0]
    batch = Batch.build([], [Chunk(text[:-1], 0, pages)], "cpu")
    state = model.head.norm(model.body(batch, pool, dispatcher))
    batch, made = replace(batch, token_ids=torch.tensor(text[1:])), []
    for i in range(drafts):
        state = model.draft(state, batch, pool, dispatcher)[-1:]
        parameters = SamplingRows.build([(temperature, 1.0, 0, seed, len(text) + i)], "cpu")
        made.append(int(sample(model.head.project(state), parameters)))
        batch = Batch.build([Chunk(made[-1:], len(text) - 1 + i, pages)], [], "cpu")
    return made


@pytest.mark.parametrize(("temperature", "adapts"), [(0.0, False), (0.8, False), (0.0, True)])
def test_drafts_are_those_of_the_text_alone(
    tiny: Path, temperature: float, adapts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step: whatever was drafted before, right or wrong, and however the prompt was cut into chunks.

    And however many were: the layer's KV is there after steps without drafts, too. Steps are replayed, so a draft
    that was chosen from the logits of a later part would be none of these.
    """
    drafts, seed, fronts, roles = 3, 4, {}, []
    monkeypatch.setattr("disagg.pipeline.DraftPolicy", RandomDrafts)
    engine = make_engine(tiny, drafts, max_batch=2, max_tokens_per_step=25, adapts=adapts)
    graphs = captured(engine)
    prompts = [[*prompts_of(tiny)[0], *prompts_of(tiny)[1] * 5], prompts_of(tiny)[9]]
    speculation = engine.speculation
    assert speculation is not None and len(prompts[0]) < 64 < len(prompts[0]) + 25

    def between(role: Unified, turn: int) -> None:
        roles[:] = [role]
        for row, sequence in enumerate(engine._latest.sequences):
            front = speculation.tokens[row, : engine._made + 1]
            fronts[sequence.uid, int(speculation.positions[row])] = front.tolist()

    fields = {"temperature": temperature, "seed": seed, "ignore_eos": True}
    answers, _ = serve(engine, [Request(i, prompt, 25, **fields) for i, prompt in enumerate(prompts)], between)
    assert graphs.reruns["_draft"] > 0
    right, counted = [], Counter()
    for (uid, position), (token, *drafted) in fronts.items():
        text = [*prompts[uid], *answers[uid].tokens][: position + 1]
        if len(text) == position + 1:  # a request's last steps may go further than its answer
            assert token == text[-1]
            assert drafted == drafts_after(engine.model, text, len(drafted), temperature, seed), (uid, position)
            following = [*prompts[uid], *answers[uid].tokens][position + 1 :]
            right += [drafted[:1] == following[:1]] * bool(drafted)
            counted["verifications"] += bool(drafted and following)
            for place in range(1, min(len(drafted) + 1, len(following))):  # none for the request's last token
                counted[f"verified_drafts_{place}"] += 1
                counted[f"accepted_drafts_{place}"] += drafted[:place] == following[:place]
    assert len(right) > 20 and {True, False} == set(right)
    assert {len(front) for front in fronts.values()} == set(range(1, 5) if adapts else [4])
    assert roles[0].stats() == counted and counted["accepted_drafts_2"] > 0


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_shipped_models_drafts_are_worth_it(tiny: Path, temperature: float) -> None:
    """With two drafts, more than 1.6 tokens per request and step in at least one domain."""
    prompts = {4 * at + i: prompts_of(tiny)[4 * at + i] for at in range(len(DOMAINS)) for i in range(3)}
    fields = {"temperature": temperature, "ignore_eos": True}
    requests = [Request(uid, prompt, 40, seed=uid % 4, **fields) for uid, prompt in prompts.items()]
    answers, rates = serve(make_engine(tiny, 2, max_batch=len(requests)), requests)[0], {}
    for at, domain in enumerate(DOMAINS):
        accepted = sum(answers[4 * at + i].accepted for i in range(3))
        rates[domain] = 3 * 39 / (3 * 39 - accepted)  # the first token is the prompt's
    print({domain: f"{rate:.2f} tokens per step" for domain, rate in rates.items()})
    assert max(rates.values()) > 1.6 and min(rates.values()) > 1.35, rates


def on_ranks(rank: int, folder: Path) -> None:
    """Unified jobs of any shape, with fewer requests than replicas in the largest: one idles, and steps all the same.

    With overlap, a half may be empty on some. Where the parts of decode steps are replayed, that holds for ranks with
    sampled requests, with greedy ones and with none.
    """
    config, interrupt = ModelConfig.from_pretrained(folder), Interrupt()

    def answers(
        shape: tuple[int, int], drafts: int, overlap: str = "off", replays: bool = False, adapts: bool = False
    ) -> list[tuple]:
        mesh = sub_mesh(0, *shape)
        settings = replace(SETTINGS, speculate=drafts, overlap=overlap, adapts=adapts)
        settings = replace(settings, redundant_experts=int(shape[0] == 3))  # else three ranks could not share them
        engine = Engine.from_pretrained(settings, config, folder, mesh, Ops()) if mesh is not None else None
        graphs = captured(engine) if replays and engine is not None else None
        found = one_run([("unified", engine, mesh)], folder, interrupt)
        assert graphs is None or graphs.reruns["_verify"] > 0
        return found

    expected = answers((1, 1), 0)
    assert rank or len({tuple(tokens) for tokens, *_ in expected}) == 7
    plain = [((2, 1), 1), ((4, 4), 1), ((8, 2), 2), ((8, 1), 1), ((3, 1), 2)]
    overlapped = [((1, 1), 2), ((2, 2), 1)]
    replayed = ((4, 1), 2, "off")
    for job in (*((*job, "off") for job in plain), *((*job, "on") for job in overlapped), replayed):
        got = answers(*job, replays=job == replayed)
        assert got == expected or rank, f"{job}: {got} instead of {expected}"
    pipeline.DraftPolicy = RandomDrafts  # each rank is a process of its own
    for job in (((1, 1), 4, "off"), ((4, 1), 2, "on"), ((4, 2), 3, "on", True)):
        got = answers(*job, adapts=True)
        assert got == expected or rank, f"{job}, or fewer drafts: {got} instead of {expected}"


def test_every_arrangement_gives_the_same_tokens(tiny: Path) -> None:
    run_world(8, on_ranks, tiny, timeout_s=200)


def test_a_sequence_counts_tokens_as_one_per_step_until_it_has_seen_them() -> None:
    sequence = Sequence(Request(1, [5, 6, 7], 6, ignore_eos=True))
    sequence.computed = 3
    assert sequence.unseen == 1 and sequence.extend([8]) == (1, None)
    sequence.computed += 2  # two steps launched
    assert sequence.unseen == 2
    assert sequence.extend([1, 2, 3]) == (3, None)
    assert (sequence.computed, sequence.unseen, sequence.tokens[3:]) == (7, 1, [8, 1, 2, 3])
    assert sequence.extend([4, 5, 6]) == (2, "length")  # six tokens are all that it wants
    assert (sequence.computed, sequence.unseen, sequence.tokens[3:]) == (8, 0, [8, 1, 2, 3, 4, 5])


def test_the_tokens_before_each_row() -> None:
    rows, places = before_each(2, 3)
    assert rows.tolist() == [1, 2, 2, 4, 5, 5] and places.tolist() == [1, 1, 2, 1, 1, 2]
    assert all(x.dtype == np.int64 and len(x) == 0 for x in before_each(0, 3) + before_each(4, 1))


def test_what_does_not_fit_is_refused_with_the_equation(tiny: Path, small: Path) -> None:
    for drafts in (-1, 5):
        with pytest.raises(ValueError, match=rf"--speculate is {drafts}; it must be in 0\.\.4"):
            EngineConfig(speculate=drafts)
    with pytest.raises(ValueError, match=r"--speculate is auto:0; it must be in auto:1\.\.auto:4"):
        EngineConfig(speculate=0, adapts=True)
    for text in ("", "auto:", "auto2", "auto:x", "two", "2:auto"):
        with pytest.raises(ValueError, match=f"--speculate is '{text}'; it must be N, auto or auto:N, with a number N"):
            parse_speculate(text)
    assert [parse_speculate(text) for text in ("3", "auto:3", "auto")] == [(3, False), (3, True), (4, True)]
    each = [EngineConfig(speculate=2, adapts=a, decodes=d).drafts_per_step for a, d in ((0, 1), (1, 1), (1, 0))]
    assert [list(numbers) for numbers in each] == [[2], [0, 1, 2], [2]], "a prefill job makes all"
    rule = r"--max-batch \(40\) x \(1 \+ --speculate 2\) = 120 is over --max-tokens-per-step \(100\): .* 3 tokens"
    with pytest.raises(ValueError, match=rule):
        make_engine(tiny, 2, max_batch=40, max_tokens_per_step=100)
    with pytest.raises(ValueError, match=r"--speculate drafts .* but there are no tensors model\.layers\.3\.\*"):
        make_engine(small, 1)
    sizes = Sizes(8, 8, 256, 7168, 8, 1536, "bfloat16", drafts=2)
    (misfit,) = low_latency_misfits(sizes)
    assert misfit.endswith("must be at most 1024, not 1536 = 512 x (1 + --speculate 2)")
    assert not low_latency_misfits(replace(sizes, capacity=1023))
    (misfit,) = low_latency_misfits(replace(sizes, num_slots=640, capacity=1023))
    assert misfit.endswith("640 physical experts x 1023 tokens = 341 x (1 + --speculate 2)")


def test_the_command_line(tiny: Path) -> None:
    asked = ("--model", str(tiny), "--prompt", "And God said, Let there be", "--max-tokens", "24")
    plain, drafted = run(*asked), run(*asked, "--speculate", "auto")
    assert plain[0] == drafted[0] == 0 and drafted[1] == plain[1], drafted[2]
    assert "    drafts: 0 to 4 per step\n" in drafted[2] and "drafts" not in plain[2]
    code, _, err = run(*asked, "--speculate", "7")
    assert code == 2 and "--speculate is 7; it must be in 0..4" in err and "Traceback" not in err
