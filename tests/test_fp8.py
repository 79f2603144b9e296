"""Block-fp8 checkpoints: the format's round trip, and a dequantised model against its bf16 parent.

tests/test_precision.py tests the model that stays in fp8.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from disagg.front.tokenizer import load_tokenizer
from kernels import ref
from kernels.fp8 import dequantize_128x128, quantize_128x128
from kernels.groups import Groups
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.kv_cache import make_pool
from model.transformer import Transformer
from model.weights import load_weights
from parallel.dispatch import ContiguousAllToAll
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from scripts.tools.quantize import quantize_folder
from tests.deployment import run

TEXT = """Genesis 1

1 In the beginning God created the heaven and the earth.
2 And the earth was without form, and void; and darkness was upon the face of the deep. And the Spirit of God moved upon
the face of the waters.
3 And God said, Let there be light: and there was light."""


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fp8") / "tiny"
    quantize_folder(Path("model/tiny"), target)
    return target


def load(folder: Path, mesh: Mesh = Mesh()) -> Transformer:  # noqa: B008 (frozen)
    config = ModelConfig.from_pretrained(folder)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size)
    model = Transformer(config, mesh, placement, Ops(), torch.float32, 512)
    load_weights(model, open_checkpoint(folder, config), mesh)
    return model


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 64), (64, 300), (257, 129)])
def test_round_trip_is_within_the_format(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 2, shape[0])[:, None]
    quantised, scale = quantize_128x128(weight)
    assert quantised.dtype == torch.float8_e4m3fn and quantised.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128)) and scale.dtype == torch.float32
    error = (dequantize_128x128(quantised, scale) - weight).abs()
    step = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert (error <= (weight.abs() * 2**-4).maximum(step * 2**-10) * 1.001).all()  # 3 mantissa bits; subnormals


@pytest.mark.parametrize("shape", [(1, 128), (5, 1), (3, 4, 300), (0, 256)])
def test_activations_have_a_scale_for_each_row_and_128_columns(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    values, scale = ref.quantize_1x128(x)
    assert values.shape == shape and values.dtype == torch.float8_e4m3fn
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    error = (ref.dequantize_1x128(values, scale) - x).abs()
    step = scale.repeat_interleave(128, -1)[..., : shape[-1]]
    assert (error <= (x.abs() * 2**-4).maximum(step * 2**-10) * 1.001).all()


def test_products_of_quantised_operands_are_near_the_exact_ones() -> None:
    x, weight = torch.randn(3, 40, 256), torch.randn(3, 130, 256)
    (xq, xs), (wq, ws) = ref.quantize_1x128(x), quantize_128x128(weight)
    exact = x @ weight.transpose(1, 2)
    counts = torch.tensor([40, 0, 7], dtype=torch.int32)
    masked = ref.grouped_gemm_masked_fp8(xq, xs, wq, ws, counts)
    groups = Groups(torch.tensor([40, 40, 80], dtype=torch.int32), 1)
    rows, scales = xq.view(torch.uint8)[[0, 2]].view(torch.float8_e4m3fn).flatten(0, 1), xs[[0, 2]].flatten(0, 1)
    grouped = ref.grouped_gemm_contiguous_fp8(rows, scales, wq, ws, groups)
    for e, got in (
        (0, ref.gemm_fp8(xq[0], xs[0], wq[0], ws[0])),
        (0, masked[0]),
        (2, masked[2, :7]),
        (2, grouped[40:]),
    ):
        want = exact[e, : len(got)]
        assert 0.01 < (got - want).norm() / want.norm() < 0.06  # two operands with 3 mantissa bits each


def test_a_part_dequantises_as_in_the_whole() -> None:
    quantised, scale = quantize_128x128(torch.randn(300, 400))
    whole = dequantize_128x128(quantised, scale)
    assert torch.equal(dequantize_128x128(quantised[100:290, 130:], scale, 100, 130), whole[100:290, 130:])


def test_every_projection_and_nothing_else_is_in_fp8(fp8: Path) -> None:
    with safe_open(fp8 / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    quantised = {name for name, dtype in kinds.items() if dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in quantised} == {name for name in kinds if name.endswith("_scale_inv")}
    plain = {name for name in kinds if name not in quantised and not name.endswith("_scale_inv")}
    words = ("norm", "embed_tokens", "head", "mlp.gate.", "eh_proj")
    assert all(any(word in name for word in words) for name in plain)
    assert not any(word in name for name in quantised for word in words)
    assert "model.layers.3.self_attn.kv_a_proj_with_mqa.weight" in quantised


def test_every_weight_is_within_the_formats_error_of_its_parent(tiny: Path, fp8: Path) -> None:
    parents = dict(load(tiny).named_parameters())
    for name, weight in load(fp8).named_parameters():
        error = (weight - parents[name]).abs()
        if "proj" in name:
            assert 0.01 < error.norm() / parents[name].norm() < 0.04, name  # 3 mantissa bits
        else:
            assert not error.any(), name


def test_the_model_from_fp8_stays_close_to_its_parent(tiny: Path, fp8: Path) -> None:
    """On text of its own kind: the same loss, and next-token distributions a tenth of a nat apart.

    Not closer: the small model is sharp, and 2-3 % on every weight moves tokens to other experts.
    """
    ids = load_tokenizer(tiny).text(TEXT)

    def logprobs(folder: Path) -> torch.Tensor:
        model = load(folder)
        pool = make_pool(model.config, 4, torch.float32, "cpu")
        run = ContiguousAllToAll(Group(), model.config.n_routed_experts, Ops())
        batch = replace(Batch.build([], [Chunk(ids[:-1], 0, [1, 2, 3])], "cpu"), logit_rows=None)  # every row's
        return model(batch, pool, run).log_softmax(-1)

    parent, child = logprobs(tiny), logprobs(fp8)
    following = torch.tensor(ids[1:])[:, None]
    assert abs((parent - child).gather(1, following).mean()) < 0.05
    divergence = (parent.exp() * (parent - child)).sum(-1).mean()
    assert 0 < divergence < 0.15, divergence


def test_shards_of_fp8_tensors_are_the_parts_of_the_whole(fp8: Path) -> None:
    """A split that does not fall on a block's edge: heads of 48 rows, blocks of 128."""
    whole = dict(load(fp8).named_parameters())
    for rank in range(4):
        mesh = Mesh(rank, 4, attn=Group(4, rank), ep=Group(4, rank))
        parts = dict(load(fp8, mesh).named_parameters())
        name = "layers.2.self_attn.q_b_proj.weight"
        assert torch.equal(parts[name], whole[name].chunk(4)[rank])
        name = "layers.2.self_attn.o_proj.weight"
        assert torch.equal(parts[name], whole[name].chunk(4, dim=1)[rank])
        name = "layers.2.mlp.experts.down_proj"
        assert torch.equal(parts[name], whole[name].chunk(4)[rank])


@pytest.mark.parametrize("broken", ["missing", "misshapen", "of another format"])
def test_bad_scales_are_named(fp8: Path, tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(fp8, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.7.up_proj.weight_scale_inv"
    if broken == "missing":
        del tensors[name]
    elif broken == "misshapen":
        tensors[name] = tensors[name].repeat(2, 1)
    else:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = tensors[weight].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=name):
        load(folder)


def test_other_quantisations_are_refused(fp8: Path, tmp_path: Path) -> None:
    raw = json.loads((fp8 / "config.json").read_text())
    raw["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(ValueError, match=r"weight_block_size is \[64, 64\]; only \[128, 128\]"):
        ModelConfig.from_dict(raw)


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(fp8: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is in fp8 already"):
        quantize_folder(fp8, tmp_path / "again")
    with pytest.raises(ValueError, match="no such folder"):
        quantize_folder(tmp_path / "absent", tmp_path / "again")
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no safetensors file"):
        quantize_folder(broken, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (broken / "model.safetensors").write_text("text")
    with pytest.raises(ValueError, match=f"{broken}/model.safetensors: "):
        quantize_folder(broken, tmp_path / "again")


def test_the_start_up_says_what_becomes_of_fp8(tiny: Path, fp8: Path) -> None:
    flags = ("--prompt", "In the beginning", "--max-tokens", "1")
    code, _, err = run("--model", str(fp8), *flags)
    assert code == 0, err
    assert "fp8: dequantised to float32 (no GPU)\n" in err
    code, _, err = run("--model", str(tiny), *flags)
    assert code == 0 and "\nfp8:" not in err, err
