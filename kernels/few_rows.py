"""Products in which the weight's rows are the tensor core's left operand: for few rows of x, as in a decode step.

The left operand has at least 64 rows. With x there, most of its rows would be padding, and loaded for nothing. Reading
the weights is all that such a product costs. Its programs leave room in their SMs, where another stream's may run.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm import block_descriptor, num_sms
from kernels.pdl import after_previous, pdl


class Tile(NamedTuple):
    """The output block of one program."""

    rows: int  # at least 16
    columns: int
    stages: int  # steps of D loaded ahead


# Of the experts' products, two programs fit an SM, and 80 KiB stay free: room for one program of `ffn_of_few_rows`.
GATED, PLAIN = Tile(16, 64, 4), Tile(16, 128, 4)  # either has 128 rows of the weight


@triton.jit(do_not_specialize=["R"])
def few_rows_kernel(
    x_desc,
    w_desc,
    counts_ptr,
    out,
    L,
    R,
    N,
    D,
    GATED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Deal the tiles with rows, expert by expert, among a fixed number of programs. counts_ptr None: all rows are real.

    A tile is out[row.. : BLOCK_M rows, col.. : BLOCK_N columns]. GATED: weight is [L, 2N, D], and the tile silu_mul of
    two products. Both are rounded first, as a GEMM's output would be.
    """
    after_previous(PDL, LET_NEXT=False)  # the next kernel would take the room from the other stream's
    ids = tl.arange(0, EXPERTS)
    counts = tl.where(ids < L, R, 0)
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + ids, mask=ids < L, other=0)
    num_n, num_k = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_K)
    tiles = tl.cdiv(counts, BLOCK_M) * num_n  # [EXPERTS]
    ends = tl.cumsum(tiles, 0)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        before = ends <= tile  # experts whose tiles all come earlier
        expert = tl.sum(before.to(tl.int32), 0)
        count = tl.sum(tl.where(ids == expert, counts, 0), 0)
        tile -= tl.sum(tl.where(before, tiles, 0), 0)
        num_m = tl.cdiv(count, BLOCK_M)  # tiles that share a weight's rows come one after the other
        row, col = expert * R + tile % num_m * BLOCK_M, tile // num_m * BLOCK_N
        w_row = expert * (2 * N if GATED else N) + col
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        acc_up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in tl.range(0, num_k, num_stages=STAGES):
            x = x_desc.load([row, k * BLOCK_K]).T  # [BLOCK_K, BLOCK_M]
            acc = tl.dot(w_desc.load([w_row, k * BLOCK_K]), x, acc)
            if GATED:
                acc_up = tl.dot(w_desc.load([w_row + N, k * BLOCK_K]), x, acc_up)
        kind = out.dtype.element_ty
        if GATED:
            gate = acc.to(kind).to(tl.float32)
            acc = gate * tl.sigmoid(gate) * acc_up.to(kind).to(tl.float32)
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        here = (rows < expert * R + count)[None] & (cols < N)[:, None]
        tl.store(out + rows.to(tl.int64)[None] * N + cols[:, None], acc.to(kind), mask=here)


def gemm_of_few_rows(
    x: Tensor, weight: Tensor, counts: Tensor | None, gated: bool = False, tile: Tile | None = None
) -> Tensor:
    """Return out[e, :counts[e]] = x[e, :counts[e]] @ weight[e].T, or silu_mul of it if `gated`; the rest is undefined.

    x [L, R, D] bf16 or float16, weight [L, N, D], counts [L] int32 (None: R each) -> [L, R, N]; [L, R, N / 2] if
    `gated`.
    """
    (num_local, room, d), columns = x.shape, weight.shape[1] // (2 if gated else 1)
    out = x.new_empty(num_local, room, columns)
    if out.numel() == 0:
        return out
    rows, block_n, stages = tile or (GATED if gated else PLAIN)
    most = num_local * triton.cdiv(room, rows) * triton.cdiv(columns, block_n)
    few_rows_kernel[min(most, 2 * num_sms(x.device)),](
        block_descriptor(x, rows),
        block_descriptor(weight, block_n),
        counts,
        out,
        num_local,
        room,
        columns,
        d,
        gated,
        triton.next_power_of_2(num_local),
        rows,
        block_n,
        128 // x.itemsize,
        stages,
        num_warps=4,
        num_stages=stages,
        **pdl(x),
    )
    return out


def ffn_of_few_rows(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return silu_mul(x @ gate_up.T) @ down.T: x [T, D] bf16 or float16, gate_up [2I, D], down [D, I] -> [T, D]."""
    rows = min(64, max(16, triton.next_power_of_2(x.shape[0])))
    hidden = gemm_of_few_rows(x[None], gate_up[None], None, True, Tile(rows, 64, 3))
    return gemm_of_few_rows(hidden, down[None], None, False, Tile(rows, 64, 4))[0]
