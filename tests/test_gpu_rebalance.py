"""Experts move on a GPU while steps run in CUDA graphs.

On one rank the tokens and log probabilities stay exactly the same. Over NCCL, two ranks give the tokens of a CPU.
"""

import random
import re
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disagg.config import EngineConfig, Rebalance
from disagg.engine import Engine
from disagg.pipeline import Pipeline
from disagg.rebalance import Rebalancer
from disagg.unified import Unified
from disagg.warm_up import warm_up
from kernels.backend import choose
from kernels.ops import Ops
from model.checkpoint import checkpoint_table, open_checkpoint
from model.config import ModelConfig
from model.transformer import Transformer, op_shape
from model.weights import ExpertReader, load_weights
from parallel.load_counter import LoadCounter
from parallel.mesh import Mesh
from parallel.placement import Placement
from scripts.tools.quantize import quantize_tensors
from tests.commands import NO_GPU, run
from tests.deployment import read
from tests.test_gpu_engine import differences, requests, serve
from tests.test_gpu_model import V3_LIKE

pytestmark = pytest.mark.gpu
MESH = Mesh(device=torch.device("cuda"))
EXTRA = 4
TURNS = range(4, 60, 8)  # at which another map is asked for


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    tensors = {}
    for entry in checkpoint_table(config):
        value = torch.randn(entry.shape)
        if "norm" in entry.name or "bias" in entry.name:
            tensors[entry.name] = 0.1 * value + ("norm" in entry.name)
        else:
            tensors[entry.name] = value * (1 if "embed" in entry.name else entry.shape[1] ** -0.5)
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(quantize_tensors(tensors) if config.fp8 else tensors, folder / "model.safetensors")


def ask(engine: Engine, rng: random.Random) -> None:
    """Have maps asked for in the turns to come, as the ranks agree on a step."""
    vote, turns, rebalancer = engine.vote, count(), engine.rebalancer
    layers, slots = rebalancer.map.shape
    experts = engine.config.n_routed_experts

    def asked() -> int:
        if next(turns) in TURNS:
            rows = [[*range(experts), *rng.choices(range(experts), k=slots - experts)] for _ in range(layers)]
            for row in rows:
                rng.shuffle(row)
            rebalancer.request(torch.tensor(rows))
        return vote()

    engine.vote = asked


def check_what_arrives(folder: Path, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, fp8: bool, ops: Ops) -> None:
    """On the first of two ranks, alone, most experts come from the file: all that the loader gives for the new map."""
    layers, experts = config.num_moe_layers, config.n_routed_experts
    model = Transformer(config, mesh, Placement.identity(layers, experts, 2, mesh.device), ops, dtype, 64, fp8)
    load_weights(model, open_checkpoint(folder, config), mesh)
    model.load_counter = LoadCounter(model.placement, experts)
    rebalancer = Rebalancer(
        model, mesh, ExpertReader(open_checkpoint(folder, config), config), 10**9, layers_per_step=2
    )
    rebalancer.request(torch.stack([torch.randperm(experts) for _ in range(layers)]))
    while not rebalancer.idle or rebalancer.vote():
        rebalancer.advance((rebalancer.vote(),))
    rebalancer.close()
    assert rebalancer.stats["experts_staged"] >= layers
    expected = Transformer(
        config, mesh, Placement.of_map(rebalancer.map, experts, 2, device=mesh.device), ops, dtype, 64, fp8
    )
    load_weights(expected, open_checkpoint(folder, config), mesh)
    assert torch.equal(model.placement.slot_of_expert, expected.placement.slot_of_expert)
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name


def test_what_arrives_is_what_the_loader_gives(checkpoint: tuple[Path, ModelConfig]) -> None:
    folder, config = checkpoint
    ops, _ = choose(op_shape(config), torch.bfloat16, MESH.device, ["triton"])
    check_what_arrives(folder, config, MESH, torch.bfloat16, config.fp8, ops)


@pytest.fixture(params=[False, True], ids=["bf16", "fp8"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ModelConfig]:
    config = replace(V3_LIKE, fp8=request.param)
    write_checkpoint(tmp_path, config)
    return tmp_path, config


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_moving_changes_nothing(checkpoint: tuple[Path, ModelConfig], backend: str, overlap: str) -> None:
    folder, config = checkpoint
    rng = random.Random(torch.initial_seed())
    work = requests(rng)
    ops, _ = choose(op_shape(config), torch.bfloat16, MESH.device, [backend])
    settings = EngineConfig(
        6, 100, 2000, 512, overlap=overlap, redundant_experts=EXTRA, prefix_cache="off",
        rebalance=Rebalance(10**9, layers_per_step=1 + (overlap == "on")),
    )  # fmt: skip
    engine = Engine.from_pretrained(settings, config, folder, MESH, ops)
    assert engine.model.fp8 == config.fp8
    warm_up(engine)
    still = serve(engine, work)
    rebalancer = engine.rebalancer
    counted = rebalancer.counters[0].total()
    ask(engine, rng)
    assert not differences(serve(engine, work), still)
    assert rebalancer.stats["rebalances_total"] > 1 and not rebalancer.stats["rebalance_failures"]
    assert torch.equal(rebalancer.counters[0].total(), 2 * counted)
    pipeline = Pipeline(Unified(engine), engine, MESH)
    while not rebalancer.idle or rebalancer.vote():
        pipeline.turn()
    assert torch.equal(rebalancer.identity.cpu(), rebalancer.map)
    assert torch.equal(rebalancer.placement.expert_of_slot.cpu(), rebalancer.map)
    engine.close()


def tokens(path: Path) -> list[list[int]]:
    return [answer["token_ids"] for answer in read(path)]


@pytest.mark.parametrize(
    ("ranks", "redundant", "overlap"),
    [(2, "0", "off"), (2, "0", "on"), (2, "4", "off"), (2, "4", "on"), (4, "0", "on"), (4, "4", "off")],
)
def test_ranks_over_nccl(ranks: int, redundant: str, overlap: str, tmp_path: Path) -> None:
    common = ("--model", "model/tiny", "--input", "docs/prompts.jsonl", "--dtype", "float32", "--output")
    code, _, err = run(*common, str(tmp_path / "cpu"), env=NO_GPU)
    assert code == 0, err
    moving = ("--rebalance", "5,1,2", "--redundant-experts", redundant)
    where = ("--backend", "triton", "--overlap", overlap, "--kv-tokens", "65536")
    code, _, err = run(*common, str(tmp_path / "gpu"), *where, *moving, ranks=ranks, timeout=240)
    assert code == 0, err
    assert re.search(
        r"\]  rebalancing  unified: [1-9]\d* times in [\d.]+ s, balancedness 0\.\d+ \(layers .*\) at", err
    ), err
    assert "spare experts" in err
    assert tokens(tmp_path / "gpu") == tokens(tmp_path / "cpu")
