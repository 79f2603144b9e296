"""Causal prefill attention on Hopper: `attention.prefill_attention`'s fast path (`kernels/hopper.py`)."""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels import hopper
from kernels.hopper import barriers, clear_rows, flat, tile
from kernels.quant import FP8_MAX, SMALLEST


@gluon.jit
def _load_pair(main_desc, rest_desc, row, col, rest_col, bar, main, rest):
    """Ask TMA for a tile [N, MAIN] and the [N, REST] beside it; `bar` flips when both are in shared memory."""
    mbarrier.expect(bar, main_desc.block_type.nbytes + rest_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(rest_desc, [row, rest_col], bar, rest)
    tma.async_copy_global_to_shared(main_desc, [row, col], bar, main)


@gluon.jit
def _start_scores(q_main, q_rest, k_main, k_rest, zeros):
    scores = warpgroup_mma(q_main, k_main.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _softmax(scores, top, total, scale, first_key, reach, MASK: gl.constexpr, p_layout: gl.constexpr):
    """Do one block of the running softmax: return its weights, as the next product's left side, and the new state."""
    if MASK:
        key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None] <= reach[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return gl.convert_layout(weights.to(gl.bfloat16), p_layout), new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _prefill_load(
    k_main_desc, k_rest_desc, v_desc, row, k_col, v_col, count, k_main, k_rest, v, k_full, k_empty, v_full, v_empty
):
    """Run the loader warp: blocks of keys and values, the last one first."""
    for j in range(count):
        here, free = j % 2, (j // 2 & 1) ^ 1
        mbarrier.wait(k_empty.index(here), free)
        _load_pair(k_main_desc, k_rest_desc, row, k_col, 0, k_full.index(here), k_main.index(here), k_rest.index(here))
        mbarrier.wait(v_empty.index(here), free)
        mbarrier.expect(v_full.index(here), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [row, v_col], v_full.index(here), v.index(here))
        row -= v_desc.block_type.shape[0]


@gluon.jit
def _prefill_step(
    j,
    count,
    acc,
    p,
    top,
    total,
    q_main,
    q_rest,
    k_main,
    k_rest,
    v,
    k_full,
    k_empty,
    v_full,
    v_empty,
    scale,
    reach,
    MASK: gl.constexpr,
):
    """Multiply block j's weights and values; beside that, compute scores and softmax of block j + 1."""
    ROWS: gl.constexpr = q_main.shape[0]
    BLOCK_N: gl.constexpr = v.shape[1]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, v.shape[2], 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    here, other = j % 2, (j + 1) % 2
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    mbarrier.wait(k_full.index(other), (j + 1) // 2 & 1)
    scores = _start_scores(q_main, q_rest, k_main.index(other), k_rest.index(other), zeros)
    mbarrier.wait(v_full.index(here), j // 2 & 1)
    acc = warpgroup_mma(p, v.index(here), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(other), count=1)
    first_key = (count - 2 - j) * BLOCK_N
    p, top, total, shrink = _softmax(scores, top, total, scale, first_key, reach, MASK, p_layout)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    mbarrier.arrive(v_empty.index(here), count=1)
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None], p, top, total


@gluon.jit
def _prefill_rows(
    q_main,
    q_rest,
    q_full,
    k_main,
    k_rest,
    v,
    k_full,
    k_empty,
    v_full,
    v_empty,
    count,
    first_row,
    num_q,
    num_kv,
    scale,
    out_ptr,
    out_stride,
    scales_ptr,
):
    """Run four warps: 64 queries over all blocks. Block j is the j-th from the end, its tiles in buffers j % 2."""
    ROWS: gl.constexpr = q_main.shape[0]
    BLOCK_N: gl.constexpr = v.shape[1]
    V_DIM: gl.constexpr = v.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    first_reach = first_row + num_kv - num_q  # the last key that the first query sees
    reach = first_reach + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    masked = gl.maximum(count - (first_reach + 1) // BLOCK_N, 1)  # blocks that hide a key from some query
    # Not -inf: going backwards, a query may see no key in its first blocks, and -inf - -inf would be NaN.
    top = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, score_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score_layout))
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    acc = gl.zeros([ROWS, V_DIM], gl.float32, out_layout)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = _start_scores(q_main, q_rest, k_main.index(0), k_rest.index(0), zeros)
    scores = warpgroup_mma_wait(0, deps=[scores])
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(0), count=1)
    p, top, total, _ = _softmax(scores, top, total, scale, (count - 1) * BLOCK_N, reach, True, p_layout)
    if count * BLOCK_N > num_kv:  # past the end: another sequence's values, or NaN (both warpgroups write equal zeros)
        mbarrier.wait(v_full.index(0), 0)
        clear_rows(v.index(0), num_kv - (count - 1) * BLOCK_N)
        fence_async_shared()
        gl.thread_barrier()
    for j in range(masked - 1):
        acc, p, top, total = _prefill_step(
            j,
            count,
            acc,
            p,
            top,
            total,
            q_main,
            q_rest,
            k_main,
            k_rest,
            v,
            k_full,
            k_empty,
            v_full,
            v_empty,
            scale,
            reach,
            True,
        )
    for j in range(masked - 1, count - 1):
        acc, p, top, total = _prefill_step(
            j,
            count,
            acc,
            p,
            top,
            total,
            q_main,
            q_rest,
            k_main,
            k_rest,
            v,
            k_full,
            k_empty,
            v_full,
            v_empty,
            scale,
            reach,
            False,
        )
    mbarrier.wait(v_full.index((count - 1) % 2), (count - 1) // 2 & 1)
    acc = warpgroup_mma(p, v.index((count - 1) % 2), acc)

    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))[:, None]
    y = acc.to(gl.bfloat16)
    if out_ptr.dtype.element_ty == gl.float8e4nv:  # a head's columns share a scale: `quant.store_quantized`
        y = y.to(gl.float32)
        row_scale = gl.maximum(gl.max(gl.abs(y), 1), SMALLEST) / FP8_MAX
        y = gl.minimum(gl.maximum(y / row_scale[:, None], -FP8_MAX), FP8_MAX).to(gl.float8e4nv)
        query = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
        gl.store(scales_ptr + query, row_scale, mask=query < num_q)
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // V_DIM, V_DIM // 16], [4, 1], [1, 0])  # per thread
    query = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, wide))[:, None]
    col = gl.arange(0, V_DIM, gl.SliceLayout(0, wide))[None]
    at = out_ptr + query.to(gl.int64) * out_stride + col
    gl.store(at, gl.convert_layout(y, wide), mask=(query < num_q) & (col >= 0))


@gluon.jit(do_not_specialize=["q_starts", "kv_starts", "scale_stride"])
def prefill_kernel(
    q_main_desc,
    q_rest_desc,
    k_main_desc,
    k_rest_desc,
    v_desc,
    q_starts,
    kv_starts,
    out_ptr,
    scales_ptr,
    heads,
    scale,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    scale_stride,
):
    """Attend 128 queries of one head, 64 per warpgroup. All heads share k_rest.

    An fp8 output has one scale per row and head, in scales_ptr [H, rows].
    """
    ROWS: gl.constexpr = q_main_desc.block_type.shape[0]  # queries of a warpgroup
    BLOCK_N: gl.constexpr = k_main_desc.block_type.shape[0]
    MAIN: gl.constexpr = k_main_desc.block_type.shape[1]
    REST: gl.constexpr = k_rest_desc.block_type.shape[1]
    V_DIM: gl.constexpr = v_desc.block_type.shape[1]
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * 2 * ROWS  # programs with the most keys first
    head, seq = gl.program_id(1), gl.program_id(2)
    q_start, kv_start = gl.load(q_starts + seq).to(gl.int32), gl.load(kv_starts + seq).to(gl.int32)
    num_q = gl.load(q_starts + seq + 1).to(gl.int32) - q_start
    num_kv = gl.load(kv_starts + seq + 1).to(gl.int32) - kv_start
    if first_row >= num_q:
        return
    count = gl.cdiv(gl.minimum(first_row + 2 * ROWS + num_kv - num_q, num_kv), BLOCK_N)

    q_main = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, MAIN], q_main_desc.layout)
    q_rest = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, REST], q_rest_desc.layout)
    k_main = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, MAIN], k_main_desc.layout)
    k_rest = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, REST], k_rest_desc.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, V_DIM], v_desc.layout)
    q_full, k_full, v_full = barriers(2, 1), barriers(2, 1), barriers(2, 1)
    k_empty, v_empty = barriers(2, 2), barriers(2, 2)  # both warpgroups read each
    fence_async_shared()
    for i in gl.static_range(2):
        _load_pair(
            q_main_desc,
            q_rest_desc,
            q_start + first_row + i * ROWS,
            head * q_head_stride,
            head * q_head_stride,
            q_full.index(i),
            q_main.index(i),
            q_rest.index(i),
        )
    out_ptr += (q_start.to(gl.int64) * heads + head) * V_DIM
    scales_ptr += head.to(gl.int64) * scale_stride + q_start
    first = (
        q_main.index(0),
        q_rest.index(0),
        q_full.index(0),
        k_main,
        k_rest,
        v,
        k_full,
        k_empty,
        v_full,
        v_empty,
        count,
        first_row,
        num_q,
        num_kv,
        scale,
        out_ptr,
        heads * V_DIM,
        scales_ptr,
    )
    second = (
        q_main.index(1),
        q_rest.index(1),
        q_full.index(1),
        k_main,
        k_rest,
        v,
        k_full,
        k_empty,
        v_full,
        v_empty,
        count,
        first_row + ROWS,
        num_q,
        num_kv,
        scale,
        out_ptr,
        heads * V_DIM,
        scales_ptr,
    )
    load = (
        k_main_desc,
        k_rest_desc,
        v_desc,
        kv_start + (count - 1) * BLOCK_N,
        head * k_head_stride,
        head * v_head_stride,
        count,
        k_main,
        k_rest,
        v,
        k_full,
        k_empty,
        v_full,
        v_empty,
    )
    gl.warp_specialize([(_prefill_rows, first), (_prefill_rows, second), (_prefill_load, load)], [4, 1], [240, 24])


def can_prefill(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> bool:
    sizes = k_nope.shape[2] in (32, 64, 128), k_rope.shape[1] in (16, 32, 64), v.shape[2] in (16, 32, 64, 128)
    return hopper.on_hopper(q) and all(sizes)


def launch_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    out: Tensor,
    scales: Tensor | None,
    max_q: int,
    scale: float,
) -> None:
    """Fill out [sum q, H, dv], and if it is in fp8 also scales [sum q, H], stored column by column.

    A program takes 128 queries, 64 per warpgroup, with two buffers of 128 keys and two of 128 values.
    """
    nope, rope, dv = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    prefill_kernel[triton.cdiv(max_q, 128), q.shape[1], len(q_starts) - 1](
        tile(flat(q), 64, nope),
        tile(flat(q[..., nope:]), 64, rope),
        tile(flat(k_nope), 128, nope),
        tile(k_rope, 128, rope),
        tile(flat(v), 128, dv),
        q_starts,
        kv_starts,
        out,
        out if scales is None else scales,
        q.shape[1],
        scale,
        q.stride(1),
        k_nope.stride(1),
        v.stride(1),
        0 if scales is None else scales.stride(1),
        num_warps=4,
    )
