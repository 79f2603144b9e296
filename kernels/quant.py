"""Cast activations to fp8 (the 1x128 format of `kernels/fp8.py`). silu(gate) * up, alone or with that cast.

A scale is max(largest magnitude of a row's 128 columns, 1e-4) / 448, float32; the fp8 value is x / scale. The last
group of a row may be shorter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import fp8_format
from kernels.group_at import group_arguments, group_at
from kernels.groups import Groups
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
def _silu_mul_kernel(
    x,
    ends,
    out,
    scales,
    M,
    W,
    scale_stride,
    L,
    BLOCK_L: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Do silu(gate) * up, and quantise it unless scales is None. ends None: every row is real."""
    after_previous(PDL)
    block = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = block * GROUP + tl.arange(0, GROUP)
    end = M
    if ends is not None:
        _, end = group_at(ends, tl.program_id(0) * ROWS, L, BLOCK_L, ALIGNMENT)
    live = rows < end
    mask = live[:, None] & (cols < W)[None, :]
    y = _silu_mul(x, rows, cols, mask, W)
    at = out + rows.to(tl.int64)[:, None] * W + cols[None, :]
    if scales is None:
        tl.store(at, y.to(out.dtype.element_ty), mask=mask)
    else:
        store_quantized(y, at, scales + block.to(tl.int64) * scale_stride + rows, mask, live)


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


def check_scales(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None) -> None:
    """Raise ValueError unless the scales fit: 1x128 for x [..., M, D], 128x128 for w [..., N, D]. None: no scales."""
    if x_scale is None or w_scale is None:
        return
    blocks = -(-x.shape[-1] // fp8_format.BLOCK)
    want_x, want_w = (*x.shape[:-1], blocks), (*w.shape[:-2], -(-w.shape[-2] // fp8_format.BLOCK), blocks)
    if x_scale.shape != want_x or w_scale.shape != want_w:
        raise ValueError(f"scales {tuple(x_scale.shape)}, {tuple(w_scale.shape)} should be {want_x}, {want_w}")
    assert w_scale.is_contiguous(), "scales must be contiguous"


def column_major(scale: Tensor | None) -> Tensor | None:
    """Return scales [..., M, G] stored column by column, as `fp8_like` allocates them. Copies where needed."""
    if scale is None or scale.stride(-2) == 1:
        return scale
    return scale.transpose(-1, -2).contiguous().transpose(-1, -2)


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


def _launch_silu_mul(x: Tensor, groups: Groups | None, out: Tensor, scales: Tensor | None) -> None:
    """Run the kernel over the rows of out [M, I] or [..., I]."""
    rows, width = out.numel() // out.shape[-1], out.shape[-1]
    ends, *of_groups = group_arguments(groups, ROWS)
    _silu_mul_kernel[triton.cdiv(rows, ROWS), triton.cdiv(width, GROUP.value)](
        x.contiguous(),
        ends,
        out,
        scales,
        rows,
        width,
        0 if scales is None else scales.stride(1),
        *of_groups,
        ROWS,
        **pdl(x),
    )


def silu_mul(x: Tensor, groups: Groups | None = None) -> Tensor:
    """Return silu(gate) * up: x [..., 2I], gate first -> [..., I], in float32 and rounded once.

    With the groups of x [M, 2I], rows of padding are neither read nor written.
    """
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if out.numel():
        _launch_silu_mul(x, groups, out, None)
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


def silu_mul_quant(x: Tensor, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """Return quantize_1x128(silu(gate) * up), without rounding to bf16 in between.

    x [M, 2I] -> values [M, I], scales [M, ceil(I / 128)]. With its groups, padding is neither read nor written.
    """
    out, scales = fp8_like(x, x.shape[-1] // 2)
    if out.numel():
        _launch_silu_mul(x, groups, out, scales)
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
