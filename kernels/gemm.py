"""The tile that all our fp8 and grouped GEMMs share, and `gemm_fp8`, the dense product made of it.

fp8 follows DeepSeek-V3 (technical report, section 3.3): x has one scale per row and 128 columns, w one per 128 x 128
block. So the tensor core can only sum 128 columns before the scales must be applied in float32:

    out[m, n] = sum over blocks b of 128 columns:  xs[m, b] * ws[n / 128, b] * (x[m, b] . w[n, b])

Operands arrive through TMA descriptors. A step is 128 bytes of D whatever the dtype (TMA's widest swizzle).
Everything outside a descriptor reads as zero.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.group_at import group_arguments, group_at
from kernels.groups import Groups
from kernels.pdl import after_previous, let_next, pdl
from kernels.quant import check_scales, column_major


class Tile(NamedTuple):
    """The output block of one program: `slabs` times block_m rows by block_n columns.

    Two slabs share the loads of w, but go through the tensor core one after the other. That halves the registers for
    the unscaled product: with 4 warps, two programs fit an SM, and one's scaling hides behind the other's product.
    """

    block_m: int
    block_n: int
    slabs: int
    num_warps: int
    num_stages: int  # steps of D loaded ahead
    parts: int = 1  # programs that share the tile's D; their sums are added in a fixed order
    unroll: int = 1  # 128-byte steps of D per loop iteration, and so per stage; pays for a program alone in its SM

    @property
    def rows(self) -> int:
        return self.slabs * self.block_m


TWO_SLABS = Tile(64, 128, 2, 4, 3)  # 128 x 128, two programs per SM: the best wherever there is enough work


def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_descriptor(x: Tensor, block_rows: int) -> TensorDescriptor:
    """Describe x [..., D] as rows [prod(...), D], loaded in blocks of [block_rows, 128 bytes].

    Raises ValueError if TMA cannot address x.
    """
    if (x.shape[-1] * x.itemsize) % 16 or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"TMA: rows must be contiguous multiples of 16 bytes, got {tuple(x.shape)} {x.dtype}")
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [block_rows, 128 // x.itemsize])


@triton.jit
def block_order(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Map a tile number to (row block, column block): down GROUP_M blocks, then right. Neighbours share data in L2."""
    first = tile // (GROUP_M * num_n) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    tile = tile % (GROUP_M * num_n)
    return first + tile % height, tile // height


@triton.jit
def pin(x):
    """Return x; the compiler must have computed it by here."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def dot_slabs(
    x_desc,
    w_desc,
    x_scale,
    x_scale_stride,
    w_scale,
    row,
    scale_row,
    w_row,
    rows_end,
    k_start,
    k_end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr = 1,
):
    """Compute x[row.. : BLOCK_M rows] @ w[w_row.. : BLOCK_N rows].T over steps k_start..k_end of D, for SLABS slabs.

    x_scale points to row 0 of [rows, D / 128], whose columns are x_scale_stride apart. Its rows scale_row.. are read,
    up to rows_end. w_scale points to this tile's row of [N / 128, D / 128]. None: no scales.

    SLABS is 1 or 2. Returns top, bottom in float32.
    """
    rows = scale_row + tl.arange(0, BLOCK_M)
    top = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bottom = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # with one slab it stays zero and takes no registers
    if x_scale is None:
        for k in tl.range(k_start, k_end, num_stages=STAGES):
            w = w_desc.load([w_row, k * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            top = tl.dot(x_desc.load([row, k * BLOCK_K]), w.T, top, input_precision="ieee")
    elif SLABS == 1:
        top_scale = x_scale + tl.minimum(rows, rows_end - 1)
        ws = tl.load(w_scale + k_start)  # one for the tile: BLOCK_N divides 128
        # num_stages, given here, pipelines the scales too
        for k in tl.range(k_start, k_end, num_stages=STAGES, loop_unroll_factor=UNROLL):
            scale = tl.load(top_scale + k * x_scale_stride) * ws
            ws = tl.load(w_scale + tl.minimum(k + 1, k_end - 1))
            w = w_desc.load([w_row, k * BLOCK_K])
            top += tl.dot(x_desc.load([row, k * BLOCK_K]), w.T) * scale[:, None]
    else:  # two programs share an SM and hide each other's wait for scales
        top_scale = x_scale + tl.minimum(rows, rows_end - 1)
        bottom_scale = x_scale + tl.minimum(rows + BLOCK_M, rows_end - 1)
        ws = tl.load(w_scale + k_start)
        xs = tl.load(top_scale + k_start * x_scale_stride)  # [BLOCK_M]
        xs2 = tl.load(bottom_scale + k_start * x_scale_stride)
        for k in range(k_start, k_end):
            w = w_desc.load([w_row, k * BLOCK_K])
            x = x_desc.load([row, k * BLOCK_K])
            scale = xs * ws
            scale2 = xs2 * ws
            after = tl.minimum(k + 1, k_end - 1)  # the next scales arrive during this step's product
            xs = tl.load(top_scale + after * x_scale_stride)
            ws = tl.load(w_scale + after)
            xs2 = tl.load(bottom_scale + after * x_scale_stride)
            x2 = x_desc.load([row + BLOCK_M, k * BLOCK_K])
            top += tl.dot(x, w.T) * scale[:, None]
            top = pin(top)  # else the compiler mixes both slabs' scaling and runs out of registers
            bottom += tl.dot(x2, w.T) * scale2[:, None]
    return top, bottom


@triton.jit
def store_slabs(out, slabs, row, col, rows_end, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLABS: tl.constexpr):
    """Store the slabs to out[row.., col..], clipped to rows < rows_end and columns < N."""
    cols = col + tl.arange(0, BLOCK_N)
    for i in tl.static_range(SLABS):
        rows = row + i * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < rows_end)[:, None] & (cols < N)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * N + cols[None, :], slabs[i].to(out.dtype.element_ty), mask=mask)


@triton.jit
def one_tile(
    tile,
    x_desc,
    w_desc,
    x_scale,
    x_scale_stride,
    w_scale,
    ends,
    out,
    M,
    N,
    L,
    num_k,
    k_start,
    k_end,
    BLOCK_L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute and store output block number `tile`, summed over steps k_start..k_end of D.

    The next kernel may start once the sum is complete.
    """
    m, n = block_order(tile, tl.cdiv(M, BLOCK_M * SLABS), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, col = m * BLOCK_M * SLABS, n * BLOCK_N
    expert, here = 0, True
    if ends is not None:
        expert, end = group_at(ends, row, L, BLOCK_L, ALIGNMENT)
        here = row < end
    if here:  # else a block of padding
        scale = w_scale
        if w_scale is not None:
            scale += (expert * tl.cdiv(N, 128) + col // 128) * num_k
        slabs = dot_slabs(
            x_desc,
            w_desc,
            x_scale,
            x_scale_stride,
            scale,
            row,
            row,
            expert * N + col,
            M,
            k_start,
            k_end,
            BLOCK_M,
            BLOCK_N,
            SLABS,
            BLOCK_K,
            STAGES,
            UNROLL,
        )
        let_next(PDL)
        store_slabs(out, slabs, row, col, M, N, BLOCK_M, BLOCK_N, SLABS)


@triton.jit(do_not_specialize=["x_scale_stride", "M"])
def tiles_kernel(
    x_desc,
    w_desc,
    x_scale,
    x_scale_stride,
    w_scale,
    ends,
    out,
    M,
    N,
    D,
    L,
    BLOCK_L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute all tiles. ends [L] says which weight a row block takes (`groups.py`); None: there is one weight.

    Grid (tiles, PARTS): axis 1 splits D, and part i goes to out + i * M * N. Each program has one tile. With two slabs
    it is written as a loop nevertheless: without one, the compiler spills registers.
    """
    after_previous(PDL, LET_NEXT=False)
    num_k = tl.cdiv(D, BLOCK_K)
    k_start, k_end = 0, num_k
    if PARTS > 1:
        part = tl.program_id(1)
        k_start, k_end = num_k * part // PARTS, num_k * (part + 1) // PARTS
        out += part.to(tl.int64) * M * N
    if SLABS == 1:
        one_tile(
            tl.program_id(0),
            x_desc,
            w_desc,
            x_scale,
            x_scale_stride,
            w_scale,
            ends,
            out,
            M,
            N,
            L,
            num_k,
            k_start,
            k_end,
            BLOCK_L,
            ALIGNMENT,
            BLOCK_M,
            BLOCK_N,
            SLABS,
            BLOCK_K,
            GROUP_M,
            STAGES,
            UNROLL,
            PDL,
        )
    else:
        for tile in range(tl.program_id(0), tl.num_programs(0), tl.num_programs(0)):
            one_tile(
                tile,
                x_desc,
                w_desc,
                x_scale,
                x_scale_stride,
                w_scale,
                ends,
                out,
                M,
                N,
                L,
                num_k,
                k_start,
                k_end,
                BLOCK_L,
                ALIGNMENT,
                BLOCK_M,
                BLOCK_N,
                SLABS,
                BLOCK_K,
                GROUP_M,
                STAGES,
                UNROLL,
                PDL,
            )


@triton.jit(do_not_specialize=["size"])
def sum_parts_kernel(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    after_previous(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts + i * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def launch_tiles(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, groups: Groups | None, tile: Tile
) -> Tensor:
    """Multiply x [M, D] with w [N, D] or [L, N, D] -> [M, N], in bf16 if there are scales, else in x's dtype."""
    (m, d), n = x.shape, w.shape[-2]
    ends, *of_groups = group_arguments(groups, tile.rows)
    out = x.new_empty(m, n, dtype=x.dtype if x_scale is None else torch.bfloat16)
    if out.numel() == 0:
        return out
    x_scale = column_major(x_scale)
    check_scales(x, x_scale, w, w_scale)
    parts = out if tile.parts == 1 else x.new_empty(tile.parts, m, n, dtype=torch.float32)
    tiles_kernel[triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.block_n), tile.parts](
        block_descriptor(x, tile.block_m),
        block_descriptor(w, tile.block_n),
        x_scale,
        0 if x_scale is None else x_scale.stride(1),
        w_scale,
        ends,
        parts,
        m,
        n,
        d,
        *of_groups,
        tile.block_m,
        tile.block_n,
        tile.slabs,
        128 // x.itemsize,
        tile.parts,
        GROUP_M=16,
        STAGES=tile.num_stages,
        UNROLL=tile.unroll,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **pdl(x),
    )
    if tile.parts > 1:
        sum_parts_kernel[triton.cdiv(m * n, 1024),](parts, out, m * n, tile.parts, 1024, **pdl(x))
    return out


def dense_tile(m: int, n: int, d: int, sms: int) -> Tile:
    """Return the largest tile that still occupies every SM. Where none does, several programs share a tile's D."""
    if m > 256 and triton.cdiv(m, 128) * triton.cdiv(n, 128) >= 2 * sms:
        return TWO_SLABS
    rows = 64 if m <= 64 else 128
    tiles = max(1, triton.cdiv(m, rows) * triton.cdiv(n, 64))
    if tiles > sms:
        return Tile(rows, 64, 1, 4, 4)  # 4 stages leave room for a second program in the SM
    parts = max(1, min(sms // tiles, d // 1792))  # a part takes at least 14 steps
    return Tile(rows, 64, 1, 4, 5, parts) if parts > 1 else Tile(rows, 64, 1, 4, 4, unroll=2)


def gemm_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return (x * its 1x128 scales) @ (weight * its 128x128 scales).T. Each 128 columns' sum is scaled in float32.

    x [M, D] float8_e4m3fn, weight [N, D] float8_e4m3fn -> [M, N] bf16. D must be a multiple of 16.
    x_scale [M, ceil(D / 128)] float32, best stored column by column; weight_scale [ceil(N / 128), ceil(D / 128)]
    float32.
    """
    return launch_tiles(
        x, x_scale, weight, weight_scale, None, dense_tile(x.shape[0], *weight.shape, num_sms(x.device))
    )
