"""Tokens with the prefix cache are the tokens without it, and what is shared is neither computed nor sent again.

In one process: any hits, chunks, page ends and aborts. In worlds of prefill and decode jobs: hits on either side.
"""

import json
import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from disagg import connection
from disagg.config import EngineConfig
from disagg.control.messages import Abort, Submit
from disagg.control.ports import RouterPort
from disagg.engine import Engine
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.handoff.endpoints import BY_DEFAULT, TRANSPORTS, Handoff
from disagg.handoff.protocol import Sending
from disagg.handoff.receive_link import ReceiveLink
from disagg.incoming import Incoming
from disagg.interrupt import Interrupt
from disagg.loop import serve as serve_job
from disagg.page_digest import page_digests
from disagg.pipeline import Pipeline, Turn
from disagg.request import Request
from disagg.unified import Unified
from kernels.ops import Ops
from model.config import ModelConfig
from model.pages import PAGE
from parallel.mesh import Mesh
from tests.deployment import read, run, timeless
from tests.exposition import Keeper
from tests.news import singly
from tests.test_handoff import obstacle
from tests.test_worlds import answers_to
from tests.worlds import run_world, sub_mesh

SIZES = {"max_batch": 4, "max_tokens_per_step": 96, "kv_tokens": 24 * PAGE, "max_model_len": 512}
OUTPUT = 6  # tokens
VOCAB = 4096


def make_engine(folder: Path, mesh: Mesh | None = None, **more: Any) -> Engine:
    settings = EngineConfig(**SIZES | more)
    return Engine.from_pretrained(settings, ModelConfig.from_pretrained(folder), folder, mesh or Mesh(), Ops())


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def serve(engine: Engine, prompts: Iterable[list[int]], max_tokens: int = OUTPUT, **fields: Any) -> list[list[int]]:
    """The tokens of requests that arrive together. All pages come back."""
    role = Unified(engine)
    pipeline, answers = Pipeline(role, engine, engine.mesh), {}
    for uid, prompt in enumerate(prompts):
        sampled = {"temperature": 0.8} if uid % 2 else {}
        role.handle(Submit(Request(uid, prompt, max_tokens, seed=uid, ignore_eos=True, **sampled, **fields), None))
        answers[uid] = []
    while pipeline.turn() == Turn.WORKED:
        for update in singly(role.updates):
            assert update.error is None
            answers[update.uid] += update.tokens
        role.updates.clear()
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    return list(answers.values())


# ---- one process


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("step_tokens", [48, 64, 1024])
def test_any_hits_give_the_tokens_of_the_whole_prompt(small: Path, overlap: str, step_tokens: int) -> None:
    """None, some, all but the last page, all of it; prompts that end a token before and behind a page."""
    more = {"max_tokens_per_step": step_tokens, "overlap": overlap}
    plain, cached = (make_engine(small, prefix_cache=how, **more) for how in ("off", "auto"))
    base, cache = tokens(4 * PAGE, 1), cached.scheduler.cache
    first = [base[: 3 * PAGE + 1]]
    assert serve(cached, first) == serve(plain, first) and cache.hits == 0
    for length, own, hits in (
        (0, 2 * PAGE, 0),
        (PAGE - 1, 5, 0),
        (PAGE, 0, 0),
        (PAGE, 1, 1),
        (2 * PAGE + 7, 3, 2),
        (3 * PAGE, 0, 2),
        (3 * PAGE, 1, 3),
        (3 * PAGE + 1, 0, 3),
        (4 * PAGE, 2, 3),
    ):
        before, prompts = cache.hits, [base[:length] + tokens(own, length + own)]
        assert serve(cached, prompts) == serve(plain, prompts), (length, own)
        assert cache.hits - before == hits, (length, own)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_prompts_that_arrive_together_compute_what_they_share_once(small: Path, overlap: str) -> None:
    """Some of them in the step that computes it: with overlap, in the other half."""
    plain, cached = (make_engine(small, prefix_cache=how, overlap=overlap) for how in ("off", "auto"))
    base = tokens(2 * PAGE, 2)
    prompts = [base[:PAGE] + tokens(9, 3), base, base + tokens(3, 4), tokens(30, 5), base[:PAGE] + tokens(70, 6)]
    for engine in (plain, cached):
        engine.scheduler.max_tokens_per_step = 512
    expected, steps = serve(plain, prompts), []
    launch = cached.launch
    cached.launch = lambda plan, *rest, **more: (steps.append(plan.num_prefill_tokens), launch(plan, *rest, **more))[1]
    assert serve(cached, prompts) == expected
    assert steps[0] == (PAGE + 9) + PAGE + 3 + 30, "four of them run at once, and the third has two pages of the second"
    assert sum(steps) == steps[0] + 70


@pytest.mark.parametrize("begin, found", [(10, (0, 1, 2)), (9, (0, 0, 1))])
def test_the_next_turn_of_a_talk_finds_the_answer(small: Path, begin: int, found: tuple[int, ...]) -> None:
    """After the first turn there are 65 or 64 tokens, then twice as many. The latest one has no KV yet."""
    plain, cached = (make_engine(small, prefix_cache=how) for how in ("off", "auto"))
    cache, prompt = cached.scheduler.cache, tokens(begin, 7)
    for turn, hits in enumerate(found):
        before = cache.hits
        (answer,) = serve(cached, [prompt], 55 + 5 * turn)
        assert [answer] == serve(plain, [prompt], 55 + 5 * turn) and cache.hits - before == hits
        prompt = prompt + answer + tokens(4, turn)


def test_a_pool_that_is_too_small_for_all_gives_up_the_oldest(small: Path) -> None:
    plain, cached = (make_engine(small, prefix_cache=how, kv_tokens=7 * PAGE) for how in ("off", "auto"))
    rng = random.Random(3)
    bases = [tokens(3 * PAGE, 10 + i) for i in range(3)]
    for _ in range(6):
        prompts = [rng.choice(bases)[: rng.randrange(1, 3 * PAGE)] + tokens(rng.randrange(1, 80), 5) for _ in range(5)]
        assert serve(cached, prompts) == serve(plain, prompts)
    cache = cached.scheduler.cache
    assert cache.hits > 10 and cache.evictions > 10


def test_salts_keep_requests_apart_and_rows_are_computed(small: Path) -> None:
    plain, cached = (make_engine(small, prefix_cache=how) for how in ("off", "auto"))
    cache, prompts = cached.scheduler.cache, [tokens(2 * PAGE + 1, 8)]
    expected = serve(plain, prompts)
    for hits, fields in (
        (0, {"cache_salt": "a"}),
        (0, {"cache_salt": "b"}),
        (2, {"cache_salt": "a"}),
        (0, {}),
        (0, {"return_experts": True}),
        (0, {"prompt_logprobs": 0}),
        (2, {}),
    ):
        before = cache.hits
        assert serve(cached, prompts, **fields) == expected and cache.hits - before == hits, fields


@pytest.mark.parametrize("ahead", [False, True])
def test_an_abort_at_any_time_leaves_nothing_wrong_behind(
    small: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two requests that share a prefix is aborted after so many turns; the second one comes then."""
    plain, cached = (make_engine(small, prefix_cache=how) for how in ("off", "auto"))
    monkeypatch.setattr(cached, "runs_ahead", lambda work: ahead and not work.mixed)
    found = 0
    for after in range(9):
        prompt = tokens(2 * PAGE + 50, 20 + after)
        (expected,) = serve(plain, [prompt])
        role, got = Unified(cached), []
        pipeline = Pipeline(role, cached, cached.mesh)
        role.handle(Submit(Request(0, prompt, OUTPUT, ignore_eos=True), None))
        for _ in range(after):
            pipeline.turn()
        role.handle(Abort(0))
        role.handle(Submit(Request(1, prompt, OUTPUT, ignore_eos=True), None))
        while pipeline.turn() == Turn.WORKED:
            got += [token for update in singly(role.updates) if update.uid == 1 for token in update.tokens]
            found += sum(update.cached_tokens for update in singly(role.updates))
            role.updates.clear()
        assert got == expected, after
        assert cached.scheduler.cache.num_free == cached.scheduler.cache.capacity
    assert found == (0 + 1 + 7 * 2) * PAGE, "the first step computes one whole page"


@pytest.mark.parametrize("length", [PAGE - 1, PAGE + 9])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_may_be_damaged_is_not_kept(
    small: Path, length: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged token is part of a prompt. It is repaired, and the same prompt has its tokens again.

    A step that runs ahead feeds the model what stands for no token. After 63 tokens of prompt, that fills a page.
    """
    engine, prompt = make_engine(small), tokens(length, 9)
    monkeypatch.setattr(engine, "runs_ahead", lambda work: ahead and not work.mixed)
    expected, embedding = serve(engine, [prompt], cache_salt="a"), engine.model.embed_tokens.weight
    whole = embedding[prompt[3]].clone()
    embedding[prompt[3]] = float("nan")
    role = Unified(engine)
    pipeline = Pipeline(role, engine, engine.mesh)
    role.handle(Submit(Request(0, prompt, OUTPUT), None))
    while pipeline.turn() == Turn.WORKED:
        pass
    assert [update.error is None for update in singly(role.updates)] == [False]
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    embedding[prompt[3]] = whole
    assert serve(engine, [prompt]) == expected


def test_run_py_says_what_it_found(tiny: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt_token_ids": [7] * (2 * PAGE + 2), "max_tokens": 2, "seed": 1} for _ in range(2)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {}
    for how, cached, said in (
        ("auto", 2 * PAGE, f"prefix cache  unified: {2 * PAGE} prompt tokens (49.2% of all); 0 pages evicted, 2 kept"),
        ("off", 0, None),
    ):
        more = ["--prefix-cache", how, "--existing", "overwrite"]
        code, _, err = run("--model", str(tiny), "--input", str(source), "--output", str(out), *more)
        assert code == 0 and (said is None or said in err) and ("prefix cache" in err) == (how == "auto"), err
        answers[how] = read(out)
        assert [answer["cached_tokens"] for answer in answers[how]] == [0, cached]
    assert timeless(answers["auto"]) == timeless(answers["off"])


# ---- two jobs


class Never(Interrupt):
    """Leaves the signals of this process alone."""

    def __init__(self) -> None:
        self.seen = self.draining = False


def take_turn(router: Router, prompts: list[list[int]]) -> list[tuple[list[int], int, str]]:
    """Answer prompts that come together: the tokens, how many were cached, and on which replica."""
    users = [UserRequest(0, Request(0, prompt, OUTPUT, ignore_eos=True), []) for prompt in prompts]
    tracked, deadline = [router.submit(user, Keeper()) for user in users], time.monotonic() + 30
    while router.tracked:
        router.turn(None, 10)
        assert time.monotonic() < deadline
    return [(list(one.stream.token_ids), one.cached_tokens, one.path[1]) for one in tracked]


def test_a_router_that_is_started_anew_learns_which_replica_has_which_talk(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is gone without a word. The talks that the replicas had are with them again, though both idle."""
    monkeypatch.setattr(connection, "KEPT_S", 0.02)
    jobs, port = [make_engine(small, kv_tokens=7 * PAGE) for _ in range(2)], RouterPort("127.0.0.1", 0)
    number, problems = port.port, []

    def work(engine: Engine) -> None:
        problems.append(serve_job("unified", engine, engine.mesh, ("127.0.0.1", number), Never()))

    threads = [threading.Thread(target=work, args=[engine], daemon=True) for engine in jobs]
    for thread in threads:
        thread.start()

    def begin() -> Router:
        """Returns when both replicas have reported as many pages as they have."""
        router, deadline = Router(port, None, VOCAB, lambda: False), time.monotonic() + 60
        while sorted(len(one.kept._reported) for one in router.fleet.replicas.values()) != sorted(
            len(engine.scheduler.cache._places) for engine in jobs
        ):
            router.turn(None, 10)
            assert time.monotonic() < deadline
        return router

    talks = [tokens(2 * PAGE + 10, i) for i in range(2)]
    router = begin()
    first = take_turn(router, talks)
    port.close()
    port = RouterPort("127.0.0.1", number)
    router = begin()
    assert len({id for *_, id in first}) == 2, "each has one talk"
    for order in ([0, 1], [1, 0]):
        again = [take_turn(router, [talks[i] + first[i][0] + [7]])[0] for i in order]
        assert [(cached, id) for _, cached, id in again] == [(2 * PAGE, first[i][2]) for i in order]
    gone = take_turn(router, [tokens(6 * PAGE, 9)])[0][2]  # it needs all pages of its replica
    index = next(i for i in range(2) if first[i][2] == gone)
    while router.fleet.replicas[gone].kept.count(page_digests(talks[index], "", 9)):
        take_turn(router, [[1]])
    assert take_turn(router, [talks[index]])[0][1] == 0, "evicted"
    router.close()
    for thread in threads:
        thread.join(30)
    assert problems == [None, None]
    port.close()


# ---- prefill and decode


def talk(answers: list[list[int]], prompts: list[list[int]]) -> list[list[int]]:
    """The prompts of the next turn."""
    return [prompt + answer + tokens(5, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def body(rank: int, folder: Path, libraries: list[str]) -> None:
    """Rounds: prompts with a common beginning, the same ones again, the next turn of each talk, and a crowd at once."""
    interrupt, moved = Interrupt(), [0]  # pages that this rank has received
    is_over, stood = Incoming.is_over.fget, set()  # rooms that had all of their own, and stood still for another one

    def look(one: Incoming) -> bool:
        if one.room.may_release and not is_over(one):
            stood.add(one.uid)
        return is_over(one)

    Incoming.is_over = property(look)

    arrived = ReceiveLink._arrived

    def count(link: ReceiveLink, x: Tensor, pages: Tensor, sending: Sending) -> None:
        moved[0] += pages.numel()
        arrived(link, x, pages, sending)

    ReceiveLink._arrived = count

    def engine(mesh: Mesh | None, **more: Any) -> Engine | None:
        return None if mesh is None else make_engine(folder, mesh, **more)

    def answer(jobs: list, prompts: list[list[int]], handoff: Handoff) -> list:
        users = [
            UserRequest(i, Request(0, prompt, OUTPUT, seed=i, temperature=0.8 * (i % 2), ignore_eos=True), [])
            for i, prompt in enumerate(prompts)
        ]
        found = answers_to(users, jobs, folder, interrupt, handoff=handoff)
        return [found[i] for i in sorted(found)]

    def total(number: int) -> int:
        """The sum over all ranks, and replicas of attention TP."""
        counts: list = [None] * dist.get_world_size()
        dist.all_gather_object(counts, number)
        return sum(counts)

    base = tokens(2 * PAGE, 1)
    first = [base + tokens(20, 2), base + tokens(PAGE + 1, 3), base[:PAGE] + tokens(PAGE - 10, 4), tokens(PAGE, 5)]
    rounds, alone = [first, first], sub_mesh(0, 1)
    plain = engine(alone, prefix_cache="off")
    texts = [serve(plain, first)] if plain is not None else [[]]
    dist.broadcast_object_list(texts)
    rounds.append(talk(texts[0], first))
    crowd = tokens(4 * PAGE, 6)
    rounds.append([crowd + tokens(7 + 9 * i, 50 + i) for i in range(8)])
    expected = [serve(plain, prompts) for prompts in rounds] if plain is not None else None
    meshes = {shape: sub_mesh(*shape) for shape in ((0, 1, 1), (2, 1, 1), (0, 2, 2), (2, 2, 2), (0, 2, 1), (2, 2, 1))}
    together = meshes[0, 2, 2]
    unified = [("unified", engine(together, overlap="on"), together)]
    for number, prompts in enumerate(rounds):
        found = answer(unified, prompts, BY_DEFAULT)
        assert rank or [one.token_ids for one in found] == expected[number], f"one job with attention TP, {number=}"
    one, two, apart = ((0, 1, 1), (2, 1, 1)), ((0, 2, 2), (2, 2, 2)), ((0, 2, 1), (2, 2, 1))
    few = {"kv_tokens": 7 * PAGE}
    for shapes, library, left, right in (
        (one, "torch", {}, {}),
        (one, "torch", {"prefix_cache": "off"}, {}),
        (one, "torch", {}, {"prefix_cache": "off"}),
        (one, "torch", few, few),
        (two, "torch", {}, {}),
        (apart, "torch", {}, {}),
        *((one, other, {}, {}) for other in libraries),
    ):
        here, there = (meshes[shape] for shape in shapes)
        jobs = [("prefill", engine(here, **left), here), ("decode", engine(there, **right), there)]
        for number, prompts in enumerate(rounds):
            moved[0] = 0
            found = answer(jobs, prompts, Handoff(library, checksums=True))
            if rank == 0:
                assert expected is not None
                got = [one.token_ids for one in found]
                assert got == expected[number], f"{shapes}, {library}, {left}, {right}, {number=}"
            sent, cached = total(moved[0]), total(sum(one.cached_tokens for one in found))
            if shapes != one or few in (left, right):
                continue
            pages = sum(-(-len(prompt) // PAGE) for prompt in prompts)
            # Each whole page, if it is not the last.
            hits = [(0 + 2 + 1 + 0), (2 + 3 + 1 + 0), (2 + 3 + 1 + 1), 7 * 4][number]
            assert cached == (0 if left else hits * PAGE), (library, left, right, number)
            spared = 0 if right else hits
            assert sent == pages - spared, (library, left, right, number)
    assert not stood, "they were not computed and sent in the order in which they were opened"


def test_hits_on_either_side_change_no_token_and_spare_computing_and_sending(small: Path) -> None:
    run_world(4, body, small, [name for name in TRANSPORTS[1:] if obstacle(name) is None], timeout_s=200)
