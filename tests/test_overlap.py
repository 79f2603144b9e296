"""Two micro-batches in turns compute the same as one after the other, bit for bit.

Their stages run in the order that `parallel/overlap.py` draws.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.ops import Ops
from model.batch import Batch, Chunk, Chunks, pad, split, split_behind
from model.block import Residual
from model.kv_cache import make_pool
from model.transformer import Transformer
from parallel import overlap
from parallel.dispatchers import Dispatcher, plain_dispatchers
from parallel.overlap import STAGES, run, run_two
from parallel.overlap_rule import Rule
from tests import hf
from tests.worlds import run_world, sub_mesh

PAGES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(tmp_path_factory.mktemp("overlap"), "v3")


def chunks(kind: str) -> Chunks:
    """Decodes and prompts; every sequence has two pages, that hold something already."""

    def chunk(i: int, length: int, start: int = 0) -> Chunk:
        ids = [(37 * i + 11 * j) % 150 for j in range(length)]
        return Chunk(ids, start, [2 * i + 1, 2 * i + 2])

    match kind:
        case "prompts":
            return [], [chunk(0, 30), chunk(1, 50), chunk(2, 7)]
        case "one prompt":  # cut in the middle: its second half attends to its first
            return [], [chunk(0, 81, 20)]
        case "mixed":
            return [chunk(0, 1, 70), chunk(1, 1, 5)], [chunk(2, 9), chunk(3, 40, 12)]
        case "mostly decodes":
            return [chunk(i, 1, 10 + i) for i in range(4)], [chunk(4, 2)]
        case "decodes":
            return [chunk(i, 1, 60 + 2 * i) for i in range(5)], []
        case "one token":  # one half is empty
            return [chunk(0, 1, 33)], []
        case "nothing":
            return [], []
    raise AssertionError(kind)


KINDS = ("prompts", "one prompt", "mixed", "mostly decodes", "decodes", "one token", "nothing")


def filled_pool(model: Transformer) -> Tensor:
    pool = make_pool(model.config, PAGES, torch.float32, "cpu")
    pool[:, 1:].copy_(torch.randn(pool[:, 1:].shape, generator=torch.Generator().manual_seed(1)))
    return pool


@torch.inference_mode()
def check(model: Transformer, dispatcher: Dispatcher, parts: Chunks, multiple: int) -> None:
    """In turns, one after the other, and not cut at all."""
    decodes, prefills = parts
    decodes = pad(decodes, prefills, multiple)
    whole = Batch.build(decodes, prefills, "cpu")
    halves = tuple(Batch.build(*half, "cpu") for half in split(decodes, prefills, multiple))
    pools = [filled_pool(model) for _ in range(3)]
    in_turns = model(whole, pools[0], dispatcher, halves)
    uncut = model(whole, pools[1], dispatcher)
    residual = Residual(model.embed_tokens(whole.token_ids))
    if not prefills:
        model.dense_layers([(residual, whole)], pools[2])
    parts = list(zip(residual.cut(halves[0].num_tokens), halves, strict=True))
    if prefills:
        model.dense_layers(parts, pools[2])
    out = [run(model.moe_steps(part, half, pools[2], dispatcher)) for part, half in parts]
    assert torch.equal(in_turns, model.head(torch.cat(out), whole))
    assert torch.equal(pools[0], pools[2])
    torch.testing.assert_close(in_turns, uncut, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pools[0][:, 1:], pools[1][:, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(in_turns.argmax(-1), uncut.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank(kind: str, folder: Path) -> None:
    model = hf.load(folder)
    for dispatcher in hf.dispatchers(model):
        check(model, dispatcher, chunks(kind), 1)


def test_products_leave_the_dispatcher_its_sms_where_something_is_in_flight(folder: Path) -> None:
    """And nowhere else: not in dense layers, the head and plain steps."""
    left, inside, log = [], [], []

    @contextmanager
    def leave_sms(count: int) -> Iterator[None]:
        left.append(count)
        inside.append(True)
        yield
        inside.pop()

    model = hf.load(folder)
    model.ops = replace(model.ops, leave_sms=leave_sms)
    for name, module in (
        ("dense", model.layers[0].mlp),
        ("experts", model.layers[-1].mlp.experts),
        ("head", model.head),
    ):
        module.register_forward_pre_hook(lambda *_, name=name: log.append((name, bool(inside))))
    dispatcher = hf.dispatchers(model)[0]
    dispatcher.num_sms = 20
    decodes, prefills = chunks("prompts")
    whole = Batch.build(decodes, prefills, "cpu")
    model(whole, filled_pool(model), dispatcher)
    assert left == [] and set(log) == {("dense", False), ("experts", False), ("head", False)}
    log.clear()
    halves = tuple(Batch.build(*half, "cpu") for half in split(decodes, prefills))
    model(whole, filled_pool(model), dispatcher, halves)
    assert left == [20] and set(log) == {("dense", False), ("experts", True), ("head", False)}


def body(rank: int, folder: Path) -> None:
    for size, attn_tp, step in ((2, 2, 1), (4, 1, 2), (4, 2, 2)):  # with step 2, each kind is still on some replica
        mesh = sub_mesh(0, size, attn_tp)
        if mesh is None:
            continue
        model = hf.load(folder, mesh)
        contiguous, masked = plain_dispatchers(mesh.ep, model.placement.num_slots, Ops())
        for i in range(
            0, len(KINDS), step
        ):  # another kind on each replica, so that a half is empty on some and not on others
            check(model, contiguous, chunks(KINDS[(i + mesh.replica) % len(KINDS)]), attn_tp)
        few = [chunks("decodes")[0][: 5 - mesh.replica], chunks("nothing")[0]][mesh.replica % 2]
        decodes = few + [Chunk((0,), 0, (), wants_logits=False)] * (8 - len(few))  # as many rows on every rank
        check(model, masked, (decodes, []), 2 * attn_tp)


def test_several_ranks(folder: Path) -> None:
    run_world(4, body, folder)


class Recorder:
    """Notes what two generators do, by micro-batch and layer, and what is in flight meanwhile."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.in_flight: list[str] = []
        self.computed: list[tuple[str, str]] = []  # a computation, and what is in flight beside it

    def watch(self, name: str, layers: int) -> Iterator[str]:
        """Stands for a micro-batch's layers: the stages in order, and each transfer from its start to its wait."""
        for layer in range(layers):
            for stage in STAGES:
                match stage:
                    case "dispatch" | "combine":
                        self.in_flight.append(f"{name}{layer} {stage}")
                    case "arrival" | "return":
                        self.in_flight.remove(f"{name}{layer} {'dispatch' if stage == 'arrival' else 'combine'}")
                    case _:
                        self.computed.append((f"{name}{layer} {stage}", " ".join(self.in_flight)))
                assert len(self.in_flight) <= 1
                self.order.append(f"{name}{layer} {stage}")
                yield stage


def drawn(name: str) -> list[str]:
    """A lane of the drawing, without its dots."""
    lane = re.search(rf"^    {name} (.+) \| \.\.\.$", overlap.__doc__, re.MULTILINE)[1]
    return [part.strip() for part in lane.split("|")]


def test_the_schedule_is_the_one_drawn() -> None:
    recorder = Recorder()
    run_two(recorder.watch("a", 3), recorder.watch("b", 3))
    lanes = list(zip(drawn("compute"), drawn("network"), strict=True))
    assert recorder.computed[: len(lanes)] == lanes and len(lanes) == 7
    assert [flight for _, flight in recorder.computed].count("") == 3  # the first two, and the last
    by_turn = re.search(r"`>return`\):\n\n(.+?)\n\n", overlap.__doc__, re.DOTALL)[1]
    turns = [" ".join(step) for step in re.findall(r"([ab]\d) >?(\w+)", by_turn)]
    first = recorder.order.index(turns[0])
    assert recorder.order[first : first + len(turns)] == turns and len(turns) == 15


def test_the_stages_are_the_models(folder: Path) -> None:
    model = hf.load(folder)
    batch = model.planned(Batch.build(*chunks("mixed"), "cpu"))
    residual, contiguous = Residual(model.embed_tokens(batch.token_ids)), hf.dispatchers(model)[0]
    steps = model.moe_steps(residual, batch, filled_pool(model), contiguous)
    assert list(steps) == list(STAGES) * model.config.num_moe_layers


lengths = st.lists(st.integers(1, 9), max_size=5)


@given(decodes=st.integers(0, 9), prompts=lengths, multiple=st.sampled_from((1, 2, 4)))
def test_a_split_keeps_every_token_in_order(decodes: int, prompts: list[int], multiple: int) -> None:
    first = [Chunk([i], i, [i]) for i in range(decodes)]
    rest = [Chunk([100 * i + j for j in range(n)], 3 * i, [i], bool(i % 2)) for i, n in enumerate(prompts)]
    first = pad(first, rest, multiple)
    (ad, ap), (bd, bp) = split(first, rest, multiple)
    total = len(first) + sum(prompts)
    size = len(ad) + sum(len(c.token_ids) for c in ap)
    assert size % multiple == 0 and abs(2 * size - total) <= multiple
    assert not (ap and bd), "a decode behind a prompt"
    assert ad + bd == first
    joined: list[Chunk] = []
    for chunk in ap + bp:
        if joined and joined[-1].pages == chunk.pages:
            before = joined.pop()
            assert chunk.start == before.start + len(before.token_ids) and not before.wants_logits
            chunk = chunk._replace(token_ids=[*before.token_ids, *chunk.token_ids], start=before.start)
        joined.append(chunk)
    assert joined == rest


@given(
    decodes=st.integers(0, 9),
    each=st.integers(1, 5),
    prompts=lengths,
    multiple=st.sampled_from((1, 2, 4)),
)
def test_a_split_behind_sequences_of_several_tokens_cuts_none(
    decodes: int, each: int, prompts: list[int], multiple: int
) -> None:
    chunks = [Chunk([100 * i + j for j in range(n)], 3 * i, [i]) for i, n in enumerate(prompts)]
    total = decodes * each + sum(prompts)
    chunks = [Chunk([0] * (-total % multiple), 0, [], False), *chunks]
    cut, first, second = split_behind(decodes, each, chunks, multiple)
    size = cut * each + sum(len(c.token_ids) for c in first)
    total += -total % multiple
    assert 0 <= cut <= decodes and size % multiple == 0 and not (first and cut < decodes)
    assert abs(2 * size - total) <= 2 * each * multiple, "a half is the larger by more than a cut could be moved"
    tokens = [token for chunk in [*first, *second] for token in chunk.token_ids]
    assert tokens == [token for chunk in chunks for token in chunk.token_ids]


def test_when_it_pays() -> None:
    one, none = Rule("auto", 1, 1, 1 / 32), Rule("auto", 8, 1, 0)
    assert not any(rule.in_decode(256) or rule.in_prefill(10_000) for rule in (one, none))
    auto = Rule("auto", 72, 2, 1 / 32)
    assert [auto.in_decode(rows) for rows in (254, 255, 256, 258)] == [False, False, True, False]
    assert [auto.in_prefill(tokens) for tokens in (8191, 8192)] == [False, True]
    few = Rule("auto", 2, 1, 1 / 32)  # 4096 x 2 / 32 = 256 rows an expert
    assert [few.in_decode(rows) for rows in (4094, 4096)] == [False, True]
    assert [few.in_decode(rows, 2) for rows in (2046, 2048)] == [False, True]  # drafts are tokens, too
    assert [few.row_multiple(rows, 2) for rows in (2046, 2048)] == [1, 2]
    four = Rule("auto", 4, 1, 1 / 32)  # as measured: 4,096 tokens a rank lose, 8,192 break even
    assert [four.in_prefill(tokens) for tokens in (8192, 16383, 16384)] == [False, False, True]
    on, off = Rule("on", 1, 2, 1 / 32), Rule("off", 72, 1, 1 / 32)
    assert on.in_decode(4) and not on.in_decode(2) and on.in_prefill(0)
    assert not off.in_decode(256) and not off.in_prefill(10_000)
    assert one.why == "off: one rank" and none.why == "off: no experts" and on.why == "on"
    assert "from 128 rows a rank, in prefill from 4096 tokens" in auto.why
    assert "from 4096 rows a rank, in prefill from 32768 tokens" in few.why
