"""One GEMM over all experts of a rank, in Triton, for the two layouts that dispatch delivers:

    contiguous   rows [M, D] in one group per expert, of whole 128-row blocks (`groups.py`)
    masked       rows [L, R, D], the first counts[e] of expert e real; only the GPU knows the counts

`kernels/gemm.py` has the tile, and explains the fp8 scales. Small rooms without scales go to `kernels/few_rows.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import gemm_of_few_rows
from kernels.gemm import (
    TWO_SLABS,
    Tile,
    block_descriptor,
    block_order,
    dot_slabs,
    launch_tiles,
    num_sms,
    store_slabs,
)
from kernels.groups import Groups, check_groups
from kernels.pdl import after_previous, pdl
from kernels.quant import check_scales, column_major, silu_mul_masked
from kernels.rooms import FEW_ROWS


@triton.jit
def masked_kernel(
    x_desc,
    w_desc,
    x_scale,
    x_scale_stride,
    expert_stride,
    w_scale,
    counts_ptr,
    out,
    L,
    R,
    N,
    D,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Deal the real tiles, expert by expert, among a fixed number of programs. Each finds its tiles from the counts."""
    after_previous(PDL)
    ids = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + ids, mask=ids < L, other=0)
    num_n, num_k = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_K)
    tiles = tl.cdiv(counts, BLOCK_M * SLABS) * num_n  # [EXPERTS]
    ends = tl.cumsum(tiles, 0)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        before = ends <= tile  # experts whose tiles all come earlier
        expert = tl.sum(before.to(tl.int32), 0)
        count = tl.sum(tl.where(ids == expert, counts, 0), 0)
        tile -= tl.sum(tl.where(before, tiles, 0), 0)
        m, n = block_order(tile, tl.cdiv(count, BLOCK_M * SLABS), num_n, GROUP_M)
        row, rows_end, col = expert * R + m * BLOCK_M * SLABS, expert * R + count, n * BLOCK_N
        scale, x_scale_here = w_scale, x_scale
        if w_scale is not None:
            scale += (expert * tl.cdiv(N, 128) + col // 128) * num_k
            x_scale_here += expert * expert_stride
        slabs = dot_slabs(
            x_desc,
            w_desc,
            x_scale_here,
            x_scale_stride,
            scale,
            row,
            m * BLOCK_M * SLABS,
            expert * N + col,
            count,
            0,
            num_k,
            BLOCK_M,
            BLOCK_N,
            SLABS,
            BLOCK_K,
            STAGES,
        )
        store_slabs(out, slabs, row, col, rows_end, N, BLOCK_M, BLOCK_N, SLABS)


def launch_masked(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, counts: Tensor, tile: Tile
) -> Tensor:
    (num_local, room, d), n = x.shape, w.shape[1]
    out = x.new_empty(num_local, room, n, dtype=x.dtype if x_scale is None else torch.bfloat16)
    if out.numel() == 0:
        return out
    x_scale = column_major(x_scale)
    check_scales(x, x_scale, w, w_scale)
    max_tiles = num_local * triton.cdiv(room, tile.rows) * triton.cdiv(n, tile.block_n)
    shared = tile.num_stages * (tile.rows + tile.block_n) * 128  # bytes per program; an SM has 227 KiB
    programs = min(max_tiles, num_sms(x.device) * min(8 // tile.num_warps, 227 * 1024 // shared))
    masked_kernel[programs,](
        block_descriptor(x, tile.block_m),
        block_descriptor(w, tile.block_n),
        x_scale,
        0 if x_scale is None else x_scale.stride(2),
        0 if x_scale is None else x_scale.stride(0),
        w_scale,
        counts,
        out,
        num_local,
        room,
        n,
        d,
        triton.next_power_of_2(num_local),
        tile.block_m,
        tile.block_n,
        tile.slabs,
        128 // x.itemsize,
        GROUP_M=16,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **pdl(x),
    )
    return out


def plain_tile(x: Tensor) -> Tile:
    """Return the tile without scales. float32 runs outside the tensor cores; its sums only fit a small tile."""
    return Tile(64, 64, 1, 8, 2) if x.dtype == torch.float32 else Tile(128, 128, 1, 8, 4)


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply each group's rows by its expert's weight.T. Padding is undefined, and blocks of it are skipped.

    x [M, D] bf16 (or float16, float32), weight [L, N, D] -> [M, N]. The groups' alignment must be 128.
    """
    check_groups(x, weight, groups)
    return launch_tiles(x, None, weight, None, groups, plain_tile(x))


def grouped_gemm_contiguous_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Groups
) -> Tensor:
    """Do `grouped_gemm_contiguous` on fp8 e4m3 operands. Returns bf16.

    x [M, D], x_scale [M, ceil(D / 128)] float32; weight [L, N, D], weight_scale
    [L, ceil(N / 128), ceil(D / 128)] float32.
    """
    check_groups(x, weight, groups)
    return launch_tiles(x, x_scale, weight, weight_scale, groups, TWO_SLABS)


def _few_rows(x: Tensor) -> bool:
    return x.shape[1] <= FEW_ROWS and x.dtype != torch.float32


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return out[e, :counts[e]] = x[e, :counts[e]] @ weight[e].T; the rest is undefined. No host sync: graph safe.

    x [L, R, D] bf16 (or float16, float32), weight [L, N, D], counts [L] int32 on the GPU -> [L, R, N].
    """
    if _few_rows(x):
        return gemm_of_few_rows(x, weight, counts, gated=False)
    return launch_masked(x, None, weight, None, counts, plain_tile(x))


def swiglu_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return silu_mul of `grouped_gemm_masked`; the rest is undefined. weight [L, 2I, D] -> [L, R, I]."""
    if _few_rows(x):
        return gemm_of_few_rows(x, weight, counts, gated=True)
    return silu_mul_masked(grouped_gemm_masked(x, weight, counts), counts)


def grouped_gemm_masked_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor) -> Tensor:
    """Do `grouped_gemm_masked` on fp8 e4m3 operands. Returns bf16.

    x [L, R, D], x_scale [L, R, ceil(D / 128)] float32, best stored column by column, as DeepEP's are. weight and
    weight_scale as for `grouped_gemm_contiguous_fp8`.
    """
    tile = TWO_SLABS if x.shape[1] > FEW_ROWS else Tile(64, 128, 1, 4, 4)
    return launch_masked(x, x_scale, weight, weight_scale, counts, tile)
