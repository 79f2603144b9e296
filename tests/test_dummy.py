"""Random weights depend on the configuration alone: any rank, job or move of experts makes the same numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ref
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.config import ModelConfig
from model.dummy import random_part, randomize
from model.kv_cache import make_pool
from model.layers import FP8
from model.transformer import Transformer
from model.weights import DummyWeights, load_weights
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from tests import hf
from tests.deployment import Deployment, read, run, timeless, write_lines
from tests.test_precision import WIDE
from tests.test_rebalance import generate, make, random_map, settle, work
from tests.worlds import run_world, sub_mesh

CPU = torch.device("cpu")


def load(config: ModelConfig, mesh: Mesh | None = None, kept: bool = False) -> Transformer:
    mesh = mesh or Mesh()
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size)
    model = Transformer(config, mesh, placement, Ops(), torch.bfloat16 if kept else torch.float32, 256, kept)
    load_weights(model, DummyWeights(config, CPU), mesh)
    return model


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2500), st.integers(1, 3), st.data())
def test_any_rows_are_those_of_the_whole(rows: int, columns: int, data: st.DataObject) -> None:
    whole = random_part("x_proj.weight", (rows, columns), (0, rows), "cpu")
    assert whole.shape == (rows, columns)
    first, end = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
    if first < end:
        assert torch.equal(random_part("x_proj.weight", (rows, columns), (first, end), "cpu"), whole[first:end])


def test_the_numbers_are_spread_as_they_say() -> None:
    shape, rows = (2048, 400), (0, 2048)
    one, other = (random_part(f"layers.{i}.up_proj.weight", shape, rows, "cpu") for i in range(2))
    assert one.std().item() == pytest.approx(400**-0.5, rel=0.01) and abs(one.mean().item()) < 1e-3
    assert not (one == other).any() and not (one[:1024] == one[1024:]).any()
    assert random_part("a_proj.weight", shape, rows, "cpu", unit=True).std().item() == pytest.approx(1, rel=0.01)
    assert (random_part("model.norm.weight", (5,), (1, 4), "cpu") == torch.ones(3)).all()
    assert (random_part("gate.e_score_correction_bias", (5,), (1, 4), "cpu") == torch.zeros(3)).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_a_rank_makes_its_own_share_of_what_one_rank_makes(fp8: bool) -> None:
    """Attention TP 2, experts over 2 ranks; in fp8 with the scales."""
    config = replace(ModelConfig.from_dict(WIDE), fp8=fp8)
    whole = dict(load(config, kept=fp8).named_parameters())
    ranks = [load(config, Mesh(r, 2, attn=Group(2, r), ep=Group(2, r)), fp8) for r in range(2)]
    shared = 0
    for name, want in whole.items():
        parts = [dict(rank.named_parameters())[name].view(torch.uint8) for rank in ranks]
        want = want.view(torch.uint8)
        halves = {torch.cat(parts), torch.cat(parts, -1)} if want.dim() > 1 else {torch.cat(parts)}
        if ".gate_up_proj" in name and "experts" not in name:  # gate's rows, then up's
            halves = {torch.cat([part.chunk(2)[half] for half in range(2) for part in parts])}
        same = all(torch.equal(part, want) for part in parts)
        shared += same
        assert same or any(half.shape == want.shape and torch.equal(half, want) for half in halves), name
    assert 0 < shared < len(whole)


def test_fp8_values_times_scales_are_the_dequantised_weights() -> None:
    config = replace(ModelConfig.from_dict(WIDE), fp8=True)
    kept, plain = (dict(load(config, kept=kept).named_parameters()) for kept in (True, False))
    for name, want in plain.items():
        got = kept[name]
        if got.dtype == FP8:
            got = ref.dequantize_128x128(got, kept[f"{name}_scale_inv"])
            assert want.std().item() == pytest.approx(want.shape[-1] ** -0.5, rel=0.05), name
        assert torch.equal(got, want if got.dtype == torch.float32 else want.bfloat16()), name


@torch.inference_mode()
def test_many_layers_keep_activations_finite_and_spread() -> None:
    config = replace(ModelConfig.from_dict(hf.BASE | {"model_type": "deepseek_v3"}), num_hidden_layers=40)
    model, pool = load(config), make_pool(config, 2, torch.float32, "cpu")
    batch = Batch.build([], [Chunk(list(range(60)), 0, [1])], "cpu")
    logits = model(batch, pool, hf.dispatchers(model)[0])
    assert logits.isfinite().all() and 0.3 < logits.std().item() < 3
    randomize(model)  # the benchmarks' law is the same
    again = model(batch, pool, hf.dispatchers(model)[0])
    assert again.isfinite().all() and 0.3 < again.std().item() < 3


def test_a_part_of_another_parameter_is_filled_with_it() -> None:
    """As vLLM keeps W_UV, transposed, inside kv_b_proj."""
    module = torch.nn.Module()
    module.whole = torch.nn.Parameter(torch.full((2 * 96, 512), torch.nan), requires_grad=False)
    part = module.whole.view(2, 96, 512)[:, 64:].transpose(1, 2)
    module.part = torch.nn.Parameter(part.detach(), requires_grad=False)
    randomize(module)
    assert module.part.untyped_storage().data_ptr() == module.whole.untyped_storage().data_ptr()
    assert torch.equal(module.whole, random_part("whole", (192, 512), (0, 192), "cpu"))


def body(rank: int, folder: Path) -> None:
    engine = make(folder, interval=0, load="dummy")
    alone = {replica: generate(engine, work(replica, 2, 8)) for replica in {rank, rank // 2}}
    for size, attn_tp, redundant, interval in ((4, 1, 0, 0), (4, 2, 0, 0), (2, 1, 4, 10**9)):
        mesh = sub_mesh(0, size, attn_tp)
        if mesh is None:
            continue
        engine = make(folder, mesh, redundant, interval, load="dummy")

        def ask(turn: int, engine: object = engine) -> None:
            if engine.rebalancer is not None and turn in (3, 9):
                engine.rebalancer.request(random_map(*engine.rebalancer.map.shape[:1], 32, 36, turn))

        assert generate(engine, work(mesh.replica, 2, 8), ask) == alone[mesh.replica], (size, attn_tp, interval)
        if interval:
            settle(engine)
            assert engine.rebalancer.stats["rebalances_total"] and not engine.rebalancer.stats["rebalance_failures"]
        engine.close()


def test_every_arrangement_of_ranks_gives_the_same_tokens(small: Path, tmp_path: Path) -> None:
    """One rank, four, attention TP, and experts that move: they are made anew where they arrive."""
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    run_world(4, body, tmp_path)


def test_disaggregated_jobs_give_the_same_tokens(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((small / name).read_text())
    prompts = write_lines(tmp_path / "prompts.jsonl")
    deployment = Deployment(folder, prompts, tmp_path / "out.jsonl")
    deployment.start_router()
    deployment.start_job("prefill", 1, "--load", "dummy")
    deployment.start_job("decode", 2, "--load", "dummy")
    for role, (code, _, err) in deployment.finish().items():
        assert code == 0 and "Traceback" not in err, f"{role}: {err}"
    code, _, err = run(
        "--model", str(folder), "--load", "dummy", "--input", str(prompts), "--output", str(tmp_path / "1")
    )
    assert code == 0 and timeless(read(deployment.out)) == timeless(read(tmp_path / "1")), err


def test_a_config_alone_is_served(small: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    source = tmp_path / "in.jsonl"
    rows = [{"prompt_token_ids": [7, 8, 9], "max_tokens": 3, "ignore_eos": True}, {"prompt": "Hi", "max_tokens": 2}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", str(tmp_path), "--input", str(source), "--output", str(tmp_path / "out.jsonl"))
    code, _, err = run(*flags, "--load", "dummy")
    assert code == 0 and " GB on rank 0, made in " in err and "Traceback" not in err, err
    first, second = read(tmp_path / "out.jsonl")
    assert (first["prompt_tokens"], len(first["token_ids"]), "error" in first) == (3, 3, False)
    assert "neither tokenizer.json nor tiktoken.model" in second["error"]


@pytest.mark.parametrize(
    "name, size, why",
    [
        ("num_hidden_layers", 2**31 - 1, "its sizes make a model of .* bytes in bf16"),
        ("num_hidden_layers", 2**20, "n_routed_experts 32 = 34,602,976; it must be at most 262,144"),
        ("vocab_size", 2**31 - 1, r"memory: the weights of one rank, .* embedding [\d.]+ .* GiB available to it"),
        ("n_routed_experts", 2**20, "num_hidden_layers 3 [+] 2 layers with experts x n_routed_experts 1048576 = "),
    ],
)
def test_sizes_that_no_memory_holds_are_refused(small: Path, tmp_path: Path, name: str, size: int, why: str) -> None:
    config = json.loads((small / "config.json").read_text()) | {name: size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=why):
        make(tmp_path, load="dummy")
