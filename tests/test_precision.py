"""Weights that stay in fp8: where that is possible, what the layers compute, and that values are the checkpoint's."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import ref
from kernels.fp8 import quantize_128x128
from kernels.groups import Groups
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.checkpoint import checkpoint_table, open_checkpoint
from model.config import ModelConfig
from model.ffn import FFN
from model.kv_cache import make_pool
from model.layers import FP8, Linear
from model.moe import Experts
from model.precision import decide
from model.transformer import Transformer
from model.weights import load_weights
from parallel.dispatch import Contiguous, ContiguousAllToAll, Masked, MaskedAllToAll
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from scripts.tools.quantize import quantize_folder
from tests.worlds import run_world, sub_mesh

WIDE = {  # every share is whole blocks of 128, with attention TP 2 too; kv_dim 192 is one and a half
    "model_type": "deepseek_v3", "vocab_size": 160, "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 128, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
    "q_lora_rank": 128, "kv_lora_rank": 160, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 16, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    q_lora_rank=1536, n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3, fp8=True,
)  # fmt: skip
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose products are about as large as their inputs, and small beside the embedding: errors add
    up, but do not grow."""
    folder = tmp_path_factory.mktemp("fp8")
    parent, generator = folder / "parent", torch.Generator().manual_seed(0)
    parent.mkdir()
    (parent / "config.json").write_text(json.dumps(WIDE))
    tensors = {}
    for entry in checkpoint_table(ModelConfig.from_pretrained(parent)):
        value = torch.randn(entry.shape, generator=generator)
        if "norm" in entry.name or "bias" in entry.name:
            tensors[entry.name] = 0.1 * value + ("norm" in entry.name)
        else:
            tensors[entry.name] = value * (3 if "embed" in entry.name else entry.shape[1] ** -0.5)
    save_file(tensors, parent / "model.safetensors")
    quantize_folder(parent, folder / "model")
    return folder / "model"


def load(
    folder: Path, kept: bool, mesh: Mesh | None = None, placement: Placement | None = None, ops: Ops | None = None
) -> Transformer:
    """The model of an fp8 checkpoint: kept in fp8 with bf16 around it, or dequantised to float32."""
    mesh, config = mesh or Mesh(), ModelConfig.from_pretrained(folder)
    placement = placement or Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size)
    dtype = torch.bfloat16 if kept else torch.float32
    model = Transformer(config, mesh, placement, ops or Ops(), dtype, 256, fp8=kept)
    load_weights(model, open_checkpoint(folder, config), mesh)
    return model


@pytest.mark.parametrize(("capability", "attn_tp"), [((9, 0), 1), ((9, 0), 8), ((10, 0), 16)])
def test_fp8_is_kept(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], attn_tp: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert decide(V3, attn_tp, torch.bfloat16, GPU) == (True, "kept, 1x128 activations")
    assert decide(replace(V3, fp8=False), attn_tp, torch.bfloat16, GPU) == (False, "the checkpoint has none")


@pytest.mark.parametrize(
    ("changes", "attn_tp", "why"),
    [
        ({"moe_intermediate_size": 32}, 1, "moe_intermediate_size % 128 must be 0, not 32 % 128 = 32"),
        ({"hidden_size": 200}, 1, "hidden_size % 128 must be 0, not 200 % 128 = 72"),
        ({"q_lora_rank": 100}, 1, "q_lora_rank % 128 must be 0, not 100 % 128 = 100"),
        ({"kv_lora_rank": 500}, 1, "kv_lora_rank + qk_rope_head_dim % 64 must be 0, not 564 % 64 = 52"),
        ({}, 128, "num_attention_heads * qk_head_dim / attn-tp % 128 must be 0, not 192 % 128 = 64"),
        ({"intermediate_size": 128}, 2, "intermediate_size / attn-tp % 128 must be 0, not 64 % 128 = 64"),
        ({"v_head_dim": 1}, 2, "num_attention_heads * v_head_dim / attn-tp % 128 must be 0, not 64 % 128 = 64"),
    ],
)
def test_fp8_needs_whole_blocks(monkeypatch: pytest.MonkeyPatch, changes: dict, attn_tp: int, why: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = replace(V3, **changes)
    assert decide(config, attn_tp, torch.bfloat16, GPU) == (False, f"dequantised to bfloat16 ({why})")
    mesh = Mesh(size=attn_tp, attn=Group(attn_tp), ep=Group(attn_tp))
    with pytest.raises(ValueError) as error:
        Transformer(config, mesh, Placement.identity(58, 256, 1), Ops(), torch.bfloat16, 64, fp8=True)
    assert str(error.value) == f"fp8: {why}"


def test_fp8_needs_hopper_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(V3, 1, torch.float32, CPU) == (False, "dequantised to float32 (no GPU)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    why = "dequantised to bfloat16 (compute capability must be at least 9.0, not 8.9)"
    assert decide(V3, 1, torch.bfloat16, GPU) == (False, why)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    why = "dequantised to float32 (activations must be bfloat16, not float32)"
    assert decide(V3, 1, torch.float32, GPU) == (False, why)


def meshes() -> Iterator[tuple[Mesh, Placement | None]]:
    yield Mesh(), None
    for rank in range(2):
        yield Mesh(rank, 2, attn=Group(2, rank), ep=Group(2, rank)), None
    tables = torch.stack([torch.cat((torch.randperm(16), torch.tensor([3, 7, 7, 1]))) for _ in range(2)])
    for rank in range(4):  # replicas, and another order in each layer
        yield Mesh(rank, 4, ep=Group(4, rank)), replace(Placement.identity(2, 16, 4), expert_of_slot=tables)


def test_weights_and_scales_are_the_checkpoints(fp8: Path) -> None:
    """Dequantising what was kept gives what is dequantised while loading, bit for bit, on every rank and slot."""
    for mesh, placement in meshes():
        kept = dict(load(fp8, True, mesh, placement).named_parameters())
        plain = dict(load(fp8, False, mesh, placement).named_parameters())
        assert {name.removesuffix("_scale_inv") for name in kept} == plain.keys()
        projections = {name for name in plain if "proj" in name and "kv_b_proj" not in name}
        assert {name for name, value in kept.items() if value.dtype == FP8} == projections
        for name, want in plain.items():
            if name in projections:
                got = ref.dequantize_128x128(kept[name], kept[f"{name}_scale_inv"])
            else:
                want, got = want if "correction_bias" in name else want.bfloat16(), kept[name]
            assert torch.equal(got, want), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("kept", [True, False])
def test_scales_of_any_format_are_float32_once_loaded(
    fp8: Path, tmp_path: Path, dtype: torch.dtype, kept: bool
) -> None:
    """Powers of two, as DeepSeek-V3.1 stores them (scale_fmt ue8m0), are the same numbers in each."""
    models = []
    for kind in (torch.float32, dtype):
        folder = shutil.copytree(fp8, tmp_path / str(kind))
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = torch.exp2(tensors[name].log2().ceil()).to(kind)
        save_file(tensors, folder / "model.safetensors")
        models.append(dict(load(folder, kept).named_parameters()))
    for name, want in models[0].items():
        got = models[1][name]
        assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name
    assert not kept or {value.dtype for name, value in models[1].items() if "scale" in name} == {torch.float32}


def test_a_plain_tensor_in_an_fp8_checkpoint_is_refused(fp8: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fp8, tmp_path / "model")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.7.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors")
    for kept in (True, False):
        with pytest.raises(ValueError, match=f"{name} is in torch.bfloat16, but there is a {name}_scale_inv"):
            load(folder, kept)
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is in torch.bfloat16, not in fp8 as config.json says"):
        load(folder, True)
    load(folder, False)


def fake_quant(x: Tensor) -> Tensor:
    """x as its 1x128 quantisation stands for it, group by group, in float64."""
    out = x.double()
    for row in out.view(-1, x.shape[-1]):
        for start in range(0, len(row), 128):
            group = row[start : start + 128]
            scale = max(group.abs().max().item(), 1e-4) / 448
            group.copy_((group / scale).float().to(FP8).double() * scale)
    return out


def expanded(weight: Tensor, scale: Tensor) -> Tensor:
    """A block-fp8 weight [N, D] in float64."""
    rows, columns = weight.shape
    return weight.double() * torch.kron(scale.double(), torch.ones(128, 128))[:rows, :columns]


def fill(layer: torch.nn.Module) -> None:
    """Random blocks, each of its own size."""
    for name, parameter in layer.named_parameters():
        if parameter.dtype == FP8:
            weight = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
            sizes = torch.rand(layer.get_parameter(f"{name}_scale_inv").shape) + 0.5
            sizes = sizes.repeat_interleave(128, -1).repeat_interleave(128, -2)
            values, scale = quantize_128x128(weight * sizes[..., : weight.shape[-2], : weight.shape[-1]])
            parameter.copy_(values)
            layer.get_parameter(f"{name}_scale_inv").copy_(scale)


def close(got: Tensor, want: Tensor) -> None:
    """To bf16 rounding, with a little room for an fp8 value on its rounding's edge."""
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize(("num_in", "num_out"), [(256, 192), (128, 384), (384, 128)])
def test_linear_equals_a_fake_quant_product(num_in: int, num_out: int) -> None:
    linear = Linear(num_in, num_out, Ops(), FP8, "cpu")
    assert linear.weight_scale_inv.shape == (-(-num_out // 128), num_in // 128)
    fill(linear)
    x = (torch.randn(9, num_in) * torch.logspace(-3, 3, 9)[:, None]).bfloat16()
    out = linear(x)
    close(out, fake_quant(x) @ expanded(linear.weight, linear.weight_scale_inv).T)
    assert torch.equal(linear(ref.quantize_1x128(x)), out)
    assert linear(x[:0]).shape == (0, num_out)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, D] bf16; the middle passes through bf16 once, as the product's output, and through fp8."""
    gate, up = (fake_quant(x) @ gate_up.T).bfloat16().double().chunk(2, -1)
    return fake_quant((F.silu(gate) * up).float()) @ down.T


def test_ffn_equals_a_fake_quant_one() -> None:
    ffn, x = FFN(256, 384, Ops(), FP8, "cpu"), torch.randn(7, 256).bfloat16()
    fill(ffn)
    gate_up, down = (expanded(p.weight, p.weight_scale_inv) for p in (ffn.gate_up_proj, ffn.down_proj))
    close(ffn(x), swiglu(x, gate_up, down))
    assert torch.equal(ffn(ref.quantize_1x128(x)), ffn(x))


def test_experts_equal_fake_quant_ones() -> None:
    config = replace(V3, hidden_size=256, moe_intermediate_size=128)
    experts = Experts(config, 3, Ops(), FP8, "cpu")
    assert experts.gate_up_proj_scale_inv.shape == (3, 2, 2) and experts.down_proj_scale_inv.shape == (3, 2, 1)
    fill(experts)
    counts, x = [5, 0, 2], torch.randn(3, 5, 256).bfloat16()
    values, scale = ref.quantize_1x128(x)
    masked = experts(lambda: Masked(values, torch.tensor(counts, dtype=torch.int32), (), scale))[0]
    real = torch.arange(5) < torch.tensor(counts)[:, None]
    rows, row_scale = values.view(torch.uint8)[real].view(FP8), scale[real]
    groups = Groups(torch.tensor(counts, dtype=torch.int32).cumsum(0), 1)
    contiguous = experts(lambda: Contiguous(rows, groups, (), row_scale))[0]
    nothing = Contiguous(rows[:0], Groups(torch.zeros(3, dtype=torch.int32), 1), (), row_scale[:0])
    assert experts(lambda: nothing)[0].shape == (0, 256)
    for e, count in enumerate(counts):
        gate_up = expanded(experts.gate_up_proj[e], experts.gate_up_proj_scale_inv[e])
        down = expanded(experts.down_proj[e], experts.down_proj_scale_inv[e])
        want = swiglu(x[e, :count], gate_up, down)
        close(masked[e, :count], want)
        close(contiguous[groups.of_rows(len(rows)) == e], want)


LENGTHS = (1, 64, 65, 30)


def logits(model: Transformer, mesh: Mesh | None = None) -> Tensor:
    """Whole prompts, then one decode each: [2 * prompts, V]."""
    mesh = mesh or Mesh()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(160, (n + 1,), generator=generator).tolist() for n in LENGTHS]
    pool = make_pool(model.config, 9, model.dtype, "cpu")
    slots, ops = model.placement.num_slots, Ops()
    pages = [[2 * i + 1, 2 * i + 2] for i in range(len(LENGTHS))]
    prompts = [Chunk(t[:n], 0, p) for t, n, p in zip(texts, LENGTHS, pages, strict=True)]
    decodes = [Chunk(t[n:], n, p) for t, n, p in zip(texts, LENGTHS, pages, strict=True)]
    several = mesh.attn.size
    first = model(Batch.build([], prompts, "cpu", several), pool, ContiguousAllToAll(mesh.ep, slots, ops))
    second = model(Batch.build(decodes, [], "cpu", several), pool, MaskedAllToAll(mesh.ep, slots, ops))
    return torch.cat((first, second))


def error(got: Tensor, want: Tensor) -> float:
    """Median over rows of the relative error: a row whose nearly tied experts swap may be off by any amount."""
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).median().item()


def test_the_model_in_fp8_is_near_the_dequantised_one(fp8: Path) -> None:
    """The same weights in float32: each fp8 input is 2-3 % off, beside a residual stream that is not."""
    assert 0.01 < error(logits(load(fp8, True)), logits(load(fp8, False))) < 0.06


def test_one_quantisation_feeds_all_that_share_an_input(fp8: Path) -> None:
    inputs = []

    def counted(op: Callable) -> Callable:
        def call(x: Tensor, *rest: object, **more: object) -> tuple[Tensor, ...]:
            inputs.append(x.shape[1])
            return op(x, *rest, **more)

        return call

    names = ("quantize_1x128", "rms_norm_quant", "add_rms_norm_quant")
    model = load(fp8, True, ops=replace(Ops(), **{name: counted(getattr(ref, name)) for name in names}))
    with torch.inference_mode():
        logits(model)
    attention = [256, 128]  # qkv_a_proj; q_b_proj; o_proj's input is cast by the op that makes it
    assert inputs == [*attention, 256] * 3 * 2  # and dense, MoE, MoE; prefill, decode


def world(rank: int, folder: Path) -> None:
    exact = logits(load(folder, False))
    alone = error(logits(load(folder, True)), exact)
    for size, attn_tp in ((2, 1), (2, 2), (4, 1), (4, 2)):
        mesh = sub_mesh(0, size, attn_tp)
        if mesh is not None:
            got = error(logits(load(folder, True, mesh), mesh), exact)
            assert got < 1.5 * alone, f"{size} ranks, attention TP {attn_tp}: {got}, alone {alone}"


def test_any_number_of_ranks_is_as_near(fp8: Path) -> None:
    """Not equal: a sum that bf16 rounds elsewhere may be another fp8 value, 6 % away."""
    run_world(4, world, fp8)
