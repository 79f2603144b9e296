"""A prompt's log probabilities are transformers', however it is cut, and the router believes only rows that fit.

tests/test_chosen_experts.py compares them in arrangements of several ranks.
"""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from disagg import engine as engine_module
from disagg.config import EngineConfig
from disagg.control.messages import Abort, Bye, Finish, Submit, Update, Updates
from disagg.engine import Engine
from disagg.front.prompt_rows import PromptRows
from disagg.pipeline import Pipeline, Turn
from disagg.request import Request
from disagg.unified import Unified
from kernels.ops import Ops
from model.batch import Chunk
from model.config import ModelConfig
from model.prompt_logprobs import PromptLogprobs
from model.prompt_row import MAX_LOGPROBS, SLICE, pack, row_bytes, unpack
from model.sampling import top_logprobs
from parallel.mesh import Mesh
from tests import hf
from tests.conftest import eventually
from tests.news import singly
from tests.test_chosen_experts import check_prompt
from tests.test_router import VOCAB_SIZE, joining, serving
from tests.tracing import Peak

LENGTHS = (1, 2, 65, 130, 90, 64)
TOPS = (20, 1, 3, 0, None, 2)
SETTINGS = EngineConfig(max_batch=4, kv_tokens=1024, max_model_len=256, prefix_cache="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(tmp_path_factory.mktemp("model"), "one_dense")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(hf.BASE["vocab_size"], (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def theirs(folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    return hf.their_logprobs(folder, prompts)


def served(engine: Engine, requests: list[Request]) -> dict[int, list[Update]]:
    """Serve all requests together. Returns the news of each."""
    role, news = Unified(engine), {}
    pipeline = Pipeline(role, engine, engine.mesh)
    for request in requests:
        role.handle(Submit(request, None))
    while pipeline.turn() == Turn.WORKED:
        pass
    for update in singly(role.updates):
        assert update.error is None, update.error
        news.setdefault(update.uid, []).append(update)
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    return news


def make_engine(folder: Path, step_tokens: int, overlap: str = "off") -> Engine:
    settings = replace(SETTINGS, max_tokens_per_step=step_tokens, overlap=overlap)
    return Engine.from_pretrained(settings, ModelConfig.from_pretrained(folder), folder, Mesh(), Ops())


@pytest.mark.parametrize("step_tokens, overlap", [(5, "off"), (64, "on"), (1000, "off")])
def test_they_are_those_of_transformers_with_any_chunks(
    folder: Path, prompts: list[list[int]], theirs: list[Tensor], step_tokens: int, overlap: str
) -> None:
    """Some requests generate nothing: they end without a token, even if the one that is dropped would end them."""
    engine = make_engine(folder, step_tokens, overlap)
    engine.config = replace(engine.config, eos_token_ids=tuple(range(hf.BASE["vocab_size"])))
    requests = [
        Request(i, prompt, i % 2 if top is not None else 4, logprobs=2, prompt_logprobs=top)
        for i, (prompt, top) in enumerate(zip(prompts, TOPS, strict=True))
    ]
    news = served(engine, requests)
    for request, expected in zip(requests, theirs, strict=True):
        updates, rows = news[request.uid], PromptRows(request, hf.BASE["vocab_size"])
        assert [update.finish for update in updates] == [None] * (len(updates) - 1) + [
            "stop" if request.max_tokens else "length"
        ]
        assert [len(update.tokens) for update in updates if not update.prompt_rows] == [min(request.max_tokens, 1)]
        assert not any(update.prompt_rows for update in updates[-1:]), "rows after the token"
        assert all(len(update.tokens) == len(update.logprobs) for update in updates)
        for update in updates:
            rows.add(update.prompt_rows)
        if request.prompt_logprobs is not None:
            check_prompt(rows.encode(), request, expected, f"request {request.uid}")


def test_it_is_free_where_nobody_asks(folder: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(folder, 64)
    expected = served(engine, [Request(i, prompt, 3) for i, prompt in enumerate(prompts)])
    asked = served(engine, [Request(i, prompt, 3, prompt_logprobs=1) for i, prompt in enumerate(prompts)])
    monkeypatch.setattr(engine_module, "PromptLogprobs", None)
    assert served(engine, [Request(i, prompt, 3) for i, prompt in enumerate(prompts)]) == expected
    for uid, updates in asked.items():
        assert [token for update in updates for token in update.tokens] == [
            token for update in expected[uid] for token in update.tokens
        ]


# One step's slices.


def chunk(count: int, top: int, vocab_size: int) -> Chunk:
    targets = torch.randint(vocab_size, (count,)).tolist()
    return Chunk([0] * count, 0, (), targets=targets, top=top)


def scored(chunks: list[Chunk], x: Tensor, head: Tensor) -> Tensor:
    step, sizes = PromptLogprobs(chunks, "cpu"), []

    def logits_of(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows @ head

    step.compute(x, logits_of)
    assert max(sizes) <= SLICE
    return step.rows()


@pytest.mark.parametrize("lengths", [(1,), (SLICE,), (SLICE - 3, 5), (3, 2 * SLICE, 1)])
def test_slices_give_what_the_whole_gives(lengths: tuple[int, ...]) -> None:
    """Prompts are the last rows of the batch. The last chunk is a prompt's last, whose last row predicts no target."""
    vocab_size, decodes = 50, 4
    chunks = [chunk(count, top, vocab_size) for top, count in enumerate(lengths, 2)]
    chunks[-1] = chunks[-1]._replace(token_ids=[0, *chunks[-1].token_ids])
    x, head = torch.randn(decodes + sum(lengths) + 1, 8), torch.randn(8, vocab_size)
    rows = scored(chunks, x, head)
    targets = torch.tensor([token for one in chunks for token in one.targets])
    ids, values = top_logprobs(x[decodes:-1] @ head, targets, len(lengths) + 1)
    assert torch.equal(rows[:, 0], ids.int())
    assert torch.allclose(rows[:, 1].view(torch.float32), values, atol=1e-6)
    first = 0
    for one in chunks:
        data = pack(rows[first : first + len(one.targets)].numpy(), one.top)
        assert len(data) == len(one.targets) * row_bytes(one.top, vocab_size)
        got_ids, got_values = unpack(data, one.top, vocab_size)
        kept = [*range(one.top), -1]
        assert np.array_equal(got_ids, ids[first : first + len(one.targets), kept])
        assert np.array_equal(got_values, rows[first : first + len(one.targets), 1].view(torch.float32)[:, kept])
        first += len(one.targets)


def test_a_vocabulary_smaller_than_what_is_asked_for() -> None:
    rows = scored([chunk(3, MAX_LOGPROBS, 5)], torch.randn(3, 8), torch.randn(8, 5))
    ids, values = unpack(pack(rows.numpy(), MAX_LOGPROBS), MAX_LOGPROBS, 5)
    assert ids.shape == values.shape == (3, 6)
    assert np.allclose(np.exp(values[:, :5]).sum(1), 1)


def test_the_peak_does_not_grow_with_the_prompt() -> None:
    """Only the rows that are kept do: their numbers, ids and values."""
    vocab_size, peaks = 3000, []
    head = torch.randn(8, vocab_size)
    for length in (2 * SLICE, 6 * SLICE):
        x, one = torch.randn(length, 8), chunk(length, MAX_LOGPROBS, vocab_size)
        with Peak() as peak:
            scored([one], x, head)
        peaks.append(peak.most - length * (2 * 8 + row_bytes(MAX_LOGPROBS, vocab_size)))
    logits = SLICE * vocab_size * 4
    assert 2 * logits < peaks[0] < 2.1 * logits
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


# What the router believes.

REQUEST = Request(0, [5, 6, 7], 2, prompt_logprobs=1)


def words(*rows: tuple[list[int], list[float]]) -> bytes:
    return b"".join(np.array(ids, "<i4").tobytes() + np.array(values, "<f4").tobytes() for ids, values in rows)


GOOD = words(([9, 6], [-0.25, -2.0]), ([7, 7], [-0.5, -0.5]))
PIECES = [GOOD[:3], GOOD[3:20], GOOD[20:]]


@pytest.mark.parametrize(
    "told, error",
    [
        ([GOOD], None),
        (PIECES, None),
        ([], "sent 0 bytes of prompt log probabilities, not 32"),
        ([GOOD[:-1]], "sent 31 bytes of prompt log probabilities, not 32"),
        ([GOOD, b"x"], "sent over 32 bytes of prompt log probabilities"),
        ([words(([9, 6], [-1, -2]), ([7, 8], [-1, -2]))], "sent log probabilities of other tokens than the prompt's"),
        ([words(([-1, 6], [-1, -2]), ([7, 7], [-1, -1]))], "sent log probabilities of other tokens than the prompt's"),
        (
            [words(([VOCAB_SIZE, 6], [-1, -2]), ([7, 7], [-1, -1]))],
            "sent log probabilities of other tokens than the prompt's",
        ),
        *(
            ([words(([9, 6], [-1, wrong]), ([7, 7], [-1, -1]))], "sent prompt log probabilities that are not finite")
            for wrong in (float("nan"), float("-inf"), 0.5)
        ),
    ],
)
def test_a_replica_that_sends_other_rows_is_not_believed(told: list[bytes], error: str | None) -> None:
    with serving(REQUEST) as (router, answers):
        worker = joining("u", "unified", router)
        uid = worker.hear(Submit).request.uid
        news = [*(Update(uid, prompt_rows=piece) for piece in told), Update(uid, [8]), Update(uid, [9], finish="stop")]
        worker.send(Updates(news, [uid]))
        if error is not None and "bytes" in error:
            assert worker.hear(Abort).uid == uid, "it goes on"
        worker.hear(Finish)
        worker.send(Bye({}))
        worker.close()
    line = answers[0].as_dict()
    if error is None:
        assert line["prompt_logprobs"] == [None, [(9, -0.25), (6, -2.0)], [(7, -0.5)]]
        assert line["prompt_token_ids"] == [5, 6, 7] and line["token_ids"] == [8, 9] and "error" not in line
    else:
        assert line["error"].startswith(f"the replica serving it {error}") and line["finish_reason"] == "error"
        assert line.keys().isdisjoint({"prompt_logprobs", "prompt_token_ids"})


def test_an_attempt_without_a_token_sends_all_rows_again_and_a_later_one_none() -> None:
    """The answer is that of an undisturbed request. The second attempt goes on, so that it is not given up."""
    request = msgspec.structs.replace(REQUEST, max_tokens=3)
    with serving(request) as (router, answers):
        first = joining("a", "decode", router)
        prefill = joining("p", "prefill", router)
        submit = first.hear(Submit)
        tracked = router._tracked[submit.request.uid]
        first.send(Updates([Update(submit.request.uid, prompt_rows=PIECES[0])], [submit.request.uid]))
        assert eventually(lambda: len(tracked.prompt_rows._data) == len(PIECES[0]))
        first.close()
        second = joining("b", "decode", router)
        submit = second.hear(Submit)
        assert submit.request == msgspec.structs.replace(request, uid=submit.request.uid)
        news = [
            *(Update(submit.request.uid, prompt_rows=piece) for piece in PIECES),
            Update(submit.request.uid, [8, 4]),
        ]
        second.send(Updates(news, [submit.request.uid]))
        assert eventually(lambda: tracked.stream.token_ids == [8, 4])
        second.close()
        third = joining("c", "decode", router)
        submit = third.hear(Submit)
        assert submit.request == Request(submit.request.uid, [5, 6, 7, 8, 4], 1, resumed=2)
        third.send(Updates([Update(submit.request.uid, [9], finish="length")], [submit.request.uid]))
        for worker in (third, prefill):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    assert answers[0].prompt_logprobs == [None, [(9, -0.25), (6, -2.0)], [(7, -0.5)]]
    assert answers[0].token_ids == [8, 4, 9] and answers[0].error is None
