"""The whole model on a GPU gives the same logits whichever library serves each op, in bf16 and with fp8 weights.

If a token's best and next experts nearly tie, any rounding may swap them, and its logits change by any amount. So the
tests use the MEDIAN over rows of logits of each row's relative error.
"""

import importlib
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.backend import choose
from kernels.fp8 import dequantize_128x128, quantize_128x128
from model.batch import Batch, Chunk
from model.config import ModelConfig, Rope
from model.kv_cache import make_pool
from model.layers import FP8
from model.precision import decide
from model.transformer import Transformer, op_shape
from parallel.dispatchers import plain_dispatchers
from parallel.mesh import Mesh
from parallel.placement import Placement

pytestmark = pytest.mark.gpu
V3_LIKE = ModelConfig(  # DeepSeek-V3's attention dims, everything else small
    vocab_size=1024, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    q_lora_rank=256, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, first_k_dense_replace=1,
    routed_scaling_factor=2.5, max_position_embeddings=2048, rope=Rope(factor=4, original_max_position=512),
)  # fmt: skip
LENGTHS = (1, 64, 65, 200, 333)
DEVICE = torch.device("cuda")


def fill(model: Transformer, generator: torch.Generator, fp8: bool) -> None:
    """Random weights. `fp8`: the projections' are block-quantised, and dequantised again where the model keeps none."""
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        if name.endswith("_scale_inv"):
            continue
        scale = 0.1 if "norm" in name or "bias" in name else weight.shape[-1] ** -0.5
        if "embed" in name:
            scale = 1.0
        value = torch.randn(weight.shape, generator=generator) * scale + ("norm" in name)
        if fp8 and "proj" in name:
            value, scales = quantize_128x128(value)
            if weight.dtype == FP8:
                parameters[f"{name}_scale_inv"].copy_(scales)
            else:
                value = dequantize_128x128(value, scales)
        weight.copy_(value)


def logits(
    config: ModelConfig, dtype: torch.dtype, forced: list[str], seed: int, kept: bool = False
) -> tuple[Tensor, set[str]]:
    """Prefill in chunks mixed with decodes, then a decode step, on random weights: all logits, one after the other.

    `config.fp8`: on the values of fp8 weights; `kept`: in fp8.
    """
    mesh = Mesh(device=DEVICE)
    ops, choices = choose(op_shape(config), dtype, mesh.device, forced)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, mesh.device)
    model = Transformer(config, mesh, placement, ops, dtype, 1024, kept)
    generator = torch.Generator().manual_seed(seed)
    fill(model, generator, config.fp8)
    pool = make_pool(config, 40, dtype, mesh.device).fill_(float("nan"))
    pool[:, 0] = 0  # the null page, where padding goes
    contiguous, masked = plain_dispatchers(mesh.ep, placement.num_slots, ops)
    tokens = [torch.randint(config.vocab_size, (n + 2,), generator=generator).tolist() for n in LENGTHS]
    pages, free = [], iter(torch.randperm(39, generator=generator).add(1).tolist())
    for n in LENGTHS:
        pages.append([next(free) for _ in range(-(-(n + 2) // 64))])
    whole = [Chunk(t[:n], 0, p) for t, n, p in zip(tokens, LENGTHS, pages, strict=True)]
    first_two, third = whole[:2], whole[2]
    out = [model(Batch.build([], first_two, mesh.device), pool, contiguous)]
    decodes = [Chunk(t[n : n + 1], n, p) for t, n, p in zip(tokens[:2], LENGTHS, pages, strict=False)]
    head = third._replace(token_ids=third.token_ids[:30], wants_logits=False)
    out.append(model(Batch.build(decodes, [head, *whole[3:]], mesh.device), pool, contiguous))
    tail = third._replace(token_ids=third.token_ids[30:], start=30)
    out.append(model(Batch.build([], [tail], mesh.device), pool, contiguous))
    last = [Chunk(t[n : n + 1], n, p) for t, n, p in zip(tokens[2:], LENGTHS[2:], pages[2:], strict=True)]
    last += [Chunk(t[n + 1 : n + 2], n + 1, p) for t, n, p in zip(tokens[:2], LENGTHS, pages, strict=False)]
    out.append(model(Batch.build(last, [], mesh.device, multiple=8), pool, masked))
    return torch.cat(out).float().cpu(), {choice.library for choice in choices}


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm(dim=1) / expected.norm(dim=1)).median().item()


BF16, ALL = torch.bfloat16, {"triton", "flash_mla", "deep_gemm"}
with suppress(Exception):  # it need not be there, and may fail in its own way
    importlib.import_module("flash_attn.cute")
    ALL.add("flash_attn")


@pytest.mark.parametrize(
    ("dtype", "fp8", "forced", "libraries", "tolerance"),
    [
        (torch.float32, False, ["triton"], {"triton"}, 1e-4),
        (BF16, False, ["triton"], {"triton"}, 0.05),
        (BF16, False, [], ALL, 0.05),
        (BF16, True, ["triton"], {"triton"}, 0.1),
        (BF16, True, [], ALL, 0.1),
    ],
)
def test_libraries_agree(dtype: torch.dtype, fp8: bool, forced: list[str], libraries: set, tolerance: float) -> None:
    """Held against float32 torch on the same weights; torch itself, in the same precision, is as far from that."""
    seed, config = torch.seed() % 2**31, replace(V3_LIKE, fp8=fp8)
    expected, _ = logits(config, torch.float32, ["torch"], seed)
    got, used = logits(config, dtype, forced, seed, fp8)
    assert used == libraries
    ours = error(got, expected)
    assert ours < tolerance, f"{ours=} {seed=}"
    if dtype == BF16:
        torchs = error(logits(config, dtype, ["torch"], seed, fp8)[0], expected)
        print(f"median relative error of the logits: {ours:.4f}; torch's in the same precision: {torchs:.4f}")
        assert ours < 1.5 * torchs + 0.005, f"{ours=} {torchs=} {seed=}"


def test_fp8_is_kept_here() -> None:
    assert decide(replace(V3_LIKE, fp8=True), 1, BF16, DEVICE) == (True, "kept, 1x128 activations")
