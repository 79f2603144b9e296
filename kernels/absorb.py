"""The two products around absorbed MLA's attention (`model/mla.py`): W_UK into the query, W_UV into the result.

Each head has its own weights. The first product also rotates the rope part, in the same pass. The second also casts to
fp8 for o_proj. With more than MOST_TOKENS tokens, or FEW_TOKENS in float32, cuBLAS and a separate rope kernel serve the
first.

Up to FEW_TOKENS tokens, each product has a kernel without tensor cores: most of the time then goes into launches.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_few_heads import Splits
from kernels.fp8 import Quantized
from kernels.gemm import num_sms
from kernels.gemv import FEW_TOKENS
from kernels.norm import norm_rope_write, rope_into, turn_rows, turned
from kernels.pdl import let_next, pdl, wait_for_previous
from kernels.quant import GROUP, fp8_like, quantize_1x128, store_quantized

MOST_TOKENS = 512  # up to which our kernel computes the first product
FEW_TOKEN_HEADS = 8192  # tokens x heads up to which a program of that kernel has one block of columns


@triton.jit(do_not_specialize=["positions"])
def _absorb_few_kernel(
    q_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    positions,
    out_ptr,
    batch,
    q_stride,
    q_head_stride,
    w_stride,
    out_stride,
    cos_stride,
    sin_stride,
    nope: tl.constexpr,
    latent: tl.constexpr,
    rope_dim: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BESIDE: tl.constexpr,
    OURS_NEXT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute some columns of one head's q' for every token. A head's first program also rotates its rope part.

    BESIDE: it reads nothing that the kernel before it writes. OURS_NEXT: the next kernel is `decode_few_heads`'s, which
    may start now. FlashMLA's may not: see kernels/pdl.py.
    """
    if not BESIDE:
        wait_for_previous(PDL)
    if OURS_NEXT:
        let_next(PDL)
    CACHE: tl.constexpr = ".cg" if BESIDE else ""  # without a wait, nothing says that L1 knows of the query
    head, part = tl.program_id(0), tl.program_id(1)
    row, col = tl.arange(0, BLOCK_Q), part * BLOCK_C + tl.arange(0, BLOCK_C)
    here = (row < nope)[:, None] & (col < latent)[None, :]
    w = tl.load(w_ptr + head * w_stride + row[:, None] * latent + col[None, :], mask=here, other=0.0).to(tl.float32)
    rope_col, pair = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R // 2)
    for token in range(batch):
        q = q_ptr + token * q_stride + head * q_head_stride
        out = out_ptr + token * out_stride + head * (latent + rope_dim)
        x = tl.load(q + row, mask=row < nope, other=0.0, cache_modifier=CACHE).to(tl.float32)
        y = tl.sum(x[:, None] * w, 0)
        tl.store(out + col, y.to(out_ptr.dtype.element_ty), mask=col < latent)
        if part == 0:
            position = tl.load(positions + token)
            cos = tl.load(cos_ptr + position * cos_stride + pair, mask=pair < rope_dim // 2, other=0.0)
            sin = tl.load(sin_ptr + position * sin_stride + pair, mask=pair < rope_dim // 2, other=0.0)
            key = tl.load(q + nope + rope_col, mask=rope_col < rope_dim, other=0.0, cache_modifier=CACHE)
            key = turned(key[None, :], cos[None, :], sin[None, :], 1, BLOCK_R)
            tl.store(out + latent + rope_col[None, :], key, mask=(rope_col < rope_dim)[None, :])
    if BESIDE:
        wait_for_previous(PDL)


@triton.jit(do_not_specialize=["positions", "batch"])
def _absorb_kernel(
    q_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    positions,
    out_ptr,
    batch,
    q_stride,
    q_head_stride,
    w_stride,
    out_stride,
    cos_stride,
    sin_stride,
    nope: tl.constexpr,
    latent: tl.constexpr,
    rope_dim: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BESIDE: tl.constexpr,
    OURS_NEXT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute some blocks of columns of one head's q' for BLOCK_T tokens. The first program also rotates the rope part.

    BESIDE, OURS_NEXT: as in `_absorb_few_kernel`.
    """
    if not BESIDE:
        wait_for_previous(PDL)
    if OURS_NEXT:
        let_next(PDL)
    CACHE: tl.constexpr = ".cg" if BESIDE else ""  # without a wait, nothing says that L1 knows of the query
    head, part = tl.program_id(0), tl.program_id(2)
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    live = token < batch
    row = tl.arange(0, BLOCK_Q)
    q = q_ptr + token * q_stride + head * q_head_stride
    out = out_ptr + token * out_stride + head * (latent + rope_dim)
    x = tl.load(q + row[None], mask=live & (row < nope)[None], other=0.0, cache_modifier=CACHE)
    for first in range(part * BLOCK_C, latent, tl.num_programs(2) * BLOCK_C):
        col = (first + tl.arange(0, BLOCK_C))[None]
        here = (row < nope)[:, None] & (col < latent)
        w = tl.load(w_ptr + head * w_stride + row[:, None] * latent + col, mask=here, other=0.0)
        tl.store(out + col, tl.dot(x, w).to(out_ptr.dtype.element_ty), mask=live & (col < latent))
    if part == 0:
        source, target, position = q + nope, out + latent, positions + token
        turn_rows(
            source, target, position, cos_ptr, sin_ptr, cos_stride, sin_stride, live, rope_dim, BLOCK_T, BLOCK_R, CACHE
        )
    if BESIDE:
        wait_for_previous(PDL)


def absorb_query(
    q: Tensor, w_uk: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, plan: Any = None
) -> Tensor:
    """Return q' = [W_UK^T q_nope, rope(q_rope)] for every head. Contract: `ref.absorb_query`.

    Shapes: q [B, H, nope + R], w_uk [H, nope, C], positions [B] int64 -> [B, H, C + R]. The tables are float32
    [length, R / 2]. The last stride of q must be 1, and each head of w_uk contiguous. `plan`: that of `mla_decode`,
    which must be the next op, because it may start early.
    """
    return _absorb(q, w_uk, cos_table, sin_table, positions, plan, beside=False)


def write_and_absorb(
    q: Tensor,
    w_uk: Tensor,
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_table: Tensor,
    sin_table: Tensor,
    positions: Tensor,
    rows: Tensor,
    kv_pages: Tensor,
    plan: Any = None,
) -> Tensor:
    """Do `norm.norm_rope_write` and absorb_query, side by side: neither needs the other. Contract: its twin in ref.

    q must have been computed by the current stream before. kv and q have the same number of tokens.
    """
    norm_rope_write(kv, norm_weight, eps, cos_table, sin_table, positions, rows, kv_pages)
    return _absorb(q, w_uk, cos_table, sin_table, positions, plan, beside=True)  # no kernel may come between


def _absorb(
    q: Tensor, w_uk: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, plan: Any, beside: bool
) -> Tensor:
    """Do absorb_query; `beside`: next to the kernel enqueued last, which must be norm_rope_write's."""
    (batch, heads, _), (_, nope, latent) = q.shape, w_uk.shape
    rope_dim = q.shape[2] - nope
    out = q.new_empty(batch, heads, latent + rope_dim)
    if batch > FEW_TOKENS and (q.itemsize > 2 or batch > MOST_TOKENS):
        torch.bmm(q[..., :nope].transpose(0, 1), w_uk, out=out[..., :latent].transpose(0, 1))
        rope_into(q, out, cos_table, sin_table, positions, rope_dim)
        return out
    if batch == 0:
        return out
    block = min(64, max(16, triton.next_power_of_2(latent)))
    operands = q, w_uk, cos_table, sin_table, positions, out, batch
    strides = q.stride(0), q.stride(1), w_uk.stride(0), out.stride(0), cos_table.stride(0), sin_table.stride(0)
    widths = nope, latent, rope_dim
    padded = max(16, triton.next_power_of_2(nope)), block, max(2, triton.next_power_of_2(rope_dim))
    parts, flags = triton.cdiv(latent, block), (beside, isinstance(plan, Splits))
    if batch <= FEW_TOKENS:
        _absorb_few_kernel[heads, parts](*operands, *strides, *widths, *padded, *flags, num_warps=4, **pdl(q))
        return out
    tokens = 32 if batch <= 32 else 64
    if batch * heads > FEW_TOKEN_HEADS:
        tokens, parts = 128, 2
    grid = heads, triton.cdiv(batch, tokens), parts
    _absorb_kernel[grid](*operands, *strides, *widths, tokens, *padded, *flags, num_warps=4, num_stages=3, **pdl(q))
    return out


@triton.jit
def _values_few_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    batch,
    heads,
    w_stride,
    latent: tl.constexpr,
    v_dim: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply some rows of one head's W_UV with every token's attended latent."""
    let_next(PDL)
    head = tl.program_id(0)
    row, col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
    here = (row < v_dim)[:, None] & (col < latent)[None, :]
    w = tl.load(w_ptr + head * w_stride + row[:, None] * latent + col[None, :], mask=here, other=0.0).to(tl.float32)
    wait_for_previous(PDL)  # see kernels/pdl.py: weights may be read before
    for token in range(batch):
        x = tl.load(x_ptr + (token * heads + head) * latent + col, mask=col < latent, other=0.0).to(tl.float32)
        y = tl.sum(x[None, :] * w, 1)
        tl.store(out_ptr + (token * heads + head) * v_dim + row, y.to(out_ptr.dtype.element_ty), mask=row < v_dim)


@triton.jit(do_not_specialize=["batch", "scale_stride"])
def _values_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    scales_ptr,
    batch,
    heads,
    w_stride,
    scale_stride,
    latent: tl.constexpr,
    v_dim: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute BLOCK_V of one head's values for BLOCK_T tokens. With scales_ptr, all of them: v_dim is GROUP then.

    If a block has all columns of the latent, the weight is read ahead of x.
    """
    let_next(PDL)
    head, token = tl.program_id(0), tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live, row = token < batch, tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = token.to(tl.int64)[:, None] * heads + head  # row of [B * H]
    if latent <= BLOCK_C:
        col = tl.arange(0, BLOCK_C)[None, :]
        w_at = w_ptr + head * w_stride + row[:, None] * latent + col
        w = tl.load(w_at, mask=(row < v_dim)[:, None] & (col < latent), other=0.0)
        wait_for_previous(PDL)  # see kernels/pdl.py: weights may be read before
        x = tl.load(x_ptr + at * latent + col, mask=live[:, None] & (col < latent), other=0.0)
        acc = tl.dot(x, w.T, input_precision="ieee")
    else:
        wait_for_previous(PDL)
        acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for first in range(0, latent, BLOCK_C):
            col = (first + tl.arange(0, BLOCK_C))[None, :]
            x = tl.load(x_ptr + at * latent + col, mask=live[:, None] & (col < latent), other=0.0)
            w_at = w_ptr + head * w_stride + row[:, None] * latent + col
            w = tl.load(w_at, mask=(row < v_dim)[:, None] & (col < latent), other=0.0)
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    out = out_ptr + at * v_dim + row[None, :]
    mask = live[:, None] & (row < v_dim)[None, :]
    if scales_ptr is None:
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        y = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
        store_quantized(y, out, scales_ptr + head.to(tl.int64) * scale_stride + token, mask, live)


class Tile(NamedTuple):
    """What a program of `_values_kernel` computes, and how."""

    tokens: int
    values: int
    columns: int  # of the latent, per step
    warps: int
    stages: int


def _values_tile(attended: Tensor, v_dim: int, whole: bool) -> Tile:
    """`whole`: a program must compute all values of a token's head."""
    (batch, heads, latent), sms = attended.shape, num_sms(attended.device)
    fast = attended.dtype == torch.bfloat16  # float32 multiplies outside the tensor cores: small tiles
    tokens, values = max(16, triton.next_power_of_2(batch)), max(16, triton.next_power_of_2(v_dim))
    if fast and not whole and heads * triton.cdiv(batch, 64) < sms // 2:  # few programs: cut the values, too
        tokens, values, columns = min(64, tokens), min(32, values), triton.next_power_of_2(latent)
        return Tile(tokens, values, columns, 4, 1) if columns <= 512 else Tile(tokens, values, 128, 4, 3)
    tokens = min(128 if fast else 16, tokens)
    while tokens > 16 and heads * triton.cdiv(batch, tokens) < sms // 2:
        tokens //= 2
    return Tile(tokens, values, 64 if fast else 32, 8 if tokens == 128 else 4, 3 if fast else 1)


def project_values(attended: Tensor, w_uv: Tensor, quantize: bool = False) -> Tensor | Quantized:
    """Return W_UV (attended latent) for every head. Contract: `ref.project_values`.

    attended [B, H, C], w_uv [H, v, C] with contiguous heads -> [B, H, v]. With `quantize`: values [B, H v], and scales
    in the layout of `quant.fp8_like`. If v is the number of columns per scale, that happens in the same pass.
    """
    (batch, heads, latent), v_dim = attended.shape, w_uv.shape[1]
    few = batch <= FEW_TOKENS
    fused = quantize and not few and v_dim == GROUP.value
    if quantize and not fused:
        return quantize_1x128(project_values(attended, w_uv).flatten(1))
    if fused:
        out, scales = fp8_like(attended.flatten(1), heads * v_dim)
    else:
        out, scales = attended.new_empty(batch, heads, v_dim), None
    if batch == 0:
        return out
    attended = attended.contiguous()
    if few:
        block = 16
        _values_few_kernel[heads, triton.cdiv(v_dim, block)](
            attended,
            w_uv,
            out,
            batch,
            heads,
            w_uv.stride(0),
            latent,
            v_dim,
            block,
            triton.next_power_of_2(latent),
            num_warps=4,
            **pdl(attended),
        )
        return out
    tile = _values_tile(attended, v_dim, scales is not None)
    _values_kernel[heads, triton.cdiv(batch, tile.tokens), triton.cdiv(v_dim, tile.values)](
        attended,
        w_uv,
        out,
        scales,
        batch,
        heads,
        w_uv.stride(0),
        0 if scales is None else scales.stride(1),
        latent,
        v_dim,
        tile.tokens,
        tile.values,
        tile.columns,
        **pdl(attended),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (out, scales) if quantize else out
