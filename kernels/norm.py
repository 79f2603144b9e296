"""RMSNorm, rope, and MLA's cache write, which needs both. Each is one pass over memory.

RMSNorm comes with or without the residual add, and with or without quantising its result. The add also sums what
combine left as `Addends`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.addends import Addends, Delta
from kernels.pdl import after_previous, let_next, pdl, wait_for_previous
from kernels.quant import GROUP, fp8_like, store_quantized
from kernels.route import add_copies


@triton.jit
def _normed(x, weight, eps, dim):
    """Return rms_norm of x [ROWS, BLOCK_D] (zero past `dim` columns), rounded to x's dtype before the weight."""
    x32 = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x32 * x32, 1) / dim + eps)
    return (x32 * inverse[:, None]).to(x.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def turned(x, cos, sin, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate the pairs of x [ROWS, BLOCK_D] by cos, sin [ROWS, BLOCK_D / 2]."""
    even, odd = tl.split(x.to(tl.float32).reshape(ROWS, BLOCK_D // 2, 2))
    return tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(ROWS, BLOCK_D).to(x.dtype)


@triton.jit
def turn_rows(
    source,
    target,
    positions,
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    live,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Rotate `dim` columns at source into those at target, which may be source. All but the strides: [ROWS, 1].

    `positions` points to each row's position. CACHE: how the source is cached.
    """
    col, pair = tl.arange(0, BLOCK_D)[None], tl.arange(0, BLOCK_D // 2)[None]
    here, here_pair = live & (col < dim), live & (pair < dim // 2)
    position = tl.load(positions, mask=live, other=0)
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=here_pair, other=0.0)  # [ROWS, BLOCK_D / 2]
    sin = tl.load(sin_ptr + position * sin_stride + pair, mask=here_pair, other=0.0)
    x = tl.load(source + col, mask=here, other=0.0, cache_modifier=CACHE)  # [ROWS, BLOCK_D]
    tl.store(target + col, turned(x, cos, sin, ROWS, BLOCK_D), mask=here)


@triton.jit(do_not_specialize=["index_ptr", "copy_weights_ptr", "rows", "scale_stride"])
def _rms_norm_kernel(
    x_ptr,
    delta_ptr,
    index_ptr,
    copy_weights_ptr,
    plus_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    values_ptr,
    scales_ptr,
    rows,
    x_stride,
    delta_stride,
    eps,
    scale_stride,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm x, or with ADD x + delta. K > 0: delta is `Addends` with K rows per token; 0: one tensor."""
    if K == 0:
        let_next(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None]
    here = (row < rows) & (col < dim)
    weight = tl.load(weight_ptr + col, mask=col < dim, other=0.0)
    wait_for_previous(PDL)  # see kernels/pdl.py: weights may be read before
    x = tl.load(x_ptr + row * x_stride + col, mask=here, other=0.0)  # [ROWS, BLOCK_D]
    if ADD:
        if K == 0:
            delta = tl.load(delta_ptr + row * delta_stride + col, mask=here, other=0.0)
        else:  # rows past the end sum the last token's copies, and are not stored
            token = tl.program_id(0).to(tl.int64) if ROWS == 1 else tl.minimum(row, rows - 1)
            delta = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
            delta = add_copies(delta, delta_ptr, index_ptr, copy_weights_ptr, plus_ptr, token, col, dim, K, False)
            delta = delta.to(delta_ptr.dtype.element_ty)
        x = (x.to(tl.float32) + delta).to(x.dtype)
        tl.store(sum_ptr + row * dim + col, x, mask=here)
    normed = _normed(x, weight, eps, dim)
    if K > 0:  # not before: the next kernel reads its weights at once, and would delay the reads of so many rows
        let_next(PDL)
    if out_ptr is None:
        normed = normed.to(x.dtype)
    else:
        normed = normed.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * dim + col, normed, mask=here)
    if QUANT:  # reshape to rows of one group each: dim is a multiple of GROUP
        groups: tl.constexpr = BLOCK_D // GROUP
        part = tl.arange(0, ROWS * groups)
        row, group = tl.program_id(0).to(tl.int64) * ROWS + part // groups, part % groups
        live, col = (row < rows) & (group < dim // GROUP), tl.arange(0, GROUP)
        y = normed.to(tl.float32).reshape(ROWS * groups, GROUP)
        mask = live[:, None] & (col < GROUP)[None, :]
        values_at = values_ptr + (row * dim + group * GROUP)[:, None] + col[None, :]
        store_quantized(y, values_at, scales_ptr + group * scale_stride + row, mask, live)


def _rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [N, D] with unit last stride. A view where possible: a projection's slice is not copied."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _norm(
    x: Tensor, delta: Delta | None, weight: Tensor, eps: float, quant: bool = False, bare: bool = True
) -> tuple[Tensor | None, ...]:
    """Return (normed, x + delta), or with `quant` (normed, values, scales, x + delta).

    Without a delta, the sum is x itself. Without `bare`, normed is None.
    """
    shape, dim, on = x.shape, x.shape[-1], x.device
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=on) if bare else None
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=on)
    values = scales = None
    if quant:
        assert dim % GROUP.value == 0, f"{dim=}"
        values, scales = fp8_like(_rows(x), dim)
    if x.numel():
        x = _rows(x)
        if isinstance(delta, Addends):
            top_k = delta.top_k
            other, *rest = (None if part is None else part.contiguous() for part in delta)
        else:
            top_k, other, rest = 0, x if delta is None else _rows(delta), (None, None, None)
        block = triton.next_power_of_2(dim)
        per_program = max(1, 2048 // block)  # narrow rows share a program: about 2K elements
        _rms_norm_kernel[triton.cdiv(x.shape[0], per_program),](
            x,
            other,
            *rest,
            weight,
            out,
            total,
            values,
            scales,
            x.shape[0],
            x.stride(0),
            other.stride(0),
            eps,
            0 if scales is None else scales.stride(1),
            dim,
            ROWS=per_program,
            BLOCK_D=block,
            ADD=delta is not None,
            K=top_k,
            QUANT=quant,
            num_warps=4 if block <= 2048 else 8,
            **pdl(x),
        )
    if not quant:
        return out, total
    return out, values.view(shape), scales.unflatten(0, shape[:-1]), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dim, the mean square in float32. Contract: `ref.rms_norm`.

    x [..., D] bf16 or float32, D <= 8192, any strides; weight [D] -> [..., D] contiguous. A program reads whole rows,
    so x is read only once.
    """
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, delta: Delta, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise: return (rms_norm(x + delta), x + delta). The sum is rounded to x's dtype first.

    x, delta [..., D] of one dtype. Neither is written. The norm takes the sum from registers, not from memory.
    `Addends`, for x [T, D], are summed as `ep_gather` does, to the bit.
    """
    return _norm(x, delta, weight, eps)


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, bare: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return (normed, values, scales): rms_norm, and its rounded result in fp8. Contract: `ref.rms_norm_quant`.

    D must be a multiple of 128. values e4m3 [..., D]; scales float32 [..., D / 128] in the layout of `fp8_like`.
    normed is None without `bare`.
    """
    return _norm(x, None, weight, eps, True, bare)[:3]


def add_rms_norm_quant(
    x: Tensor, delta: Delta, weight: Tensor, eps: float, bare: bool = True
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Do add_rms_norm and rms_norm_quant in one pass: return (normed or None, values, scales, x + delta)."""
    return _norm(x, delta, weight, eps, True, bare)


@triton.jit(do_not_specialize=["positions_ptr", "rows"])
def _rope_kernel(
    source_ptr,
    target_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows,
    heads,
    source_stride,
    source_head_stride,
    target_stride,
    target_head_stride,
    cos_stride,
    sin_stride,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate rows of source into target, which may be source: a program loads whole pairs before it stores them."""
    after_previous(PDL, LET_NEXT=False)  # attention comes next: see kernels/pdl.py
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # row of [T * H]
    token, head = (row // heads).to(tl.int64), row % heads
    source = source_ptr + token * source_stride + head * source_head_stride
    target = target_ptr + token * target_stride + head * target_head_stride
    position = positions_ptr + token
    turn_rows(source, target, position, cos_ptr, sin_ptr, cos_stride, sin_stride, row < rows, dim, ROWS, BLOCK_D, "")


def rope_query(q: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, rope_dim: int) -> None:
    """Rotate the last `rope_dim` columns of every head of q [T, H, nope + R] in place: `ref.rope_query`.

    q bf16 or float32 with unit last stride; tables [length, R / 2] float32; positions [T] int64.
    """
    rope_into(q, q, cos_table, sin_table, positions, rope_dim)


def rope_into(q: Tensor, out: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, rope_dim: int) -> None:
    """Do rope_query, but write to the last `rope_dim` columns of out [T, H, C + R], of q's dtype, unit last stride.

    q and out's other columns stay as they are. out may be q itself, but must not overlap it in any other way.
    """
    rows = q.shape[0] * q.shape[1]
    if rows == 0:
        return
    source, target = q[..., -rope_dim:], out[..., -rope_dim:]
    block = max(2, triton.next_power_of_2(rope_dim))
    per_program = max(1, 2048 // block)
    _rope_kernel[triton.cdiv(rows, per_program),](
        source,
        target,
        cos_table,
        sin_table,
        positions,
        rows,
        q.shape[1],
        source.stride(0),
        source.stride(1),
        target.stride(0),
        target.stride(1),
        cos_table.stride(0),
        sin_table.stride(0),
        rope_dim,
        ROWS=per_program,
        BLOCK_D=block,
        num_warps=4,
        **pdl(q),
    )


@triton.jit(do_not_specialize=["positions_ptr", "rows_ptr", "tokens"])
def _norm_rope_write_kernel(
    kv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows_ptr,
    pages_ptr,
    tokens,
    kv_stride,
    cos_stride,
    sin_stride,
    eps,
    latent: tl.constexpr,
    rope_dim: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL, LET_NEXT=False)
    let_next(PDL)  # `absorb.write_and_absorb` counts on this order
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    live = token < tokens
    source = kv_ptr + token * kv_stride
    target = pages_ptr + tl.load(rows_ptr + token, mask=live, other=0) * (latent + rope_dim)

    col = tl.arange(0, BLOCK_C)[None]
    here = live & (col < latent)
    x = tl.load(source + col, mask=here, other=0.0)  # [ROWS, BLOCK_C]
    normed = _normed(x, tl.load(weight_ptr + col, mask=col < latent, other=0.0), eps, latent)
    tl.store(target + col, normed.to(pages_ptr.dtype.element_ty), mask=here)

    source, target, position = source + latent, target + latent, positions_ptr + token
    turn_rows(source, target, position, cos_ptr, sin_ptr, cos_stride, sin_stride, live, rope_dim, ROWS, BLOCK_R, "")


def norm_rope_write(
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_table: Tensor,
    sin_table: Tensor,
    positions: Tensor,
    rows: Tensor,
    kv_pages: Tensor,
) -> None:
    """Write MLA's cache: flat row rows[t] of kv_pages = [rms_norm(kv[t, :C]), rope(kv[t, C:])].

    kv [T, C + R] with unit last stride, norm_weight [C], kv_pages [pages, 64, C + R] contiguous, all of one dtype.
    Tables are [length, R / 2] float32; positions, rows [T] int64. Tokens with equal rows race: these are padding, which
    goes to the null page. Contract: `ref.norm_rope_write`.
    """
    tokens, latent = kv.shape[0], norm_weight.numel()
    if tokens == 0:
        return
    pool, rope_dim = kv_pages.view(-1, kv.shape[1]), kv.shape[1] - latent
    block = triton.next_power_of_2(latent)
    per_program = max(1, 2048 // block)
    _norm_rope_write_kernel[triton.cdiv(tokens, per_program),](
        kv,
        norm_weight,
        cos_table,
        sin_table,
        positions,
        rows,
        pool,
        tokens,
        kv.stride(0),
        cos_table.stride(0),
        sin_table.stride(0),
        eps,
        latent,
        rope_dim,
        ROWS=per_program,
        BLOCK_C=block,
        BLOCK_R=max(2, triton.next_power_of_2(rope_dim)),
        num_warps=4,
        **pdl(kv),
    )
