"""RMSNorm (with or without the residual add) and rope in Triton: one pass over memory each."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, x_stride, residual_stride, eps, dim: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None]
    here = (row < rows) & (col < dim)
    x = tl.load(x_ptr + row * x_stride + col, mask=here, other=0.0)  # [ROWS, BLOCK_D]
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row * residual_stride + col, mask=here, other=0.0)).to(x.dtype)
        tl.store(sum_ptr + row * dim + col, x, mask=here)
    x32 = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x32 * x32, 1) / dim + eps)
    weight = tl.load(weight_ptr + col, mask=col < dim, other=0.0).to(tl.float32)
    normed = (x32 * inverse[:, None]).to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * dim + col, normed.to(out_ptr.dtype.element_ty), mask=here)


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D] with unit last stride; a view where one exists (a slice of a projection stays in place)."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dim = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, total
    x = _rows(x)
    other = x if residual is None else _rows(residual)
    block = triton.next_power_of_2(dim)
    per_program = max(1, 2048 // block)  # narrow rows share a program: about 2K elements each, 8 for each thread
    _rms_norm_kernel[triton.cdiv(x.shape[0], per_program),](
        x, other, weight, out, total, x.shape[0], x.stride(0), other.stride(0), eps, dim,
        ROWS=per_program, BLOCK_D=block, ADD=residual is not None, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, the mean square in float32: `ref.rms_norm`.

    x [..., D] bf16 or float32, D <= 8192, any strides; weight [D] -> [..., D] contiguous. A program reads whole rows,
    so x crosses memory once.
    """
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual = x + residual (rounded to x's dtype), then rms_norm of it: returns (normed, x + residual).

    x, residual [..., D] of one dtype. Neither is written; the sum never returns to memory before it is normed.
    """
    return _norm(x, residual, weight, eps)


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, x_stride, x_head_stride, cos_stride, sin_stride, dim: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # of the T * H rows
    token, head = row // heads, row % heads
    col, pair = tl.arange(0, BLOCK_D)[None], tl.arange(0, BLOCK_D // 2)[None]
    here = (row < rows) & (col < dim)
    x = tl.load(x_ptr + token * x_stride + head * x_head_stride + col, mask=here, other=0.0)
    here_pair = (row < rows) & (pair < dim // 2)
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=here_pair, other=0.0)  # [ROWS, BLOCK_D / 2]
    sin = tl.load(sin_ptr + token * sin_stride + pair, mask=here_pair, other=0.0)
    even, odd = tl.split(x.to(tl.float32).reshape(ROWS, BLOCK_D // 2, 2))
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(ROWS, BLOCK_D)
    tl.store(out_ptr + row * dim + col, turned.to(x.dtype), mask=here)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[0], x[1]), (x[2], x[3]), ... by each token's angles: `ref.rope`.

    x [T, R] or [T, ..., R] bf16 or float32, possibly a strided view; cos, sin [T, R / 2] float32 -> x's shape,
    contiguous. Rows are (token, head) pairs, so that a slice of a projection is read in place.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    tokens, dim = x.shape[0], x.shape[-1]
    x = x[:, None] if x.dim() == 2 else x.flatten(1, -2)  # [T, H, R]
    x = x if x.stride(-1) == 1 else x.contiguous()
    block = max(2, triton.next_power_of_2(dim))
    per_program = max(1, 2048 // block)
    _rope_kernel[triton.cdiv(tokens * x.shape[1], per_program),](
        x, cos, sin, out, tokens * x.shape[1], x.shape[1], x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), dim,
        ROWS=per_program, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return out
