"""Cast activations to fp8 (the 1x128 format of `kernels/fp8.py`). silu(gate) * up, alone or with that cast.

A scale is max(largest magnitude of a row's 128 columns, 1e-4) / 448, float32; the fp8 value is x / scale. The last
group of a row may be shorter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import fp8_format
from kernels.pdl import after_previous, pdl

GROUP = tl.constexpr(fp8_format.BLOCK)  # columns that share a scale
FP8_MAX = tl.constexpr(fp8_format.FP8_MAX)
SMALLEST = tl.constexpr(1e-4)  # keeps a block of zeros from dividing by zero
ROWS = 32  # rows of one program's tile


@triton.jit
def _silu_mul(x, rows, cols, mask, W):
    """Return silu(gate) * up in float32 for a tile of x [.., 2W]."""
    at = x + rows.to(tl.int64)[:, None] * 2 * W + cols[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [rows, cols]
    up = tl.load(at + W, mask=mask, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def store_quantized(y, values_at, scales_at, mask, live):
    """Quantise a tile y [rows, 128] float32: store fp8 at values_at [rows, 128] and scales at scales_at [rows]."""
    scale = tl.maximum(tl.max(tl.abs(y), 1), SMALLEST) / FP8_MAX  # [rows]
    y = tl.clamp(y / scale[:, None], -FP8_MAX, FP8_MAX)
    tl.store(values_at, y.to(values_at.dtype.element_ty), mask=mask)
    tl.store(scales_at, scale, mask=live)


@triton.jit(do_not_specialize=["M", "scale_stride"])
def _quantize_kernel(x, out, scales, M, D, scale_stride, ROWS: tl.constexpr, PDL: tl.constexpr):
    after_previous(PDL)
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = group * GROUP + tl.arange(0, GROUP)
    live = rows < M
    mask = live[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    store_quantized(y, out + at, scales + group.to(tl.int64) * scale_stride + rows, mask, live)


@triton.jit(do_not_specialize=["M", "scale_stride"])
def _silu_mul_kernel(x, row_expert, out, scales, M, W, scale_stride, ROWS: tl.constexpr, PDL: tl.constexpr):
    """Do silu(gate) * up, and quantise it unless scales is None. row_expert None: every row is real."""
    after_previous(PDL)
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = group * GROUP + tl.arange(0, GROUP)
    live = rows < M
    if row_expert is not None:
        live = live & (tl.load(row_expert + rows, mask=live, other=-1) >= 0)
    mask = live[:, None] & (cols < W)[None, :]
    y = _silu_mul(x, rows, cols, mask, W)
    at = out + rows.to(tl.int64)[:, None] * W + cols[None, :]
    if scales is None:
        tl.store(at, y.to(out.dtype.element_ty), mask=mask)
    else:
        store_quantized(y, at, scales + group.to(tl.int64) * scale_stride + rows, mask, live)


@triton.jit
def _silu_mul_masked_kernel(x, counts, out, scales, R, W, scale_stride, ROWS: tl.constexpr, PDL: tl.constexpr):
    """Do silu(gate) * up, and quantise it unless scales is None.

    Grid (expert, group, P): P programs share the expert's real row blocks, whose number only the GPU knows.
    """
    after_previous(PDL)
    expert, group = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + expert)
    cols = group * GROUP + tl.arange(0, GROUP)
    for start in range(tl.program_id(2) * ROWS, count, tl.num_programs(2) * ROWS):
        place = start + tl.arange(0, ROWS)
        live = place < count
        rows = expert * R + place
        mask = live[:, None] & (cols < W)[None, :]
        y = _silu_mul(x, rows, cols, mask, W)
        at = out + rows.to(tl.int64)[:, None] * W + cols[None, :]
        if scales is None:
            tl.store(at, y.to(out.dtype.element_ty), mask=mask)
        else:
            column = (expert * tl.num_programs(1) + group).to(tl.int64)
            store_quantized(y, at, scales + column * scale_stride + place, mask, live)


def fp8_like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Allocate an fp8 tensor of `width` columns for x's rows, and its scales. x [..., M, any].

    Returns values e4m3 [..., M, width] and scales float32 [..., M, ceil(width / 128)]. The scales are stored column by
    column, each column padded to 16 bytes: TMA, and so DeepGEMM, reads them this way.
    """
    *lead, rows = x.shape[:-1]
    columns = x.new_empty(*lead, triton.cdiv(width, GROUP.value), triton.cdiv(rows, 4) * 4, dtype=torch.float32)
    return x.new_empty(*lead, rows, width, dtype=torch.float8_e4m3fn), columns.transpose(-1, -2)[..., :rows, :]


def quantize_1x128(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [..., D] -> e4m3 [..., D] and float32 scales [..., ceil(D / 128)], one per row and 128 columns."""
    shape, width = x.shape, x.shape[-1]
    x = x.reshape(-1, width)
    out, scales = fp8_like(x, width)
    if out.numel():
        rows = len(x)
        _quantize_kernel[triton.cdiv(rows, ROWS), scales.shape[-1]](
            x.contiguous(), out, scales, rows, width, scales.stride(1), ROWS, **pdl(x)
        )
    return out.view(shape), scales.unflatten(0, shape[:-1])


def silu_mul(x: Tensor, row_expert: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up: x [..., 2I], gate first -> [..., I], in float32 and rounded once.

    With row_expert [M], rows of x [M, 2I] where it is -1 are padding: neither read nor written.
    """
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if out.numel():
        rows, width = out.numel() // out.shape[-1], out.shape[-1]
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, GROUP.value))
        _silu_mul_kernel[grid](x.contiguous(), row_expert, out, None, rows, width, 0, ROWS, **pdl(x))
    return out


def silu_mul_masked(x: Tensor, counts: Tensor) -> Tensor:
    """Do silu_mul for each expert's first counts[e] rows; the rest is neither read nor written.

    x [L, R, 2I] -> [L, R, I]. counts [L] int32 stays on the GPU (no host sync: CUDA-graph safe).
    """
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if out.numel():
        num_local, room, width = out.shape
        grid = (num_local, triton.cdiv(width, GROUP.value), min(16, triton.cdiv(room, ROWS)))
        _silu_mul_masked_kernel[grid](x.contiguous(), counts, out, None, room, width, 0, ROWS, **pdl(x))
    return out


def silu_mul_quant(x: Tensor, row_expert: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return quantize_1x128(silu(gate) * up), without rounding to bf16 in between.

    x [M, 2I] -> values [M, I], scales [M, ceil(I / 128)]. Rows whose row_expert [M] is -1 are padding: neither read nor
    written.
    """
    out, scales = fp8_like(x, x.shape[-1] // 2)
    if out.numel():
        grid = (triton.cdiv(x.shape[0], ROWS), scales.shape[-1])
        _silu_mul_kernel[grid](
            x.contiguous(), row_expert, out, scales, x.shape[0], out.shape[-1], scales.stride(1), ROWS, **pdl(x)
        )
    return out, scales


def silu_mul_quant_masked(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Do silu_mul_quant for each expert's first counts[e] rows; the rest is neither read nor written.

    x [L, R, 2I] -> values [L, R, I], scales [L, R, ceil(I / 128)]. counts [L] int32 stays on the GPU (no host sync:
    CUDA-graph safe).
    """
    out, scales = fp8_like(x, x.shape[-1] // 2)
    if out.numel():
        num_local, room, width = out.shape
        grid = (num_local, scales.shape[-1], min(16, triton.cdiv(room, ROWS)))
        _silu_mul_masked_kernel[grid](
            x.contiguous(), counts, out, scales, room, width, scales.stride(2), ROWS, **pdl(x)
        )
    return out, scales
