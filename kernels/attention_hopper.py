"""The attention kernels' fast paths, in Gluon (Triton's lower level): Hopper only, bf16, head dims of 2^a + 2^b.

The same loops as `kernels/attention.py` (read that first), with what its compiler decides decided here. One warp, the
loader, does nothing but ask TMA for tiles, two buffers of each; it and the warps that compute meet at barriers in
shared memory: `full` flips when a tile has arrived, `empty` when its readers are done with it. Blocks are visited from
the last key to the first, so that masks and half-filled pages are the loop's start.
"""

import functools

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def _load_pair(main_desc, rest_desc, row, col, rest_col, bar, main, rest):
    """Ask TMA for one tile [N, MAIN] and its [N, REST]; `bar` flips when both are in shared memory."""
    mbarrier.expect(bar, main_desc.block_type.nbytes + rest_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(rest_desc, [row, rest_col], bar, rest)
    tma.async_copy_global_to_shared(main_desc, [row, col], bar, main)


@gluon.jit
def _start_scores(q_main, q_rest, k_main, k_rest, zeros):
    scores = warpgroup_mma(q_main, k_main.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _clear_rows(tile, first):
    """Zero the rows of a shared tile from `first` on: 0 * NaN would spoil the product of weights and values."""
    COLS: gl.constexpr = tile.shape[1]
    WIDTH: gl.constexpr = 64 if COLS > 64 else COLS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    for col in gl.static_range(0, COLS, WIDTH):
        piece = tile.slice(col, WIDTH, dim=1)
        values = piece.load(layout)
        piece.store(gl.where((row < first)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _split_plan(kv_lens, seq, batch, splits, most, PAGE: gl.constexpr, BLOCK_B: gl.constexpr):
    """`attention._split_plan`, in Gluon."""
    every = gl.arange(0, BLOCK_B, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    all_pages = gl.sum(gl.cdiv(gl.load(kv_lens + every, mask=every < batch, other=0), PAGE), 0)
    pages = gl.cdiv(gl.load(kv_lens + seq), PAGE)
    wanted = (2 * splits * batch * pages + all_pages) // gl.maximum(2 * all_pages, 1)
    wanted = gl.maximum(gl.minimum(gl.minimum(wanted, most), pages // 2), 1)
    chunk = gl.maximum(gl.cdiv(pages, wanted), 1)
    return chunk, gl.cdiv(pages, chunk)


@gluon.jit
def _decode_load(kv_main_desc, kv_rest_desc, page_table, last_page, pages, main, rest, full, empty):
    """The loader: page after page, into the buffer that is free."""
    for i in range(pages):
        row = gl.load(page_table + last_page - i) * kv_main_desc.block_type.shape[0]
        at = i % 2
        mbarrier.wait(empty.index(at), (i // 2 & 1) ^ 1)
        _load_pair(kv_main_desc, kv_rest_desc, row, 0, 0, full.index(at), main.index(at), rest.index(at))


@gluon.jit
def _decode_attend(
    q_main, q_rest, q_full, main, rest, full, empty, last_page, pages, last, scale, out_ptr, partial_ptr, lse_ptr,
    out_row, partial_row, first_head, heads, whole, v_dim: gl.constexpr,
):  # fmt: skip
    """Eight warps: 64 heads over the pages, then the split's output."""
    BLOCK_H: gl.constexpr = q_main.shape[0]
    PAGE: gl.constexpr = main.shape[1]
    MAIN: gl.constexpr = main.shape[2]
    # the two warpgroups hold all 64 heads and half the columns each, of the scores (32) and of the output (256)
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PAGE // 2, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, MAIN // 2, 16])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, PAGE], gl.bfloat16)
    p = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, PAGE], p_layout)
    mbarrier.wait(q_full, 0)
    if last % PAGE > 0:  # the page in which the sequence ends
        mbarrier.wait(full.index(0), 0)
        _clear_rows(main.index(0), last % PAGE)
        _clear_rows(rest.index(0), last % PAGE)
        fence_async_shared()
        gl.thread_barrier()

    head = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, score_layout))
    key = gl.arange(0, PAGE, gl.SliceLayout(0, score_layout))
    top = gl.full([BLOCK_H], float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
    total = gl.zeros([BLOCK_H, PAGE], gl.float32, score_layout)  # summed over columns once, at the end
    zeros = gl.zeros([BLOCK_H, PAGE], gl.float32, score_layout)
    acc = gl.zeros([BLOCK_H, MAIN], gl.float32, out_layout)
    for i in range(pages):
        here = i % 2
        mbarrier.wait(full.index(here), i // 2 & 1)
        scores = _start_scores(q_main, q_rest, main.index(here), rest.index(here), zeros)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where(((last_page - i) * PAGE + key < last)[None], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_top[:, None])
        p.store(weights.to(gl.bfloat16))
        shrink = gl.exp2(top - new_top)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(p, main.index(here), acc, is_async=True)
        total = total * shrink[:, None] + weights
        top = new_top
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(here), count=1)

    norm = gl.sum(total, 1)
    inverse = 1.0 / gl.where(norm > 0, norm, 1.0)  # an empty sequence gives zeros
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, out_layout))[:, None]
    row = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, out_layout))[:, None]
    col = gl.arange(0, MAIN, gl.SliceLayout(0, out_layout))[None]
    here = (row < heads) & (col < v_dim)
    if whole:
        gl.store(out_ptr + (out_row + row) * v_dim + col, acc.to(out_ptr.dtype.element_ty), mask=here)
    else:
        gl.store(partial_ptr + (partial_row + row) * v_dim + col, acc, mask=here)
        gl.store(lse_ptr + partial_row + head, top + gl.log2(norm), mask=head < heads)


@gluon.jit
def decode_kernel(
    q_main_desc, q_rest_desc, kv_main_desc, kv_rest_desc, page_table, kv_lens, out_ptr, partial_ptr, lse_ptr, used_ptr,
    heads, splits, scale, table_stride, v_dim: gl.constexpr, BLOCK_B: gl.constexpr,
):  # fmt: skip
    BLOCK_H: gl.constexpr = q_main_desc.block_type.shape[0]
    PAGE: gl.constexpr = kv_main_desc.block_type.shape[0]
    MAIN: gl.constexpr = kv_main_desc.block_type.shape[1]
    REST: gl.constexpr = kv_rest_desc.block_type.shape[1]
    split, seq, most = gl.program_id(1), gl.program_id(2), gl.num_programs(1)
    chunk, used = _split_plan(kv_lens, seq, gl.num_programs(2), splits, most, PAGE, BLOCK_B)
    if split == 0 and gl.program_id(0) == 0:
        gl.store(used_ptr + seq, used)
    if split >= gl.maximum(used, 1):
        return
    last = gl.minimum((split + 1) * chunk * PAGE, gl.load(kv_lens + seq))
    pages = gl.cdiv(last, PAGE) - split * chunk  # 0 for an empty sequence
    last_page = split * chunk + pages - 1

    q_main = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, MAIN], q_main_desc.layout)
    q_rest = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, REST], q_rest_desc.layout)
    main = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, MAIN], kv_main_desc.layout)
    rest = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, REST], kv_rest_desc.layout)
    q_full, full, empty = _barriers(1, 1), _barriers(2, 1), _barriers(2, 1)
    fence_async_shared()
    first_head = gl.program_id(0) * BLOCK_H
    _load_pair(q_main_desc, q_rest_desc, seq * heads + first_head, 0, 0, q_full.index(0), q_main, q_rest)
    seq64 = seq.to(gl.int64)
    attend = (
        q_main, q_rest, q_full.index(0), main, rest, full, empty, last_page, pages, last, scale, out_ptr, partial_ptr,
        lse_ptr, seq64 * heads, (seq64 * most + split) * heads, first_head, heads, used <= 1, v_dim,
    )  # fmt: skip
    table = page_table + seq64 * table_stride
    load = (kv_main_desc, kv_rest_desc, table, last_page, pages, main, rest, full, empty)
    gl.warp_specialize([(_decode_attend, attend), (_decode_load, load)], [1], [24])


@gluon.jit
def _softmax(scores, top, total, scale, first_key, reach, MASK: gl.constexpr, p_layout: gl.constexpr):
    """One block of the running softmax: its weights as the next product's left side, and the state after it."""
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
):  # fmt: skip
    """The loader: blocks of keys and values, the last one first."""
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
    j, count, acc, p, top, total, q_main, q_rest, k_main, k_rest, v, k_full, k_empty, v_full, v_empty, scale, reach,
    MASK: gl.constexpr,
):  # fmt: skip
    """Block j's product and block j + 1's scores go to the tensor cores; j + 1's softmax runs beside the product."""
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
    q_main, q_rest, q_full, k_main, k_rest, v, k_full, k_empty, v_full, v_empty, count, first_row, num_q, num_kv, scale,
    out_ptr, out_stride,
):  # fmt: skip
    """Four warps: 64 queries over the blocks. Block j is the j-th from the end, its tiles in buffers j % 2."""
    ROWS: gl.constexpr = q_main.shape[0]
    BLOCK_N: gl.constexpr = v.shape[1]
    V_DIM: gl.constexpr = v.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    first_reach = first_row + num_kv - num_q  # the last key that the first of these queries sees
    reach = first_reach + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    masked = gl.maximum(count - (first_reach + 1) // BLOCK_N, 1)  # blocks that hide a key from some query
    # finite: going backwards, a query may see no key of its first blocks, and -inf - -inf would be NaN
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
    if count * BLOCK_N > num_kv:  # past the end: the next sequence's values, or NaN (both warpgroups clear all: equal)
        mbarrier.wait(v_full.index(0), 0)
        _clear_rows(v.index(0), num_kv - (count - 1) * BLOCK_N)
        fence_async_shared()
        gl.thread_barrier()
    for j in range(masked - 1):
        acc, p, top, total = _prefill_step(
            j, count, acc, p, top, total, q_main, q_rest, k_main, k_rest, v, k_full, k_empty, v_full, v_empty, scale,
            reach, True,
        )  # fmt: skip
    for j in range(masked - 1, count - 1):
        acc, p, top, total = _prefill_step(
            j, count, acc, p, top, total, q_main, q_rest, k_main, k_rest, v, k_full, k_empty, v_full, v_empty, scale,
            reach, False,
        )  # fmt: skip
    mbarrier.wait(v_full.index((count - 1) % 2), (count - 1) // 2 & 1)
    acc = warpgroup_mma(p, v.index((count - 1) % 2), acc)

    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))[:, None]
    query = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))[:, None]
    col = gl.arange(0, V_DIM, gl.SliceLayout(0, out_layout))[None]
    gl.store(out_ptr + query.to(gl.int64) * out_stride + col, acc.to(gl.bfloat16), mask=(query < num_q) & (col >= 0))


@gluon.jit
def prefill_kernel(
    q_main_desc, q_rest_desc, k_main_desc, k_rest_desc, v_desc, q_starts, kv_starts, out_ptr, heads, scale,
    q_head_stride, k_head_stride, v_head_stride,
):  # fmt: skip
    """k_rest: all heads share it."""
    ROWS: gl.constexpr = q_main_desc.block_type.shape[0]  # queries of a warpgroup
    BLOCK_N: gl.constexpr = k_main_desc.block_type.shape[0]
    MAIN: gl.constexpr = k_main_desc.block_type.shape[1]
    REST: gl.constexpr = k_rest_desc.block_type.shape[1]
    V_DIM: gl.constexpr = v_desc.block_type.shape[1]
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * 2 * ROWS  # the longest first
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
    q_full, k_full, v_full = _barriers(2, 1), _barriers(2, 1), _barriers(2, 1)
    k_empty, v_empty = _barriers(2, 2), _barriers(2, 2)  # both warpgroups read each
    fence_async_shared()
    for i in gl.static_range(2):
        _load_pair(
            q_main_desc, q_rest_desc, q_start + first_row + i * ROWS, head * q_head_stride, head * q_head_stride,
            q_full.index(i), q_main.index(i), q_rest.index(i),
        )  # fmt: skip
    out_ptr += (q_start.to(gl.int64) * heads + head) * V_DIM
    first = (
        q_main.index(0), q_rest.index(0), q_full.index(0), k_main, k_rest, v, k_full, k_empty, v_full, v_empty, count,
        first_row, num_q, num_kv, scale, out_ptr, heads * V_DIM,
    )  # fmt: skip
    second = (
        q_main.index(1), q_rest.index(1), q_full.index(1), k_main, k_rest, v, k_full, k_empty, v_full, v_empty, count,
        first_row + ROWS, num_q, num_kv, scale, out_ptr, heads * V_DIM,
    )  # fmt: skip
    load = (
        k_main_desc, k_rest_desc, v_desc, kv_start + (count - 1) * BLOCK_N, head * k_head_stride, head * v_head_stride,
        count, k_main, k_rest, v, k_full, k_empty, v_full, v_empty,
    )  # fmt: skip
    gl.warp_specialize([(_prefill_rows, first), (_prefill_rows, second), (_prefill_load, load)], [4, 1], [240, 24])


@functools.cache
def _tile_layout(rows: int, cols: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, cols], gl.bfloat16)


def _tile(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """x [N, columns] for TMA tiles [rows, cols]."""
    return TensorDescriptor.from_tensor(x, [rows, cols], _tile_layout(rows, cols))


def _tiles(x: Tensor, main: int, rest: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of 64 rows and the first `main` columns of x [N, columns], and of its others."""
    return _tile(x, 64, main), _tile(x[:, main:], 64, rest)


def _flat(x: Tensor) -> Tensor:
    """[N, H, d] with any strides -> a view [N, columns], head h's at column h * x.stride(1)."""
    return x.as_strided((x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]), (x.stride(0), 1))


def _on_hopper(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)


def can_decode(q: Tensor, main: int, v_dim: int) -> bool:
    return _on_hopper(q) and 64 <= main <= 512 and v_dim <= main < q.shape[2]


def can_prefill(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> bool:
    sizes = k_nope.shape[2] in (32, 64, 128), k_rope.shape[1] in (16, 32, 64), v.shape[2] in (16, 32, 64, 128)
    return _on_hopper(q) and all(sizes)


def launch_decode(
    q: Tensor, rows: Tensor, page_table: Tensor, kv_lens: Tensor, out: Tensor, partial: Tensor, lse: Tensor,
    used: Tensor, splits: int, scale: float, main: int, rest: int,
) -> None:  # fmt: skip
    """As `attention._decode_kernel`: out [B, H, v], or partial [B, most, H, v] and lse for sequences with used > 1.

    q [B, H, d], rows [pages * 64, d]. 64 heads a program: 72 KB of queries and two 72 KB pages fill an SM's shared
    memory, the output's 128 KB half its registers.
    """
    batch, heads, kv_dim = q.shape
    decode_kernel[triton.cdiv(heads, 64), partial.shape[1], batch](
        *_tiles(q.reshape(-1, kv_dim), main, rest), *_tiles(rows, main, rest), page_table, kv_lens, out,
        partial, lse, used, heads, splits, scale, page_table.stride(0), out.shape[-1],
        BLOCK_B=max(256, triton.next_power_of_2(batch)), num_warps=8,
    )  # fmt: skip


def launch_prefill(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, q_starts: Tensor, kv_starts: Tensor, out: Tensor, max_q: int,
    scale: float,
) -> None:  # fmt: skip
    """Fill out [sum q, H, dv]. 128 queries a program, 64 a warpgroup; two buffers of 128 keys and of 128 values."""
    nope, rope, dv = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    prefill_kernel[triton.cdiv(max_q, 128), q.shape[1], len(q_starts) - 1](
        _tile(_flat(q), 64, nope), _tile(_flat(q[..., nope:]), 64, rope), _tile(_flat(k_nope), 128, nope),
        _tile(k_rope, 128, rope), _tile(_flat(v), 128, dv), q_starts, kv_starts, out, q.shape[1], scale,
        q.stride(1), k_nope.stride(1), v.stride(1), num_warps=4,
    )  # fmt: skip
