"""Steps of prompts in CUDA graphs on a GPU: exactly what the same padded steps give without, and the tokens of others.

A padded step may be rounded differently, because kernels choose their tiles by the number of rows. So in bf16 and fp8
a capture is compared with the same padded code, run again; and with steps as they are in float32.
"""

import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.request import Request
from disagg.warm_up import warm_up
from kernels.backend import choose
from model.batch import Batch
from model.dummy import randomize
from model.pages import NULL_PAGE
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh
from parallel.placement import Placement
from tests.rerun import captured
from tests.test_gpu_engine import differences, requests, serve
from tests.test_gpu_model import V3_LIKE
from tests.test_gpu_speculation import engine_of, parts_only_where_two_are_as_likely
from tests.test_prompt_graphs import chunks
from tests.test_speculation import all_kinds, prompts_of, same
from tests.test_speculation import serve as serve_all

pytestmark = pytest.mark.gpu
MESH = Mesh(device=torch.device("cuda"))
EVERY = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
BACKENDS = pytest.mark.parametrize("backend", ["triton", "auto"])


def make_model(backend: str, fp8: bool, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    config = replace(V3_LIKE, fp8=fp8)
    ops, _ = choose(op_shape(config), dtype, MESH.device, [backend])
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, MESH.device)
    model = Transformer(config, MESH, placement, ops, dtype, 1024, fp8)
    randomize(model)
    return model


def make_engine(model: Transformer, graphs: str) -> Engine:
    return Engine(EngineConfig(6, 300, 6000, 1024, graphs=graphs), model, MESH)


def answers(engine: Engine, work: list[Request]) -> list[dict[int, tuple[list, list]]]:
    """Each request alone, without output, and then with pages from the cache; and all of them, some beside others."""
    alone = [msgspec.structs.replace(request, max_tokens=1, min_tokens=0) for request in work]
    return [serve(engine, [request]) for request in alone * 2] + [serve(engine, work)]


@EVERY
@BACKENDS
def test_a_captured_step_gives_what_the_same_step_gives_uncaptured(backend: str, fp8: bool) -> None:
    seed = torch.seed() % 2**31
    work, model, found = requests(random.Random(seed)), make_model(backend, fp8), []
    for graphs in ("auto", "off"):
        engine = make_engine(model, graphs)
        if graphs == "auto":
            warm_up(engine)
            sizes = engine.captures.prompts
            assert {("prompts", size) for size in sizes} <= set(engine.graphs.captured)
        else:
            again = captured(engine, sizes)
        found.append(answers(engine, work))
        assert engine.graph_replays > 2 * len(work)
        engine.close()
    assert again.reruns["_layers"] >= 2 * len(work), "a step for each request alone"
    for mine, theirs in zip(*found, strict=True):
        assert not differences(mine, theirs), f"{seed=}"


@EVERY
@BACKENDS
def test_padding_changes_no_bit_whatever_it_holds(backend: str, fp8: bool) -> None:
    """NaN in the null page, and in the rows of an earlier step. And in a clean page, padding itself is finite."""
    model = make_model(backend, fp8)
    engine = make_engine(model, "auto")
    warm_up(engine)
    layers, contiguous = engine.prompt_graphs, engine.dispatchers.contiguous
    engine.pool[:, NULL_PAGE + 1 :] = torch.randn_like(engine.pool[:, NULL_PAGE + 1 :])
    before = engine.pool.clone()
    for spans in ([(0, 1)], [(0, 65)], [(0, 30), (0, 1), (0, 140)], [(130, 5), (0, 60), (64, 1)], [(700, 200)]):
        batch, found = Batch.build([], chunks(*spans, vocab=V3_LIKE.vocab_size), MESH.device), []
        for poison in (0.0, float("nan")):
            engine.pool.copy_(before)
            engine.pool[:, NULL_PAGE] = poison
            layers.hidden.fill_(float("nan"))
            replays = engine.graphs.replays
            hidden = layers.body(batch, contiguous)
            assert engine.graphs.replays == replays + 1 and hidden.isfinite().all(), spans
            found.append((hidden.clone(), engine.pool[:, NULL_PAGE + 1 :].clone()))
            if poison == 0:
                size = layers.size_of(batch)
                assert layers.hidden[: size.tokens].isfinite().all() and engine.pool.isfinite().all(), spans
        for clean, poisoned in zip(*found, strict=True):
            assert torch.equal(clean, poisoned), spans
        engine.pool.copy_(before)
        eager = model.body(batch, engine.pool, contiguous)
        apart = ((found[0][0].float() - eager.float()).norm(dim=1) / eager.float().norm(dim=1)).median()
        print(f"{spans}: padded rows and others part by {apart:.4f} (median)")
        assert apart < 0.05, spans
    engine.close()


@BACKENDS
def test_the_layers_of_a_step_of_prompts_never_wait_for_the_host(backend: str) -> None:
    model = make_model(backend, False)
    engine = make_engine(model, "off")
    batch = Batch.build([], chunks((0, 90), (64, 30), vocab=V3_LIKE.vocab_size), MESH.device)
    model.body(batch, engine.pool, engine.dispatchers.contiguous)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.body(batch, engine.pool, engine.dispatchers.contiguous)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.close()


@pytest.mark.parametrize("drafts", [0, 2])
def test_every_kind_of_request_gets_the_same_answer_in_float32(tiny: Path, drafts: int) -> None:
    found = []
    for graphs in ("off", "auto"):
        engine = engine_of(tiny, drafts, torch.float32, graphs, prompts=True)
        found.append(serve_all(engine, all_kinds(tiny))[0])
        for _ in range(2):  # alone, so that no step decodes beside prompts; and once more
            replays = engine.graphs.replays
            for request in all_kinds(tiny):
                found[-1] |= {request.uid + 100: serve_all(engine, [request])[0][request.uid]}
            assert (engine.graphs.replays > replays) == (graphs == "auto")
        engine.close()
    same(*found)


@pytest.mark.parametrize("drafts", [0, 2])
def test_in_bf16_tokens_part_only_where_two_are_as_likely(tiny: Path, drafts: int) -> None:
    work = [Request(i, p, 48, ignore_eos=True, logprobs=8) for i, p in enumerate(prompts_of(tiny))]
    found = []
    for graphs in ("off", "auto"):
        engine = engine_of(tiny, drafts, torch.bfloat16, graphs, prompts=True)
        found.append({request.uid: serve_all(engine, [request])[0][request.uid] for request in work})
        engine.close()
    parts_only_where_two_are_as_likely(*found)
