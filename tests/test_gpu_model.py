"""The whole model on a GPU gives the same logits whichever library serves each op, and the engine the CPU's tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.backend import choose
from model.batch import Batch, Chunk
from model.config import ModelConfig, Rope
from model.kv_cache import make_pool
from model.transformer import Transformer, op_shape
from parallel.dispatch import make_dispatchers
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


def logits(config: ModelConfig, dtype: torch.dtype, forced: list[str], seed: int) -> tuple[Tensor, set[str]]:
    """Prefill in chunks mixed with decodes, then a decode step, on random weights: all logits, one after the other."""
    mesh = Mesh(device=torch.device("cuda"))
    ops, choices = choose(op_shape(config), dtype, mesh.device, forced)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, mesh.device)
    model = Transformer(config, mesh, placement, ops, dtype, 1024)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        scale = 0.1 if "norm" in name or "bias" in name else weight.shape[-1] ** -0.5
        value = torch.randn(weight.shape, generator=generator) * scale + ("norm" in name)
        weight.copy_(value)
    pool = make_pool(config, 40, dtype, mesh.device).fill_(float("nan"))
    pool[:, 0] = 0  # the null page, where padding goes
    contiguous, masked = make_dispatchers(mesh.ep, placement.num_slots, ops)
    tokens = [torch.randint(config.vocab_size, (n + 2,), generator=generator).tolist() for n in LENGTHS]
    pages, free = [], iter(torch.randperm(39, generator=generator).add(1).tolist())
    for n in LENGTHS:
        pages.append([next(free) for _ in range(-(-(n + 2) // 64))])
    whole = [Chunk(t[:n], 0, p) for t, n, p in zip(tokens, LENGTHS, pages, strict=True)]
    first_two, third = whole[:2], whole[2]
    out = [model(Batch.build([], first_two, mesh.device), pool, contiguous)]
    decodes = [Chunk(t[n : n + 1], n, p) for t, n, p in zip(tokens[:2], LENGTHS, pages, strict=False)]
    head = replace(third, token_ids=third.token_ids[:30], wants_logits=False)
    out.append(model(Batch.build(decodes, [head, *whole[3:]], mesh.device), pool, contiguous))
    tail = replace(third, token_ids=third.token_ids[30:], start=30)
    out.append(model(Batch.build([], [tail], mesh.device), pool, contiguous))
    last = [Chunk(t[n : n + 1], n, p) for t, n, p in zip(tokens[2:], LENGTHS[2:], pages[2:], strict=True)]
    last += [Chunk(t[n + 1 : n + 2], n + 1, p) for t, n, p in zip(tokens[:2], LENGTHS, pages, strict=False)]
    out.append(model(Batch.build(last, [], mesh.device, multiple=8), pool, masked))
    return torch.cat(out).float().cpu(), {choice.library for choice in choices}


def median_error(got: Tensor, expected: Tensor) -> float:
    """Of the rows' relative errors: where two experts are nearly tied, rounding sends a token to the other one."""
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


@pytest.mark.parametrize(
    ("dtype", "forced", "libraries", "tolerance"),
    [
        (torch.float32, ["triton"], {"triton"}, 1e-4),
        (torch.bfloat16, ["triton"], {"triton"}, 0.05),
        (torch.bfloat16, [], {"triton", "flash_mla", "deep_gemm"}, 0.05),
    ],
)
def test_libraries_agree(dtype: torch.dtype, forced: list[str], libraries: set[str], tolerance: float) -> None:
    """Held against float32 torch; bf16 torch itself differs from that by as much as the others do."""
    seed = torch.seed() % 2**31
    expected, _ = logits(V3_LIKE, torch.float32, ["torch"], seed)
    got, used = logits(V3_LIKE, dtype, forced, seed)
    assert used == libraries
    error = median_error(got, expected)
    assert error < tolerance, f"{error=} {seed=}"
    if dtype == torch.bfloat16:
        torch_error = median_error(logits(V3_LIKE, dtype, ["torch"], seed)[0], expected)
        print(f"relative error of the logits: {error:.4f}; torch's in bf16: {torch_error:.4f}")
        assert error < 1.5 * torch_error, f"{error=} {torch_error=} {seed=}"
