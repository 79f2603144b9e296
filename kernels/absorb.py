"""The two products around absorbed MLA's attention (`model/mla.py`): W_UK into the query, W_UV into the result.

cuBLAS serves them, one product a head (torch.bmm); up to FEW_TOKENS tokens there is a kernel for each, because then
most of the time is that of starting kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemv import FEW_TOKENS
from kernels.norm import rope_into, turned
from kernels.pdl import after_previous, pdl


@triton.jit
def _absorb_kernel(
    q_ptr, w_ptr, cos_ptr, sin_ptr, positions, out_ptr, batch, q_stride, q_head_stride, w_stride, out_stride,
    cos_stride, sin_stride, nope: tl.constexpr, latent: tl.constexpr, rope_dim: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's q' for every token; the first program of a head also turns its rope part."""
    after_previous(PDL, LET_NEXT=False)  # attention comes next
    head, part = tl.program_id(0), tl.program_id(1)
    row, col = tl.arange(0, BLOCK_Q), part * BLOCK_C + tl.arange(0, BLOCK_C)
    here = (row < nope)[:, None] & (col < latent)[None, :]
    w = tl.load(w_ptr + head * w_stride + row[:, None] * latent + col[None, :], mask=here, other=0.0).to(tl.float32)
    rope_col, pair = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R // 2)
    for token in range(batch):
        q = q_ptr + token * q_stride + head * q_head_stride
        out = out_ptr + token * out_stride + head * (latent + rope_dim)
        x = tl.load(q + row, mask=row < nope, other=0.0).to(tl.float32)
        y = tl.sum(x[:, None] * w, 0)
        tl.store(out + col, y.to(out_ptr.dtype.element_ty), mask=col < latent)
        if part == 0:
            position = tl.load(positions + token)
            cos = tl.load(cos_ptr + position * cos_stride + pair, mask=pair < rope_dim // 2, other=0.0)
            sin = tl.load(sin_ptr + position * sin_stride + pair, mask=pair < rope_dim // 2, other=0.0)
            key = tl.load(q + nope + rope_col, mask=rope_col < rope_dim, other=0.0)
            key = turned(key[None, :], cos[None, :], sin[None, :], 1, BLOCK_R)
            tl.store(out + latent + rope_col[None, :], key, mask=(rope_col < rope_dim)[None, :])


def absorb_query(q: Tensor, w_uk: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor) -> Tensor:
    """q' = [W_UK^T q_nope, rope(q_rope)] of every head: `ref.absorb_query`.

    q [B, H, nope + R] with unit last stride, w_uk [H, nope, C] with contiguous heads, tables [length, R / 2] float32,
    positions [B] int64 -> [B, H, C + R].
    """
    (batch, heads, _), (_, nope, latent) = q.shape, w_uk.shape
    rope_dim = q.shape[2] - nope
    out = q.new_empty(batch, heads, latent + rope_dim)
    if 0 < batch <= FEW_TOKENS:
        block = min(64, triton.next_power_of_2(latent))
        _absorb_kernel[heads, triton.cdiv(latent, block)](
            q, w_uk, cos_table, sin_table, positions, out, batch, q.stride(0), q.stride(1), w_uk.stride(0),
            out.stride(0), cos_table.stride(0), sin_table.stride(0), nope, latent, rope_dim,
            triton.next_power_of_2(nope), block, max(2, triton.next_power_of_2(rope_dim)), num_warps=4, **pdl(q),
        )  # fmt: skip
        return out
    torch.bmm(q[..., :nope].transpose(0, 1), w_uk, out=out[..., :latent].transpose(0, 1))
    rope_into(q, out, cos_table, sin_table, positions, rope_dim)
    return out


@triton.jit
def _values_kernel(
    x_ptr, w_ptr, out_ptr, batch, heads, w_stride, latent: tl.constexpr, v_dim: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some rows of one head's W_UV times what each token attended."""
    after_previous(PDL)
    head = tl.program_id(0)
    row, col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
    here = (row < v_dim)[:, None] & (col < latent)[None, :]
    w = tl.load(w_ptr + head * w_stride + row[:, None] * latent + col[None, :], mask=here, other=0.0).to(tl.float32)
    for token in range(batch):
        x = tl.load(x_ptr + (token * heads + head) * latent + col, mask=col < latent, other=0.0).to(tl.float32)
        y = tl.sum(x[None, :] * w, 1)
        tl.store(out_ptr + (token * heads + head) * v_dim + row, y.to(out_ptr.dtype.element_ty), mask=row < v_dim)


def project_values(attended: Tensor, w_uv: Tensor) -> Tensor:
    """W_UV (attended latent) of every head: `ref.project_values`.

    attended [B, H, C], w_uv [H, v, C] with contiguous heads -> [B, H, v].
    """
    (batch, heads, latent), v_dim = attended.shape, w_uv.shape[1]
    out = attended.new_empty(batch, heads, v_dim)
    if 0 < batch <= FEW_TOKENS:
        block = 16
        _values_kernel[heads, triton.cdiv(v_dim, block)](
            attended.contiguous(), w_uv, out, batch, heads, w_uv.stride(0), latent, v_dim, block,
            triton.next_power_of_2(latent), num_warps=4, **pdl(attended),
        )  # fmt: skip
        return out
    torch.bmm(attended.transpose(0, 1), w_uv.transpose(1, 2), out=out.transpose(0, 1))
    return out
