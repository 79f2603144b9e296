"""Products for few tokens in Triton, for decode at the smallest batches.

Two things count there. Every byte of the weights is read once, with as many loads in flight as the GPU holds. And few
kernels are launched. No tensor cores: a program multiplies a few rows of the weight with x, element by element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm import num_sms
from kernels.pdl import after_previous, let_next, pdl, wait_for_previous

FEW_TOKENS = 2  # `linear_of_few` beats cuBLAS up to this many
ROWS = 4  # weight rows per program; in `linear_of_few` rows x tokens, so it takes at most 4 tokens


@triton.jit
def _copies_kernel(
    x,
    weight,
    slots,
    out,
    N,
    D,
    share,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply row c // share of x with BLOCK_N rows of slot slots[c]'s weight [N, D], or [2N, D] if GATED.

    slots None: the only one.
    """
    after_previous(PDL)
    copy = tl.program_id(1)
    slot = copy * 0
    if slots is not None:
        slot = tl.load(slots + copy)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if slot >= 0:
        x += (copy // share).to(tl.int64) * D
        rows = weight + (slot * (2 * N if GATED else N) + col).to(tl.int64)[:, None] * D
        acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        acc_up = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            at = (d + tl.arange(0, BLOCK_D))[None, :]
            here = (col < N)[:, None] & (at < D)
            w = tl.load(rows + at, mask=here, other=0.0)
            if GATED:
                w_up = tl.load(rows + N * D + at, mask=here, other=0.0)
            a = tl.load(x + at, mask=at < D, other=0.0).to(tl.float32)
            acc += a * w.to(tl.float32)
            if GATED:
                acc_up += a * w_up.to(tl.float32)
        y = tl.sum(acc, 1)
        if GATED:  # both rounded, as a GEMM's output would be
            gate = y.to(out.dtype.element_ty).to(tl.float32)
            up = tl.sum(acc_up, 1).to(out.dtype.element_ty).to(tl.float32)
            y = gate * tl.sigmoid(gate) * up
    tl.store(out + copy.to(tl.int64) * N + col, y.to(out.dtype.element_ty), mask=col < N)


def _launch(x: Tensor, weight: Tensor, slots: Tensor | None, gated: bool) -> Tensor:
    copies, width = len(x) if slots is None else slots.numel(), weight.shape[1] // (2 if gated else 1)
    out = x.new_empty(copies, width)
    if copies:
        columns = 1024 if x.shape[1] % 1024 == 0 else 512
        _copies_kernel[triton.cdiv(width, ROWS), copies](
            x.contiguous(),
            weight,
            None if slots is None else slots.contiguous(),
            out,
            width,
            x.shape[1],
            copies // x.shape[0],
            gated,
            ROWS,
            columns,
            num_warps=4,
            **pdl(x),
        )
    return out


def gemm_of_copies(x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    """Return out[c] = x's row @ weight[slots[c]].T for every copy c = t * K + k; zeros where slots is -1.

    x [T, D], or one row per copy [T * K, D]; weight [L, N, D]; both bf16 or both float32. slots [T, K] int64
    -> [T * K, N].
    """
    return _launch(x, weight, slots, gated=False)


def swiglu_of_copies(x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    """Return silu_mul of `gemm_of_copies`, in one kernel: weight [L, 2I, D] -> [T * K, I]."""
    return _launch(x, weight, slots, gated=True)


def swiglu_of_one(x: Tensor, weight: Tensor) -> Tensor:
    """Return silu_mul(x @ weight.T): x [1, D], weight [2I, D], both bf16 or both float32 -> [1, I]."""
    return _launch(x, weight[None], None, gated=True)


@triton.jit
def _few_kernel(
    x,
    weight,
    out,
    T,
    N,
    D,
    x_stride,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply all tokens with BLOCK_N rows of the weight [N, D]. The weight's first block is read ahead of x."""
    let_next(PDL)
    token, col = tl.arange(0, TOKENS)[:, None, None], tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    at, rows = tl.arange(0, BLOCK_D)[None, None, :], weight + col.to(tl.int64) * D
    acc = tl.zeros((TOKENS, BLOCK_N, BLOCK_D), dtype=tl.float32)
    w = tl.load(rows + at, mask=(col < N) & (at < D), other=0.0)
    wait_for_previous(PDL)  # see kernels/pdl.py: weights may be read before
    for _ in range(0, D, BLOCK_D):
        a = tl.load(x + token * x_stride + at, mask=(token < T) & (at < D), other=0.0)
        acc += a.to(tl.float32) * w.to(tl.float32)
        at += BLOCK_D
        w = tl.load(rows + at, mask=(col < N) & (at < D), other=0.0)
    token, col = tl.arange(0, TOKENS)[:, None], tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + token * N + col, tl.sum(acc, 2).to(out.dtype.element_ty), mask=(token < T) & (col < N))


def linear_of_few(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Return x [T, D] @ weight [N, D].T -> [T, N] in `dtype` (None: x's), summed in float32. For 1 to 4 tokens.

    `out` [T, N] of that dtype, contiguous: where to put it; None: in a new tensor.
    """
    (tokens, width), outputs = x.shape, weight.shape[0]
    assert 1 <= tokens <= ROWS, f"{tokens=}"
    if out is None:
        out = x.new_empty(tokens, outputs, dtype=dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    block = triton.next_power_of_2(tokens)
    rows = ROWS // block
    programs = triton.cdiv(outputs, rows)
    wide = tokens == 1 and programs <= 4 * num_sms(x.device)  # an SM has registers for 4 programs with wide blocks
    _few_kernel[programs,](
        x,
        weight,
        out,
        tokens,
        outputs,
        width,
        x.stride(0),
        block,
        rows,
        2048 if wide else 1024,
        num_warps=4,
        **pdl(x),
    )
    return out
