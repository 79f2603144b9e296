"""The same request gives the same tokens in every arrangement, and no page leaks on any rank.

Arrangements: any world size, any attention TP, idle ranks, unified, or disaggregated with two sides of any shape
(`PAIRS` of the 81 there are, with every pair of attention TPs).
"""

import functools
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from tokenizers import Tokenizer

from disagg.config import EngineConfig
from disagg.control.ports import RouterPort
from disagg.engine import Engine
from disagg.front.answer import Answer
from disagg.front.expert_rows import NO_EXPERTS, RowShape
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.front.tokenizer import load_tokenizer
from disagg.handoff.endpoints import BY_DEFAULT, Handoff
from disagg.interrupt import Interrupt
from disagg.loop import serve
from disagg.request import Request
from kernels.ops import Ops
from model.config import ModelConfig
from model.pages import NULL_PAGE
from parallel.mesh import Mesh
from tests.clients import listed
from tests.worlds import run_world, sub_mesh

SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)]  # ranks, attention TP
PAIRS = [  # prefill, decode: every side in either role, and every pair of attention TPs
    *[((1, 1), (1, 1)), ((2, 1), (4, 1)), ((4, 1), (2, 1)), ((8, 1), (2, 2)), ((1, 1), (8, 4))],  # from TP 1
    *[((4, 2), (8, 1)), ((8, 2), (4, 2)), ((2, 2), (8, 2)), ((2, 2), (4, 4))],  # from TP 2
    *[((4, 4), (2, 1)), ((8, 4), (2, 2)), ((4, 4), (8, 4))],  # from TP 4
]
SIDE = 8  # the most ranks a side has: the prefill (or unified) job starts at rank 0, the decode job at rank 8
FAVOURED = 5, 900, 2000  # tokens that the last two requests favour; the first ends them
SETTINGS = EngineConfig(  # every page is computed and sent in every arrangement
    max_batch=4, max_tokens_per_step=96, kv_tokens=1024, max_model_len=512, prefix_cache="off"
)


def requests(vocab_size: int) -> list[UserRequest]:
    """Fewer than ranks, so that some idle: one token, both sides of a page boundary, several chunks, sampling.

    The last two change their logits in every way, one of them greedily. Each token ends them once min_tokens allows it.
    """
    rng = random.Random(0)
    lengths, outputs = (1, 63, 64, 65, 130, 100, 2), (4, 2, 1, 3, 2, 9, 9)
    made = []
    for i, (length, max_tokens) in enumerate(zip(lengths, outputs, strict=True)):
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        fields = {"temperature": 0.8, "top_p": 0.9, "top_k": 40} if i % 2 else {}
        if i > 4:
            fields |= {"min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 2.0, "repetition_penalty": 1.5}
            fields |= {"logit_bias": dict.fromkeys(FAVOURED, 25.0), "min_tokens": 3, "stop_token_ids": [FAVOURED[0]]}
        request = Request(0, prompt, max_tokens, seed=i, ignore_eos=True, logprobs=2, **fields)
        made.append(UserRequest(i, request, []))
    return made


@functools.cache
def tokenizer_of(folder: Path) -> Tokenizer:
    return load_tokenizer(folder).tokenizer


def collect(answers: dict[int, Answer]) -> list[tuple]:
    return [(answers[i].token_ids, answers[i].finish_reason, answers[i].error) for i in sorted(answers)]


Jobs = list[tuple[str, Engine | None, Mesh | None]]


def one_run(
    jobs: Jobs,
    folder: Path,
    interrupt: Interrupt,
    make: Callable[[int], list[UserRequest]] = requests,
    handoff: Handoff = BY_DEFAULT,
) -> list[tuple]:
    """Serve `make(vocab_size)` with these jobs. Every rank of the world calls this; rank 0 gets what came out."""
    work = make(tokenizer_of(folder).get_vocab_size())
    return collect(answers_to(work, jobs, folder, interrupt, handoff=handoff))


def answers_to(
    users: list[UserRequest],
    jobs: Jobs,
    folder: Path,
    interrupt: Interrupt,
    expert_shape: RowShape = NO_EXPERTS,
    expected: int = 0,
    handoff: Handoff = BY_DEFAULT,
) -> dict[int, Answer]:
    """As `one_run`, but any requests. `folder`: the tokenizer's. `expected`: replicas to wait for before the first."""
    rank, answers, thread = dist.get_rank(), {}, None
    port = [0]
    if rank == 0:
        tokenizer = tokenizer_of(folder)
        where = RouterPort("127.0.0.1", 0)
        router = Router(where, tokenizer, tokenizer.get_vocab_size(), lambda: False, expected, expert_shape)
        work = listed(users, answers.__setitem__)
        thread = threading.Thread(target=router.run, args=(work,))
        port = [router.port.port]
    dist.broadcast_object_list(port)
    if thread is not None:
        thread.start()
    for role, engine, mesh in jobs:
        if mesh is not None:
            assert serve(role, engine, mesh, ("127.0.0.1", port[0]), interrupt, handoff=handoff) is None
            allocator = engine.scheduler.cache
            assert interrupt.seen or not engine.scheduler.has_work
            assert interrupt.seen or allocator.num_free == allocator.capacity, f"{role} {mesh}: a page leaked"
    if thread is not None:
        thread.join()
        router.port.close()
    return answers


def serve_members(rank: int, prompts: list[list[int]], checkpoints: list[tuple[Path, list[list[int]]]]) -> None:
    """Four ranks, for `test_family.py`: a job with attention TP 2, then a prefill and a decode job of two ranks each.

    checkpoints: a folder with the tokens that transformers answers, as many as are compared. It is here because ranks
    import its file, and `test_family.py` imports transformers, which takes seconds.
    """
    interrupt = Interrupt()
    settings = replace(SETTINGS, max_tokens_per_step=48, max_model_len=256)
    unified, prefill, decode = sub_mesh(0, 4, 2), sub_mesh(0, 2), sub_mesh(2, 2)

    count = len(checkpoints[0][1][0])

    def requests(_: int) -> list[UserRequest]:
        made = [Request(0, prompt, count, ignore_eos=True) for prompt in prompts]
        return [UserRequest(i, request, []) for i, request in enumerate(made)]

    for folder, tokens in checkpoints:
        config, expected = ModelConfig.from_pretrained(folder), [(answer, "length", None) for answer in tokens]

        def engine(mesh: Mesh | None) -> tuple[Engine | None, Mesh | None]:
            made = mesh and Engine.from_pretrained(settings, config, folder, mesh, Ops())  # noqa: B023
            return made, mesh

        for jobs in (
            [("unified", *engine(unified))],
            [("prefill", *engine(prefill)), ("decode", *engine(decode))],
        ):
            answers = one_run(jobs, folder, interrupt, requests)
            if rank == 0:
                assert answers == expected, (folder.name, [role for role, *_ in jobs])


def body(rank: int, folder: Path) -> None:
    config, interrupt = ModelConfig.from_pretrained(folder), Interrupt()

    def engines(first: int) -> dict[tuple[int, int], tuple[Engine | None, Mesh | None]]:
        made = {}
        for shape in SHAPES:
            mesh = sub_mesh(first, *shape)
            engine = Engine.from_pretrained(SETTINGS, config, folder, mesh, Ops()) if mesh is not None else None
            made[shape] = (engine, mesh)
        return made

    left, right = engines(0), engines(SIDE)
    expected = one_run([("unified", *left[(1, 1)])], folder, interrupt)
    if rank == 0:
        assert [len(tokens) for tokens, *_ in expected] == [4, 2, 1, 3, 2, 4, 4]
        assert len({tuple(tokens) for tokens, *_ in expected}) == 7
        assert all(tokens[-1] == FAVOURED[0] and reason == "stop" for tokens, reason, _ in expected[5:])
    for shape in SHAPES[1:]:
        got = one_run([("unified", *left[shape])], folder, interrupt)
        assert got == expected or rank, f"unified {shape}: {got} instead of {expected}"
    for shape, other in PAIRS:
        got = one_run([("prefill", *left[shape]), ("decode", *right[other])], folder, interrupt)
        assert got == expected or rank, f"prefill {shape}, decode {other}: {got} instead of {expected}"
    for shape in ((1, 1), (4, 2)):  # every step in two halves
        mesh = sub_mesh(0, *shape)
        settings = replace(SETTINGS, overlap="on")
        engine = Engine.from_pretrained(settings, config, folder, mesh, Ops()) if mesh is not None else None
        got = one_run([("unified", engine, mesh)], folder, interrupt)
        assert got == expected or rank, f"overlapped {shape}: {got} instead of {expected}"
    for engine, _ in (*left.values(), *right.values()):
        assert engine is None or engine.pool[:, NULL_PAGE + 1 :].isfinite().all()


def test_every_arrangement_gives_the_same_tokens(small: Path) -> None:
    assert {prefill for prefill, _ in PAIRS} == {decode for _, decode in PAIRS} == set(SHAPES)
    assert len({(prefill[1], decode[1]) for prefill, decode in PAIRS}) == 9
    run_world(2 * SIDE, body, small, timeout_s=280)
