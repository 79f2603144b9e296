"""Products alone, with any number of rows that a step may have: part of what the warm-up rehearses.

Libraries choose a product's kernel by its number of rows: blocks are such that the last of them nearly fill the GPU. A
step of prompts may have any number of tokens. So between two of the warm-up's sizes lie kernels that neither uses. To
run steps of all sizes would take long, and the products are all that differs.
"""

import torch

from disagg.engine import Engine
from disagg.memory import step_shape
from disagg.warm_up_progress import Shown
from kernels.fp8_format import BLOCK
from kernels.groups import Groups
from model.footprint import most_rows
from model.layers import FP8, Linear
from model.moe import Experts
from parallel.dispatch import Contiguous

ROWS = 64  # of the smallest block. Other blocks have a multiple of it


@torch.inference_mode()
def run_products(engine: Engine, tokens: int, progress: Shown) -> None:
    """Run the products of steps with up to `tokens` tokens whose kernels depend on the number of rows. They get zeros.

    No collective, and no product runs where none depends on it, as on a CPU.
    """
    model, dispatcher, device = engine.model, engine.dispatchers.contiguous, engine.mesh.device
    linears = {m.weight.shape: m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype == FP8}
    experts = {m.gate_up_proj.shape: m for m in model.modules() if isinstance(m, Experts)} if engine.ops.by_rows else {}
    alignment = engine.ops.alignment
    most = most_rows(step_shape(model, engine.mesh, engine.dispatchers), tokens)
    for sms in sorted({0, dispatcher.num_sms if engine.rule.in_prefill(tokens) else 0}):
        with engine.ops.leave_sms(sms):
            for rows in progress(numbers_of_rows(tokens), "products") if linears else ():
                for linear in linears.values():
                    linear(torch.zeros(rows, linear.weight.shape[1], dtype=model.dtype, device=device))
            for rows in progress(range(most, 0, -alignment), "products of experts") if experts else ():
                for layer in experts.values():
                    layer(lambda layer=layer, rows=rows: padding(layer, rows, alignment))


def numbers_of_rows(most: int) -> list[int]:
    """Return numbers of rows up to `most`, descending: for each number of blocks, with the last one full and not."""
    ends = range(ROWS, most + ROWS, ROWS)
    return sorted({max(1, min(rows, most)) for end in ends for rows in (end, end - 1)}, reverse=True)


def padding(experts: Experts, rows: int, alignment: int) -> Contiguous:
    """Return rows that are all padding, as dispatch groups them."""
    weight = experts.gate_up_proj
    hidden, device = weight.shape[2], weight.device
    scale = torch.ones(rows, -(-hidden // BLOCK), device=device) if weight.dtype == FP8 else None
    groups = Groups(torch.zeros(len(weight), dtype=torch.int32, device=device), alignment)
    return Contiguous(torch.zeros(rows, hidden, dtype=weight.dtype, device=device), groups, (), scale)
