"""Dense products in bf16: cuBLAS, except for few tokens."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import ffn_of_few_rows
from kernels.gemv import FEW_TOKENS, ROWS, linear_of_few, swiglu_of_one
from kernels.pdl import after_previous, pdl
from kernels.quant import silu_mul
from kernels.rooms import FEW_ROWS


@triton.jit(do_not_specialize=["T"])
def _linear_float32_kernel(
    x,
    weight,
    out,
    T,
    N,
    x_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    rows, cols = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        a = tl.load(x + rows[:, None] * x_stride + at, mask=(rows < T)[:, None] & (at < D), other=0.0)
        b = tl.load(weight + cols[:, None].to(tl.int64) * D + at, mask=(cols < N)[:, None] & (at < D), other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    tl.store(out + rows[:, None] * N + cols, acc, mask=(rows < T)[:, None] & (cols < N))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, D] @ weight [N, D].T -> [T, N] in their dtype. Contract: `ref.linear`."""
    return linear_of_few(x, weight) if 0 < x.shape[0] <= FEW_TOKENS else F.linear(x, weight)


def ffn_beside(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return silu_mul(x @ gate_up.T) @ down.T, beside another stream's kernels. Contract: `ref.ffn_beside`.

    x [T, D], gate_up [2I, D], down [D, I] -> [T, D]. A kernel of cuBLAS needs a whole SM, and would wait for one.
    """
    if FEW_TOKENS < x.shape[0] <= FEW_ROWS and x.dtype != torch.float32:
        return ffn_of_few_rows(x, gate_up, down)
    hidden = swiglu_of_one(x, gate_up) if x.shape[0] == 1 else silu_mul(linear(x, gate_up))
    return linear(hidden, down)


def linear_float32(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x [T, D] @ weight [N, D].T in float32 [T, N], both bf16 (or float32). Contract: `ref.linear_float32`.

    Kernels of ours, which start faster, serve up to 4 tokens, or up to 64 with few outputs (a gate). cuBLAS serves the
    others.
    """
    (tokens, width), outputs = x.shape, weight.shape[0]
    if x.dtype != torch.bfloat16:
        return torch.mm(x.float(), weight.float().T, out=out)
    if 0 < tokens <= ROWS:
        return linear_of_few(x, weight, torch.float32, out)
    if tokens > 64 or outputs > 512 or tokens == 0:
        return torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
    if out is None:
        out = x.new_empty(tokens, outputs, dtype=torch.float32)
    x = x if x.stride(1) == 1 else x.contiguous()
    _linear_float32_kernel[triton.cdiv(tokens, 16), triton.cdiv(outputs, 16)](
        x,
        weight,
        out,
        tokens,
        outputs,
        x.stride(0),
        width,
        BLOCK_T=16,
        BLOCK_N=16,
        BLOCK_K=256,
        num_warps=4,
        num_stages=4,
        **pdl(x),
    )
    return out
