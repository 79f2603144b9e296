"""The engine on a GPU: decode in CUDA graphs gives exactly the tokens and log probabilities of decode without.

Prompts run as they are here: `test_gpu_prompt_graphs.py` has those in graphs.
"""

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from disagg.config import EngineConfig
from disagg.control.messages import Submit
from disagg.engine import Engine
from disagg.pipeline import Pipeline, Turn
from disagg.request import Request
from disagg.unified import Unified
from disagg.warm_up import warm_up
from kernels.backend import choose
from model.batch import Batch, Chunk
from model.dummy import randomize
from model.pages import pages_for
from model.prompt_logprobs import PromptLogprobs
from model.prompt_row import SLICE
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh
from parallel.placement import Placement
from tests.news import singly
from tests.test_gpu_model import V3_LIKE

pytestmark = pytest.mark.gpu
MESH = Mesh(device=torch.device("cuda"))


PROCESSED = {
    "min_p": 0.02,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.25,
    "logit_bias": {7: 3.0, 11: -100.0},
    "min_tokens": 40,  # so that no answer ends early
    "stop_token_ids": list(range(50)),
}


def requests(rng: random.Random) -> list[Request]:
    """Some change their logits in every way, and join steps of others that do not."""
    made: list[Request] = []
    for i, length in enumerate((1, 63, 64, 65, 200, 129, 31, 5, 90, 64)):
        warm = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "logprobs": 3} if i % 3 == 2 else {"logprobs": i % 2}
        warm |= PROCESSED if i in (3, 8, 9) else {}
        prompt = [rng.randrange(V3_LIKE.vocab_size) for _ in range(length)]
        made.append(Request(i, prompt, rng.randrange(1, 40), seed=i, ignore_eos=True, **warm))
    return made


def serve(engine: Engine, work: list[Request]) -> dict[int, tuple[list, list]]:
    """Tokens and log probabilities by request; a new request joins every third step. All ranks together."""
    role = Unified(engine)
    pipeline, answers = Pipeline(role, engine, engine.mesh), {r.uid: ([], []) for r in work}
    waiting, turns = list(work), 0
    while True:
        if waiting and turns % 3 == 0:
            role.handle(Submit(waiting.pop(0), None))
        busy, turns = pipeline.turn() == Turn.WORKED, turns + 1
        for update in singly(role.updates):
            assert update.error is None, update.error
            answers[update.uid][0].extend(update.tokens)
            answers[update.uid][1].extend(update.logprobs)
        role.updates.clear()
        if not busy and not any(left for (left,) in engine.mesh.agree(len(waiting))):
            break
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    return answers


def capture_no_prompts(engine: Engine) -> None:
    """Before the warm-up: let steps of prompts have as many rows as without graphs, so that they are rounded alike."""
    engine.captures = replace(engine.captures, prompts=())
    engine.prompt_graphs.sizes = ()


def experts_of(engine: Engine, work: list[Request]) -> dict[int, list[bytes]]:
    """The chosen experts of each request, token by token. A decode step of any of them runs no graph."""
    role, told = Unified(engine), {request.uid: b"" for request in work}
    pipeline = Pipeline(role, engine, engine.mesh)
    for request in work:
        role.handle(Submit(request, None))
    while pipeline.turn() == Turn.WORKED:
        for update in singly(role.updates):
            assert update.error is None, update.error
            told[update.uid] += update.experts
        role.updates.clear()
    size = engine.expert_bytes(1)
    return {uid: [data[at : at + size] for at in range(0, len(data), size)] for uid, data in told.items()}


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_chosen_experts_are_those_of_a_job_without_graphs(overlap: str) -> None:
    """One request asks, and joins steps of others that do not. Then these go on in graphs, with the same tokens."""
    seed = torch.seed() % 2**31
    work = requests(random.Random(seed))
    work[4] = msgspec.structs.replace(work[4], return_experts=True)
    ops, _ = choose(op_shape(V3_LIKE), torch.bfloat16, MESH.device, ["auto"])
    placement = Placement.identity(V3_LIKE.num_moe_layers, V3_LIKE.n_routed_experts, 1, MESH.device)
    model = Transformer(V3_LIKE, MESH, placement, ops, torch.bfloat16, 512, False)
    randomize(model)
    experts, answers = [], []
    for graphs in ("off", "auto"):
        engine = Engine(
            EngineConfig(6, 100, 2000, 512, graphs=graphs, overlap=overlap, prefix_cache="off"), model, MESH
        )
        capture_no_prompts(engine)
        warm_up(engine)
        assert bool(engine.graphs.captured) == (graphs == "auto"), "no graphs: the test shows nothing"
        experts.append(experts_of(engine, work))
        answers.append(serve(engine, work))
        engine.close()
    for request in work:
        rows = request.most_tokens - 1 if request.return_experts else 0
        assert len(experts[0][request.uid]) == rows, f"{seed=}"
    assert experts[0] == experts[1], f"{seed=}"
    assert not differences(answers[1], answers[0]), f"{seed=}"
    ids = np.frombuffer(b"".join(experts[0][work[4].uid]), "<u2").reshape(-1, V3_LIKE.num_experts_per_tok)
    assert ids.max() < V3_LIKE.n_routed_experts
    assert all(len(set(row)) == len(row) for row in ids.tolist()), "an expert twice"


def differences(got: dict[int, tuple[list, list]], expected: dict[int, tuple[list, list]]) -> list[str]:
    """Of each request's answers, the first token that is not as expected, by itself or in its log probabilities."""
    found = []
    for uid in expected:
        for what, mine, theirs in zip(("token", "log probabilities"), got[uid], expected[uid], strict=True):
            at = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
            if at is not None:
                found.append(f"request {uid}, {what} {at} of {len(theirs)}: {mine[at]}, not {theirs[at]}")
            elif len(mine) != len(theirs):
                found.append(f"request {uid}: {what} of {len(mine)}, not {len(theirs)}")
    return found


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_graphs_change_nothing(backend: str, overlap: str, fp8: bool) -> None:
    """Nor does doing it once more."""
    seed = torch.seed() % 2**31
    work = requests(random.Random(seed))
    config = replace(V3_LIKE, fp8=fp8)
    ops, _ = choose(op_shape(config), torch.bfloat16, MESH.device, [backend])
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, MESH.device)
    model = Transformer(config, MESH, placement, ops, torch.bfloat16, 512, fp8)
    randomize(model)
    answers = []
    for graphs in ("off", "auto"):
        settings = EngineConfig(6, 100, 2000, 512, graphs=graphs, overlap=overlap, prefix_cache="off")
        engine = Engine(settings, model, MESH)
        capture_no_prompts(engine)
        warm_up(engine)
        assert bool(engine.graphs.captured) == (graphs == "auto")
        answers.append(serve(engine, work))
        assert not differences(serve(engine, work), answers[-1]), f"again, {graphs=} {seed=}"
        engine.close()
    for request in work:
        assert len(answers[0][request.uid][0]) == request.max_tokens
    assert not differences(answers[1], answers[0]), f"{seed=}"


def test_a_prompts_log_probabilities_are_those_of_all_its_logits() -> None:
    """A slice of many rows and a last one of three, which another kernel serves. The head sees the same rows twice."""
    ops, _ = choose(op_shape(V3_LIKE), torch.bfloat16, MESH.device, ["auto"])
    placement = Placement.identity(V3_LIKE.num_moe_layers, V3_LIKE.n_routed_experts, 1, MESH.device)
    model = Transformer(V3_LIKE, MESH, placement, ops, torch.bfloat16, 512, False)
    randomize(model)
    engine = Engine(EngineConfig(6, 400, 2000, 512, graphs="off"), model, MESH)
    prompt = torch.randint(V3_LIKE.vocab_size, (SLICE + 4,)).tolist()
    whole = Chunk(prompt, 0, range(1, 1 + pages_for(len(prompt))))
    batch = replace(Batch.build([], [whole], MESH.device), logit_rows=None)
    logits = engine.model(batch, engine.pool, engine.dispatchers.contiguous)[:-1]
    targets = torch.tensor(prompt[1:], device=MESH.device)
    targets[::2] = logits.argmax(-1)[::2]  # so that half of them are the likeliest
    step = PromptLogprobs([whole._replace(targets=targets.tolist(), top=3)], MESH.device)
    again = engine.model(batch, engine.pool, engine.dispatchers.contiguous, scored=step)[:-1]
    assert torch.equal(again, logits), "the step itself is not the same twice"
    ids, bits = step.rows().unbind(1)
    values = bits.view(torch.float32)
    expected = logits.log_softmax(-1)
    assert torch.equal(ids[:, -1].long(), targets)
    torch.testing.assert_close(values, expected.gather(1, ids.long()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values[:, :-1], expected.topk(3)[0], rtol=1e-4, atol=1e-4)
    likeliest = ids[:, 0] == ids[:, -1]
    assert likeliest.sum() >= len(targets) // 2 - 3
    assert torch.equal(values[likeliest, 0], values[likeliest, -1]), "two floats for one token"
    engine.close()
