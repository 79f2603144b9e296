"""The masked grouped GEMM where experts have few rows, as in a decode step: reading the weights is all that it costs.

A tile is 128 rows of one expert's weight times 16 rows of x. The weight is the tensor core's left operand, which has at
least 64 rows. With x there, most of its rows would be padding, and loaded for nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm import block_descriptor, num_sms
from kernels.pdl import after_previous, pdl

ROWS = 16  # of x in a tile: the tensor core's unit is 8, Triton's least is 16
STAGES = 4  # steps of D loaded ahead; two programs then fill an SM


@triton.jit
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
    """Deal the tiles with rows, expert by expert, among a fixed number of programs.

    A tile is out[row.. : BLOCK_M rows, col.. : BLOCK_N columns]. GATED: weight is [L, 2N, D], and the tile silu_mul of
    two products. Both are rounded first, as a GEMM's output would be.
    """
    after_previous(PDL)
    ids = tl.arange(0, EXPERTS)
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


def gemm_of_few_rows(x: Tensor, weight: Tensor, counts: Tensor, gated: bool) -> Tensor:
    """Return out[e, :counts[e]] = x[e, :counts[e]] @ weight[e].T, or silu_mul of it if `gated`; the rest is undefined.

    x [L, R, D] bf16 or float16, weight [L, N, D], counts [L] int32 -> [L, R, N], or [L, R, N / 2] if `gated`.
    """
    (num_local, room, d), columns = x.shape, weight.shape[1] // (2 if gated else 1)
    out = x.new_empty(num_local, room, columns)
    if out.numel() == 0:
        return out
    block_n = 64 if gated else 128  # 128 rows of the weight either way
    most = num_local * triton.cdiv(room, ROWS) * triton.cdiv(columns, block_n)
    few_rows_kernel[min(most, 2 * num_sms(x.device)),](
        block_descriptor(x, ROWS),
        block_descriptor(weight, block_n),
        counts,
        out,
        num_local,
        room,
        columns,
        d,
        gated,
        triton.next_power_of_2(num_local),
        ROWS,
        block_n,
        128 // x.itemsize,
        STAGES,
        num_warps=4,
        num_stages=STAGES,
        **pdl(x),
    )
    return out
