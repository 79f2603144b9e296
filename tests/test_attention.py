"""The two forms of MLA are equal, and a step reads and writes only the pool rows of its own tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.ops import Ops
from model.batch import Batch, Chunk, page_rows
from model.config import ModelConfig
from model.kv_cache import make_pool
from model.layers import rope_table
from model.mla import MLA
from model.pages import NULL_PAGE, PAGE
from model.transformer import Transformer
from parallel.dispatch import Contiguous, ContiguousAllToAll, Pending
from parallel.mesh import Mesh
from tests import hf

NAN = float("nan")
LONG, SHORT = 131, 64  # tokens of the two sequences of most tests: three pages, and exactly one
PAGES = {LONG: [5, 2, 7], SHORT: [4]}
NUM_PAGES = 9


@pytest.fixture(params=["q_lora", "no q_lora"])
def mla(request: pytest.FixtureRequest) -> MLA:
    raw = {**hf.BASE, "model_type": "deepseek_v3", "q_lora_rank": 24 if request.param == "q_lora" else None}
    config = ModelConfig.from_dict(raw)
    layer = MLA(config, 1, rope_table(config, 256, "cpu"), Ops(), torch.float32, "cpu")
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.3)
    return layer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder: Path = hf.save(tmp_path_factory.mktemp("v3"), "v3")
    return hf.load(folder)


def poisoned_pool(mla: MLA) -> Tensor:
    """One layer's pages, all NaN."""
    return torch.full((NUM_PAGES, PAGE, mla.config.kv_dim), NAN)


def chunk(length: int, start: int, stop: int) -> Chunk:
    """Tokens start .. stop - 1 of the sequence that is `length` tokens long; the ids do not matter to a layer."""
    return Chunk([0] * (stop - start), start, PAGES[length])


def rows_of(pages: list[int], length: int) -> list[int]:
    return [pages[p // PAGE] * PAGE + p % PAGE for p in range(length)]


def finite_rows(pool: Tensor) -> list[int]:
    return pool.flatten(0, -2).isfinite().all(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 131])
def test_expanded_equals_absorbed(mla: MLA, length: int) -> None:
    """The last token as a prompt chunk of one token, and as a decode."""
    x, pool = torch.randn(length, mla.config.hidden_size), poisoned_pool(mla)
    before = Chunk([0] * (length - 1), 0, PAGES[LONG])
    if length > 1:
        mla(x[:-1], Batch.build([], [before], "cpu"), pool)
    last, other = Chunk([0], length - 1, PAGES[LONG]), pool.clone()
    expanded = mla(x[-1:], Batch.build([], [last], "cpu"), pool)
    absorbed = mla(x[-1:], Batch.build([last], [], "cpu"), other)
    assert expanded.isfinite().all()
    assert_close(absorbed, expanded, atol=1e-5, rtol=1e-5)
    assert torch.equal(pool.nan_to_num(9e9), other.nan_to_num(9e9))


@pytest.mark.parametrize("length", [5, 63, 64, 66, 131])
@pytest.mark.parametrize("q_len", [2, 5])
def test_several_tokens_of_a_decode_equal_one_after_another(mla: MLA, length: int, q_len: int) -> None:
    """Beside a shorter sequence and padding. Tokens past a sequence's last page write to the null page."""
    x, pool = torch.randn(length, mla.config.hidden_size), poisoned_pool(mla)
    pool[NULL_PAGE] = 0.0
    if length > q_len:
        mla(x[:-q_len], Batch.build([], [Chunk([0] * (length - q_len), 0, PAGES[LONG])], "cpu"), pool)
    new, other = x[-q_len:], pool.clone()
    want = [mla(row[None], Batch.build([chunk(LONG, length - q_len + j, length - q_len + j + 1)], [], "cpu"), other)
            for j, row in enumerate(new)]  # fmt: skip
    end = 64 * len(PAGES[SHORT]) - 1  # the other sequence's last place: all but the first of its tokens are too many
    table = torch.from_numpy(page_rows([PAGES[LONG], PAGES[SHORT], []], max(map(len, PAGES.values())) + 1)).int()
    positions = torch.tensor([[length - q_len], [end], [0]]) + torch.arange(q_len)
    batch = Batch.decode(torch.zeros(3 * q_len).long(), positions.flatten(), table)
    assert (batch.q_len, batch.num_decodes, batch.decode_tokens) == (q_len, 3, 3 * q_len)
    assert batch.is_token.tolist() == [True] * q_len + [True] + [False] * (2 * q_len - 1)
    pool[PAGES[SHORT]] = 0.0
    got = mla(torch.cat((new, new, new)), batch, pool)
    assert_close(got[:q_len], torch.cat(want), atol=1e-5, rtol=1e-5)
    assert got.isfinite().all()
    mine = rows_of(PAGES[LONG], length)
    assert_close(pool.flatten(0, 1)[mine], other.flatten(0, 1)[mine])


@pytest.mark.parametrize("step", [1, 7, 63, 64, 65])
def test_chunks_equal_the_whole_prompt(mla: MLA, step: int) -> None:
    x, whole, cut = torch.randn(LONG, mla.config.hidden_size), poisoned_pool(mla), poisoned_pool(mla)
    want = mla(x, Batch.build([], [chunk(LONG, 0, LONG)], "cpu"), whole)
    starts = range(0, LONG, step)
    got = [mla(x[s : s + step], Batch.build([], [chunk(LONG, s, min(s + step, LONG))], "cpu"), cut) for s in starts]
    assert want.isfinite().all()
    assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)


def test_a_prompt_step_writes_its_own_rows_and_no_other(mla: MLA) -> None:
    pool = poisoned_pool(mla)
    batch = Batch.build([], [chunk(LONG, 0, 70), chunk(SHORT, 0, 9)], "cpu")
    assert mla(torch.randn(79, mla.config.hidden_size), batch, pool).isfinite().all()
    assert finite_rows(pool) == sorted(rows_of(PAGES[LONG], 70) + rows_of(PAGES[SHORT], 9))


@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "chunk"])
@pytest.mark.parametrize("length", [LONG, SHORT])
def test_nothing_but_a_sequences_own_rows_is_read(mla: MLA, length: int, decoding: bool) -> None:
    """Everything else is NaN: other sequences, the tail of the last page, free pages, the null page."""
    x, pool = torch.randn(LONG + SHORT, mla.config.hidden_size), poisoned_pool(mla)
    first = Batch.build([], [chunk(LONG, 0, LONG - 1), chunk(SHORT, 0, SHORT - 1)], "cpu")
    mla(x[: LONG + SHORT - 2], first, pool)
    alone = poisoned_pool(mla)
    mine = rows_of(PAGES[length], length - 1)
    alone.flatten(0, 1)[mine] = pool.flatten(0, 1)[mine]

    step = [chunk(n, n - 1, n) for n in (LONG, SHORT)]
    token = torch.randn(2, mla.config.hidden_size)

    def run(chunks: list[Chunk], x: Tensor, pool: Tensor) -> Tensor:
        return mla(x, Batch.build(chunks, [], "cpu") if decoding else Batch.build([], chunks, "cpu"), pool)

    together = run(step, token, pool.nan_to_num(1.0))
    which = (LONG, SHORT).index(length)
    single = run(step[which : which + 1], token[which : which + 1], alone)
    assert single.isfinite().all()
    assert_close(single, together[which : which + 1], atol=1e-5, rtol=1e-5)
    assert finite_rows(alone) == sorted(rows_of(PAGES[length], length))


def test_a_decode_and_a_chunk_in_one_step_equal_each_alone(mla: MLA) -> None:
    x, pool = torch.randn(60 + LONG - 1, mla.config.hidden_size), poisoned_pool(mla)
    mla(x, Batch.build([], [chunk(SHORT, 0, 60), chunk(LONG, 0, LONG - 1)], "cpu"), pool)
    decode, more = chunk(LONG, LONG - 1, LONG), chunk(SHORT, 60, 64)
    token, rest = torch.randn(1, mla.config.hidden_size), torch.randn(4, mla.config.hidden_size)
    apart = [
        mla(token, Batch.build([decode], [], "cpu"), pool.clone()),
        mla(rest, Batch.build([], [more], "cpu"), pool.clone()),
    ]
    mixed = mla(torch.cat((token, rest)), Batch.build([decode], [more], "cpu"), pool)
    assert mixed.isfinite().all()
    assert_close(mixed, torch.cat(apart), atol=1e-5, rtol=1e-5)


def test_tokens_to_verify_and_a_chunk_in_one_step_equal_each_alone(mla: MLA) -> None:
    x, pool = torch.randn(LONG + 12, mla.config.hidden_size), poisoned_pool(mla)
    pool[NULL_PAGE] = 0.0
    mla(x[: LONG - 3], Batch.build([], [chunk(LONG, 0, LONG - 3)], "cpu"), pool)
    table, positions = torch.tensor([PAGES[LONG]]).int(), torch.arange(LONG - 3, LONG)
    verified = Batch.decode(torch.arange(3), positions, table)
    prompts = Batch.build([], [chunk(SHORT, 0, 12)._replace(token_ids=list(range(12)))], "cpu")
    step = Batch.join(verified, prompts)
    assert step.token_ids.tolist() == [0, 1, 2, *range(12)] and step.logit_rows.tolist() == [0, 1, 2, 14]
    assert (step.q_len, step.decode_tokens, step.num_tokens) == (3, 3, 15)
    other = pool.clone()
    apart = mla(x[LONG - 3 : LONG], verified, other), mla(x[LONG:], prompts, other)
    together = mla(torch.cat((x[LONG - 3 : LONG], x[LONG:])), step, pool)
    assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)
    assert_close(pool.nan_to_num(9e9), other.nan_to_num(9e9))
    empty = Batch.decode(positions[:0], positions[:0], table[:0])
    assert_close(mla(x[LONG:], Batch.join(empty, prompts), pool), apart[1], atol=1e-5, rtol=1e-5)


def mixed_chunks() -> tuple[list[Chunk], list[Chunk]]:
    """One decode and a chunk of two tokens: 3 tokens, so that a multiple of 4 needs one padding row."""
    return [Chunk([11], 64, [3, 6])], [Chunk([12, 13], 0, [1])]


def written_pool(model: Transformer) -> Tensor:
    pool = make_pool(model.config, NUM_PAGES, torch.float32, "cpu")
    batch = Batch.build([], [Chunk(list(range(20, 84)), 0, [3])], "cpu")
    model(batch, pool, hf.dispatchers(model)[0])
    assert pool[:, 3].count_nonzero() > 0
    return pool


@pytest.mark.parametrize("prefilling", [True, False], ids=["decode and chunk", "decode"])
def test_padding_rows_write_only_the_null_page_and_change_nothing(model: Transformer, prefilling: bool) -> None:
    decodes, prefills = mixed_chunks()
    prefills = prefills if prefilling else []
    contiguous, masked = hf.dispatchers(model)
    dispatcher = contiguous if prefilling else masked
    pools, logits = [written_pool(model) for _ in range(2)], []
    pools[1][:, NULL_PAGE] = NAN
    for pool, multiple in zip(pools, (1, 4), strict=True):
        batch = Batch.build(decodes, prefills, "cpu", multiple)
        assert batch.num_tokens % multiple == 0
        logits.append(model(batch, pool, dispatcher))
    assert batch.is_token.tolist() == ([True, False, True, True] if prefilling else [True, False, False, False])
    assert batch.kv_lens.tolist() == [65] + [0] * (1 if prefilling else 3)
    assert logits[1].shape == (1 + prefilling, model.config.vocab_size)
    assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert_close(pools[1][:, NULL_PAGE + 1 :], pools[0][:, NULL_PAGE + 1 :], atol=1e-5, rtol=1e-5)
    null = pools[1][:, NULL_PAGE].isfinite().all(-1)  # [layers, PAGE]
    assert null[:, 0].all()
    assert not null[:, 1:].any()


def test_a_step_of_nothing_but_padding_is_finite(model: Transformer) -> None:
    pool = make_pool(model.config, NUM_PAGES, torch.float32, "cpu")
    padding = [Chunk((0,), 0, (), wants_logits=False)] * 4
    logits = model(Batch.build(padding, [], "cpu"), pool, hf.dispatchers(model)[1])
    assert logits.shape == (0, model.config.vocab_size)
    assert pool.isfinite().all()
    assert not pool[:, NULL_PAGE + 1 :].any()


class Recording(ContiguousAllToAll):
    """The real dispatcher, which also keeps what it was told."""

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        self.slots = slots
        return super().dispatch(x, slots, weights)


def test_padding_rows_visit_no_expert(model: Transformer) -> None:
    dispatcher = Recording(Mesh().ep, model.placement.num_slots, Ops())
    model(Batch.build(*mixed_chunks(), "cpu", 4), written_pool(model), dispatcher)
    assert (dispatcher.slots[1] == -1).all()
    assert (dispatcher.slots[[0, 2, 3]] >= 0).all()


@pytest.mark.parametrize("layout", [0, 1], ids=["contiguous", "masked"])
def test_the_empty_batch_runs_and_writes_nothing(model: Transformer, layout: int) -> None:
    pool = written_pool(model)
    before = pool.clone()
    logits = model(Batch.build((), (), "cpu"), pool, hf.dispatchers(model)[layout])
    assert logits.shape == (0, model.config.vocab_size)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("shape", hf.SHAPES)
def test_the_empty_batch_runs_in_every_shape_of_model(shape: str, tmp_path: Path) -> None:
    model = hf.load(hf.save(tmp_path, shape))
    pool = make_pool(model.config, 2, torch.float32, "cpu")
    for dispatcher in hf.dispatchers(model):
        assert model(Batch.build((), (), "cpu"), pool, dispatcher).shape == (0, model.config.vocab_size)
