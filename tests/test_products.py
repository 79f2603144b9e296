"""Products alone, as part of the rehearsal: serving has none whose kernel may be another."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.products import ROWS, numbers_of_rows, run_products
from disagg.request import Request
from disagg.warm_up import most_prompt_tokens, run_beside, run_every_size
from disagg.warm_up_progress import silent
from kernels import ref
from kernels.ops import Ops
from model.config import ModelConfig
from model.dummy import randomize
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.placement import Placement
from tests.test_speculation import serve

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
    q_lora_rank=128, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    routed_scaling_factor=1.0, max_position_embeddings=512, fp8=True,
)  # fmt: skip


def recording(op: Callable, seen: set[tuple]) -> Callable:
    """An op that notes what may decide its kernel: the weight, the number of blocks, and whether the last is full."""

    def product(x: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.add((op.__name__, *weight.shape, -(-len(x) // ROWS), len(x) % ROWS == 0))
        return op(x, x_scale, weight, *rest)

    return product


def make_engine(seen: set[tuple], by_rows: bool = True) -> Engine:
    names = ("gemm_fp8", "grouped_gemm_contiguous_fp8")
    ops = Ops(**{name: recording(getattr(ref, name), seen) for name in names}, alignment=128, by_rows=by_rows)
    mesh = Mesh()
    placement = Placement.identity(CONFIG.num_moe_layers, CONFIG.n_routed_experts, 1, mesh.device)
    model = Transformer(CONFIG, mesh, placement, ops, torch.bfloat16, 512, True)
    randomize(model)
    settings = EngineConfig(max_batch=3, max_tokens_per_step=333, kv_tokens=4096, max_model_len=512)
    return Engine(settings, model, mesh)


def test_serving_has_no_product_that_the_rehearsal_has_not() -> None:
    seen: set[tuple] = set()
    engine = make_engine(seen)
    run_products(engine, most_prompt_tokens(engine), silent)
    run_beside(engine)
    run_every_size(engine)
    rehearsed, rng = set(seen), random.Random(0)
    seen.clear()
    lengths = [150, 129, 333, 192, 64, 300, 257, 20, 90]
    serve(engine, [Request(i, [rng.randrange(512) for _ in range(n)], 4) for i, n in enumerate(lengths)])
    assert {name for name, *_ in seen} == {"gemm_fp8", "grouped_gemm_contiguous_fp8"}
    assert seen <= rehearsed


def test_experts_whose_kernel_depends_on_no_rows_run_in_steps_alone() -> None:
    seen: set[tuple] = set()
    run_products(make_engine(seen, by_rows=False), 333, silent)
    assert {name for name, *_ in seen} == {"gemm_fp8"}


@pytest.mark.parametrize("most", [1, 64, 65, 127, 1000])
def test_every_number_of_blocks_is_there_full_and_not(most: int) -> None:
    def kind(rows: int) -> tuple[int, bool]:
        return -(-rows // ROWS), rows % ROWS == 0

    rows = numbers_of_rows(most)
    assert {kind(n) for n in rows} == {kind(n) for n in range(1, most + 1)} and max(rows) == most
