"""The experts of an answer are those that transformers' gates choose for its tokens, in every arrangement of ranks.

The same world shows the other rows that an answer may carry: the log probabilities of its prompt.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from disagg.config import EngineConfig, Rebalance
from disagg.control.messages import (
    PIECE,
    PIECES,
    Abort,
    Bye,
    Finish,
    Submit,
    Tokens,
    Update,
    Updates,
    encode,
    in_messages,
    in_pieces,
)
from disagg.control.ports import MOST_BYTES, RouterPort
from disagg.engine import Engine
from disagg.front import router as router_module
from disagg.front.answer import Answer
from disagg.front.expert_rows import ExpertRows, RowShape
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.request import Request
from kernels.ops import Ops
from model.config import ModelConfig
from parallel.chosen_experts import Part
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from tests.clients import listed
from tests.test_router import HOST, SOON_S, joining
from tests.test_worlds import Jobs, answers_to, tokenizer_of
from tests.worlds import run_world, sub_mesh

SETTINGS = EngineConfig(max_batch=4, max_tokens_per_step=48, kv_tokens=1024, max_model_len=256)
EXTRA = 4  # redundant experts


def decoded(experts: dict[str, Any]) -> Tensor:
    """As docs/usage.md says."""
    assert experts.keys() == {"shape", "dtype", "data"} and experts["dtype"] == "uint16"
    ids = np.frombuffer(base64.b64decode(experts["data"]), "<u2").reshape(experts["shape"])
    return torch.from_numpy(ids.astype(np.int64))


TOPS = (3, 0, 20, 1, None, 2)  # prompt_logprobs


def requests(vocab_size: int) -> list[UserRequest]:
    """Chunked prompts, one token or none, sampling; one among them does not ask, and shares steps with the others."""
    generator, made = torch.Generator().manual_seed(0), []
    for i, (length, max_tokens) in enumerate(((65, 9), (1, 12), (130, 1), (20, 24), (100, 8), (49, 0))):
        prompt = torch.randint(vocab_size, (length,), generator=generator).tolist()
        more = {"temperature": 0.9} if i == 1 else {}
        more |= {"return_experts": i != 4, "prompt_logprobs": TOPS[i]}
        request = Request(0, prompt, max_tokens, seed=i, ignore_eos=True, **more)
        made.append(UserRequest(i, request, []))
    return made


class Leaving:
    """The interrupt of a job that leaves in the middle of a request. Without an engine it stays."""

    draining = False

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine, self.left = engine, False

    @property
    def seen(self) -> bool:
        if self.engine is not None:
            self.left |= any(
                5 < len(s.tokens) - s.prompt_len < s.request.max_tokens for s in self.engine.scheduler.running
            )
        return self.left


def body(rank: int, folder: Path, tokenizer: Path, out: Path) -> None:
    """Answer the requests in every arrangement. Rank 0 writes each answer's tokens, experts and error to `out`."""
    config, router_module.SUSPECT_S = ModelConfig.from_pretrained(folder), 0.0
    shape, users = RowShape(config.num_moe_layers, config.num_experts_per_tok), requests(config.vocab_size)
    found = {}

    def job(role: str, first: int, size: int, attn_tp: int, **changes: Any) -> tuple[str, Engine | None, Mesh | None]:
        mesh, settings = sub_mesh(first, size, attn_tp), replace(SETTINGS, **changes)
        engine = Engine.from_pretrained(settings, config, folder, mesh, Ops()) if mesh is not None else None
        return role, engine, mesh

    def run(name: str, jobs: Jobs, replicas: int = 0, leaves: Engine | None = None) -> None:
        interrupt = Leaving(leaves)
        answers = answers_to(users, jobs, tokenizer, interrupt, shape, replicas)
        assert interrupt.left == (leaves is not None), "it was over before: the test shows no retry"
        found[name] = [answers[i].as_dict() for i in sorted(answers)]
        for _, engine, _ in jobs:
            if engine is not None:
                engine.close()

    run("one rank", [job("unified", 0, 1, 1)])
    moving = {"redundant_experts": EXTRA, "overlap": "on", "rebalance": Rebalance(2, 1.0, 1)}
    jobs = [job("unified", 0, 4, 2, **moving)]
    run("four ranks, attention TP 2, overlap, moving experts", jobs)
    stats = jobs[0][1].stats()
    assert stats["rebalances_total"] > 1 and not stats["rebalance_failures"]
    run("prefill TP 2, decode TP 1", [job("prefill", 0, 2, 2), job("decode", 2, 2, 1)])
    jobs = [job("prefill", 0, 1, 1), job("decode", 1, 1, 1), job("decode", 2, 2, 2)]
    run("a decode job leaves", jobs, 3, leaves=jobs[1][1])
    if rank == 0:
        out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The checkpoint, and by arrangement the lines of the answers."""
    from tests import hf  # the ranks import this file, and need no transformers

    scratch = tmp_path_factory.mktemp("world")
    folder, out = hf.save(scratch / "model"), scratch / "answers.json"
    run_world(4, body, folder, tiny, out)
    arrangements = json.loads(out.read_text())
    assert len(arrangements) == 4
    return folder, arrangements


def test_they_are_those_of_transformers(world: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    from tests import hf

    folder, arrangements = world
    users = requests(hf.BASE["vocab_size"])
    for name, answers in arrangements.items():
        assert ["error" in answer for answer in answers] == [False] * len(users), name
        texts = [u.request.prompt + answer["token_ids"][:-1] for u, answer in zip(users, answers, strict=True)]
        for user, answer, theirs in zip(users, answers, hf.their_experts(folder, texts), strict=True):
            assert ("experts" in answer) == user.request.return_experts, (name, user.id)
            if "experts" in answer:
                assert torch.equal(decoded(answer["experts"]).sort(-1)[0], theirs.sort(-1)[0]), (name, user.id)


def test_a_prompts_log_probabilities_are_those_of_transformers(
    world: tuple[Path, dict[str, list[dict[str, Any]]]],
) -> None:
    """So are those of a request that went on elsewhere, and of one that generates nothing."""
    from tests import hf

    folder, arrangements = world
    users = requests(hf.BASE["vocab_size"])
    expected = hf.their_logprobs(folder, [user.request.prompt for user in users])
    for name, answers in arrangements.items():
        assert (answers[-1]["token_ids"], answers[-1]["text"], answers[-1]["finish_reason"]) == ([], "", "length")
        for user, answer, theirs in zip(users, answers, expected, strict=True):
            if user.request.prompt_logprobs is None:
                assert answer.keys().isdisjoint({"prompt_logprobs", "prompt_token_ids"})
            else:
                assert answer["prompt_token_ids"] == user.request.prompt
                check_prompt(answer["prompt_logprobs"], user.request, theirs, f"{name}, request {user.id}")


def check_prompt(rows: list, request: Request, theirs: Tensor, where: str = "") -> None:
    """Compare an answer's `prompt_logprobs` with theirs [prompt, V]: the k likeliest tokens, and the prompt's own."""
    top = request.prompt_logprobs
    assert top is not None and len(rows) == len(request.prompt) and rows[0] is None, where
    for row, token, logprobs in zip(rows[1:], request.prompt[1:], theirs[:-1], strict=True):
        ids, values = zip(*row, strict=True)
        assert len(set(ids)) == len(ids) and token in ids, where
        assert len(ids) == top if token in ids[:top] else ids[top:] == (token,), where
        assert torch.allclose(torch.tensor(values), logprobs[list(ids)], rtol=0, atol=1e-4), where
        assert torch.allclose(torch.tensor(values[:top]), logprobs.topk(top)[0], rtol=0, atol=1e-4), where


# One rank's choices.


def test_they_are_named_by_the_map_that_the_layer_used() -> None:
    """Two replicas of expert 2; then a map that moves them, for a later layer's step."""
    placement = Placement(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[2, 0, 1, 2], [1, 2, 2, 0]]), 1)
    part = Part(placement)
    part.add(0, torch.tensor([[3, 1], [2, 0], [-1, -1]]))
    placement.expert_of_slot[0] = torch.tensor([0, 1, 2, 0])
    part.add(1, torch.tensor([[3, 0], [1, 0], [-1, -1]]))
    assert part.rows(Group())[:2].tolist() == [[[2, 0], [0, 1]], [[1, 2], [2, 1]]]


def test_the_largest_expert_survives_its_sixteen_bits() -> None:
    part = Part(Placement(torch.zeros(1, 1), torch.tensor([[2**16 - 1, 2**15]]), 1))
    part.add(0, torch.tensor([[0, 1]]))
    assert part.rows(Group()).numpy().view(np.uint16).tolist() == [[[2**16 - 1, 2**15]]]


# Messages.


def test_nothing_is_sent_of_them_where_nobody_asks() -> None:
    for message in (Update(1, [2]), Submit(Request(1, [2], logprobs=1), None), Updates([Tokens({1: 2})], [3], [4])):
        assert b"experts" not in encode(message) and b"prompt_" not in encode(message)


@pytest.mark.parametrize("field", ["experts", "prompt_rows"])
@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECES * PIECE + 1])
def test_they_travel_in_order_in_messages_of_bounded_size(size: int, field: str) -> None:
    data = np.random.default_rng(0).bytes(size)
    updates = [Update(1, **{field: piece}) for piece in in_pieces(data)]
    news = Updates([Tokens({2: 3}), *updates, Update(1, [4])], [5], [6])
    messages = list(in_messages(news))
    assert len(messages) == max(1, -(-len(updates) // PIECES))
    assert all(len(encode(message)) < MOST_BYTES for message in messages)
    assert [update for message in messages for update in message.updates] == news.updates
    assert [message.begun + message.returned for message in messages] == [[5, 6]] + [[]] * (len(messages) - 1)
    assert b"".join(getattr(update, field) for update in updates) == data


# The router.


@contextmanager
def serving(folder: Path, request: Request, shape: RowShape) -> Iterator[tuple[Router, dict[int, Answer]]]:
    """A router with this request, and its answer."""
    router, answers = Router(RouterPort(HOST, 0), tokenizer_of(folder), 4096, lambda: False, 0, shape), {}
    work = listed([UserRequest("x", request, [])], answers.__setitem__)
    thread = threading.Thread(target=lambda: router.run(work), daemon=True)
    thread.start()
    yield router, answers
    thread.join(SOON_S)
    assert not thread.is_alive()
    router.port.close()


ROW = b"\1\0\2\0"  # of one token, with one MoE layer and two experts


@pytest.mark.parametrize(
    "told, error",
    [
        ([Update(0, experts=2 * ROW), Update(0, [7]), Update(0, experts=ROW), Update(0, [8], finish="length")], None),
        ([Update(0, experts=ROW[:1]), Update(0, experts=ROW[1:] + ROW), Update(0, [7], finish="stop")], None),
        ([Update(0, experts=ROW), Update(0, [7], finish="stop")], "sent 4 bytes of chosen experts, not 2 tokens x 1 "),
        ([Update(0, experts=3 * ROW), Update(0, [7], finish="stop")], "sent 12 bytes of chosen experts, not 2 tokens"),
        ([Update(0, experts=4 * ROW)], "sent chosen experts of more than 3 tokens"),
    ],
)
def test_a_replica_that_sends_the_wrong_number_is_not_believed(
    tiny: Path, told: list[Update], error: str | None
) -> None:
    with serving(tiny, Request(0, [5, 6], 2, return_experts=True), RowShape(1, 2)) as (router, answers):
        worker = joining("u", "unified", router)
        uid = worker.hear(Submit).request.uid
        worker.send(Updates([replace_uid(update, uid) for update in told], [uid]))
        if error is not None and "more than" in error:
            assert worker.hear(Abort).uid == uid
        worker.hear(Finish)
        worker.send(Bye({}))
        worker.close()
    answer = answers[0]
    if error is None:
        rows = 1 + len(answer.token_ids)
        assert decoded(answer.experts).tolist() == [[[1, 2]]] * rows and answer.error is None
    else:
        assert answer.error.startswith(f"the replica serving it {error}") and answer.finish_reason == "error"
        assert "experts" not in answer.as_dict()


def replace_uid(update: Update, uid: int) -> Update:
    return msgspec.structs.replace(update, uid=uid)


def test_an_answer_that_was_not_asked_for_them_has_none() -> None:
    answer = Answer("x", "t", [1], "stop", 1, 1, 0.5, 0.5)
    assert list(answer.as_dict()) == [
        "id", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "ttft_s", "latency_s",
        "cached_tokens",
    ]  # fmt: skip
    rows = ExpertRows(RowShape(58, 8), 0)
    with pytest.raises(ValueError, match="sent chosen experts of more than 0 tokens"):
        rows.add(b"1")
