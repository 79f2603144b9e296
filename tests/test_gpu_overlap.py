"""Two-batch overlap on a GPU that ranks share, over NCCL and over DeepEP.

Two micro-batches in turns equal the same two one after the other, bit for bit, and an uncut batch within bf16's
rounding. Every rank has other work: prompts, a prompt that is cut, one token (so a half is empty), or nothing.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import choose
from model.batch import Batch, Chunk, split
from model.block import Residual
from model.kv_cache import make_pool
from model.transformer import Transformer, op_shape
from parallel.dispatchers import Dispatcher, make_dispatchers
from parallel.mesh import Group, Mesh
from parallel.overlap import run
from parallel.placement import Placement
from tests.test_gpu_deepep import fill
from tests.test_gpu_model import V3_LIKE
from tests.test_overlap import KINDS, PAGES, chunks
from tests.worlds import run_world

pytestmark = pytest.mark.gpu
CONFIG = replace(V3_LIKE, hidden_size=2048)  # one that DeepEP serves
DEVICE, ROWS = torch.device("cuda"), 8
FAR = 0.05  # median relative error of a row of logits: another size of product rounds otherwise


def filled_pool() -> Tensor:
    pool = make_pool(CONFIG, PAGES, torch.bfloat16, DEVICE)
    pool[:, 1:] = torch.randn(pool[:, 1:].shape, generator=torch.Generator().manual_seed(1)).to(pool)
    return pool


def check(model: Transformer, dispatcher: Dispatcher, decodes: list[Chunk], prefills: list[Chunk], what: str) -> None:
    whole = Batch.build(decodes, prefills, DEVICE)
    halves = tuple(Batch.build(*half, DEVICE) for half in split(decodes, prefills))
    pools = [filled_pool() for _ in range(3)]
    in_turns, uncut = model(whole, pools[0], dispatcher, halves), model(whole, pools[1], dispatcher)
    planned, residual = model.planned(whole), Residual(model.embed_tokens(whole.token_ids))
    if not prefills:
        model.dense_layers([(residual, planned)], pools[2])
    parts = list(zip(residual.cut(halves[0].num_tokens), map(model.planned, halves), strict=True))
    if prefills:
        model.dense_layers(parts, pools[2])
    out = [run(model.moe_steps(part, half, pools[2], dispatcher)) for part, half in parts]
    assert torch.equal(in_turns, model.head(torch.cat(out), planned)), what
    assert torch.equal(pools[0][:, 1:], pools[2][:, 1:]), what
    if len(uncut):
        rows = (in_turns - uncut).norm(dim=1) / uncut.norm(dim=1)
        assert rows.median() < FAR, f"{what}: {rows=}"


@torch.inference_mode()
def body(rank: int, size: int, seed: int) -> None:
    group = Group(size, rank, dist.group.WORLD) if size > 1 else Group()
    mesh = Mesh(rank, size, DEVICE, Group(), group)
    ops, _ = choose(op_shape(CONFIG), torch.bfloat16, DEVICE, ["triton"])
    placement = Placement.identity(CONFIG.num_moe_layers, CONFIG.n_routed_experts, size, DEVICE)
    model = Transformer(CONFIG, mesh, placement, ops, torch.bfloat16, 512)
    fill(model, size, rank, seed)
    for choice in ("all_to_all", "deepep")[: min(size, 2)]:
        dispatchers = make_dispatchers(
            choice, mesh, ops, torch.bfloat16, num_slots=placement.num_slots, hidden=CONFIG.hidden_size,
            top_k=CONFIG.num_experts_per_tok, capacity=ROWS,
        )  # fmt: skip
        for i in range(len(KINDS)):
            kind = KINDS[(i + rank) % len(KINDS)]
            check(model, dispatchers.contiguous, *chunks(kind), f"{choice}, {rank=}, {kind}")
        for count in (5, 1, 0):
            mine = count if rank % 2 else 5 - count
            check(model, dispatchers.masked, as_many_rows(mine), [], f"{choice}, {rank=}, {mine} decodes")
        torch.cuda.synchronize()
        dispatchers.close()


def as_many_rows(count: int) -> list[Chunk]:
    """On every rank, for the masked all-to-all."""
    return chunks("decodes")[0][:count] + [Chunk((0,), 0, (), wants_logits=False)] * (ROWS - count)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_turns_is_one_after_the_other(size: int) -> None:
    run_world(size, body, size, torch.initial_seed() % 2**31, timeout_s=280, device="cuda")
