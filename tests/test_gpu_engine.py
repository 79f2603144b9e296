"""The engine on a GPU: decode in CUDA graphs gives the very tokens and log probabilities that it gives without."""

import random

import pytest
import torch

from disagg.control import Submit
from disagg.engine import Engine, EngineConfig
from disagg.request import Request
from disagg.unified import Unified
from disagg.worker import Pipeline
from kernels.backend import choose
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh
from parallel.placement import Placement
from scripts.shapes import randomize
from tests.test_gpu_model import V3_LIKE

pytestmark = pytest.mark.gpu
MESH = Mesh(device=torch.device("cuda"))


def requests(rng: random.Random) -> list[Request]:
    made = []
    for i, length in enumerate((1, 63, 64, 65, 200, 129, 31, 5, 90, 64)):
        warm = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "logprobs": 3} if i % 3 == 2 else {"logprobs": i % 2}
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
        busy, turns = pipeline.turn(), turns + 1
        for update in role.updates:
            assert update.error is None, update.error
            answers[update.uid][0].extend(update.tokens)
            answers[update.uid][1].extend(update.logprobs)
        role.updates.clear()
        if not busy and not any(left for (left,) in engine.mesh.agree(len(waiting))):
            break
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.capacity
    return answers


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_graphs_change_nothing(backend: str, overlap: str) -> None:
    seed = torch.seed() % 2**31
    work = requests(random.Random(seed))
    ops, _ = choose(op_shape(V3_LIKE), torch.bfloat16, MESH.device, [backend])
    placement = Placement.identity(V3_LIKE.num_moe_layers, V3_LIKE.n_routed_experts, 1, MESH.device)
    model = Transformer(V3_LIKE, MESH, placement, ops, torch.bfloat16, 512)
    randomize(model)
    answers = []
    for graphs in (False, True):
        settings = EngineConfig(6, 100, 2000, 512, graphs=graphs, overlap=overlap)
        engine = Engine(settings, model, MESH)
        engine.warm_up(list)
        answers.append(serve(engine, work))
        engine.close()
    for request in work:
        assert len(answers[0][request.uid][0]) == request.max_tokens
        assert answers[0][request.uid] == answers[1][request.uid], f"{request.uid=} {seed=}"
