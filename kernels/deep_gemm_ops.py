"""DeepGEMM behind our contracts (Hopper; bf16, and fp8 with float32 scales and bf16 out)."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deep_gemm
import torch
from torch import Tensor

from kernels import nvcc_ahead
from kernels.groups import Groups, check_groups
from kernels.quant import silu_mul_masked

deep_gemm.set_pdl(True)  # see kernels/pdl.py. All threads of its kernels wait before they read a tensor
BY_ROWS = True  # the number of rows decides which blocks fill the GPU best, and so the kernel


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Serve `ref.grouped_gemm_contiguous`. Groups must be padded to 128 rows."""
    check_groups(x, weight, groups)
    out = x.new_empty(x.shape[0], weight.shape[1])
    if x.shape[0]:
        _call(deep_gemm.m_grouped_bf16_gemm_nt_contiguous, x, weight, out, groups.ends, use_psum_layout=True)
    return out


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Serve `ref.grouped_gemm_masked`. An expert's room must be a multiple of 128 rows."""
    _check_room(x)
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    if x.shape[1]:
        _call(deep_gemm.m_grouped_bf16_gemm_nt_masked, x, weight, out, counts, _expected_rows(x))
    return out


def swiglu_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Serve `ref.swiglu_masked`, with our silu_mul. Rooms as for `grouped_gemm_masked`."""
    return silu_mul_masked(grouped_gemm_masked(x, weight, counts), counts)


def gemm_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Serve `ref.gemm_fp8`. D must be a multiple of 128, N a multiple of 64."""
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    if x.shape[0]:
        rows = (x, _column_major(x_scale))
        _call(deep_gemm.fp8_gemm_nt, rows, (weight, weight_scale), out, disable_ue8m0_cast=True)
    return out


def grouped_gemm_contiguous_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Groups
) -> Tensor:
    """Serve `ref.grouped_gemm_contiguous_fp8`. Groups must be padded to 128 rows; widths as for `gemm_fp8`."""
    check_groups(x, weight, groups)
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=torch.bfloat16)
    if x.shape[0]:
        rows = (x, _column_major(x_scale))
        rest = (weight, weight_scale), out, groups.ends
        _call(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, rows, *rest, disable_ue8m0_cast=True, use_psum_layout=True)
    return out


def grouped_gemm_masked_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor) -> Tensor:
    """Serve `ref.grouped_gemm_masked_fp8`. Rooms as for `grouped_gemm_masked`, widths as for `gemm_fp8`."""
    _check_room(x)
    out = x.new_empty(*x.shape[:2], weight.shape[1], dtype=torch.bfloat16)
    if x.shape[1]:
        rows = (x, _column_major(x_scale))
        rest = (weight, weight_scale), out, counts, _expected_rows(x)
        _call(deep_gemm.m_grouped_fp8_gemm_nt_masked, rows, *rest, disable_ue8m0_cast=True)
    return out


@contextmanager
def leave_sms(count: int) -> Iterator[None]:
    """Keep `count` SMs (even) free of the products enqueued inside: a communication kernel holds them.

    A new count means new kernels, compiled on first use.
    """
    all_sms = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(all_sms - count)
    try:
        yield
    finally:
        deep_gemm.set_num_sms(all_sms)


def _check_room(x: Tensor) -> None:
    """Raise ValueError for a room in which the kernels' blocks (64 or 128 rows) would overwrite the next expert's."""
    if x.shape[1] % 128:
        raise ValueError(f"an expert's room must be a multiple of 128 rows: {x.shape[1]} % 128 = {x.shape[1] % 128}")


def _expected_rows(x: Tensor) -> int:
    """Guess the rows per expert: a quarter of its room. It only tunes the kernel."""
    return max(1, x.shape[1] // 4)


def _column_major(scale: Tensor) -> Tensor:
    """Return the scales as TMA reads them: columns contiguous, each padded to 16 bytes. Copies only where needed."""
    columns = _call(deep_gemm.get_mn_major_tma_aligned_tensor, scale)
    if columns is None:
        *lead, rows, groups = scale.shape
        columns = scale.new_empty(*lead, groups, -(-rows // 4) * 4).transpose(-1, -2)[..., :rows, :]
    return columns


def _call(function: Callable, *arguments: Any, **options: Any) -> Any:
    """Call a function of DeepGEMM. A rehearsal may leave it out: then return None, and no tensor is written."""
    if nvcc_ahead.rehearsing is None:
        return function(*arguments, **options)
    what = function.__name__, deep_gemm.get_num_sms(), _shapes(arguments)
    return nvcc_ahead.rehearsing.attempt(what, partial(function, *arguments, **options))


def _shapes(arguments: Any) -> Hashable:
    """Return all that a kernel may depend on: shapes and strides of tensors, and other values."""
    match arguments:
        case Tensor():
            return arguments.shape, arguments.stride()
        case tuple():
            return tuple(map(_shapes, arguments))
        case _:
            return arguments
