"""Paged MLA decode on Hopper for few heads: `mla_decode.mla_decode` with up to 16 rows of queries per sequence.

The tensor core's left operand has at least 64 rows. With the queries there, as in `decode_hopper.py`, most would be
padding. So here it is the page: its rows as keys, and transposed as values.

    scores [64 keys, rows] = page @ queries.T        output [v, rows] += page[:, :v].T @ weights [64 keys, rows]

A program has an SM to itself, and reads as fast as memory allows. So a batch is cut into about as many splits as there
are SMs: `plan_splits`, once per step. `kernels/hopper.py` explains the loader warp and the barriers.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import hopper
from kernels.gemm import num_sms
from kernels.hopper import barriers, clear_end, load_pages, load_rows, tile
from kernels.pdl import after_previous, pdl

PAGE = 64  # rows of a KV page
ROWS = 16  # the most rows of queries: the heads of all tokens of a sequence


class Splits(NamedTuple):
    """How a batch is cut. Sequence b has splits starts[b] to starts[b + 1]."""

    table: Tensor  # [N, 4] int32: sequence, first page, pages, and how many splits the sequence has
    starts: Tensor  # [B + 1] int32; the last one says how many rows of the table are in use


@triton.jit(do_not_specialize=["kv_lens", "batch", "wanted"])
def _plan_kernel(kv_lens, table, starts, batch, wanted, PAGE: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr):
    """Cut each sequence into parts that differ by a page at most: its share of `wanted`, rounded down, but one or more.

    Rounding up could make a few more programs than there are SMs, and these would take as long as all others did.
    """
    after_previous(PDL, LET_NEXT=False)  # the plan's readers do not wait for it: see kernels/pdl.py
    seq = tl.arange(0, BLOCK_B)
    here = seq < batch
    pages = tl.cdiv(tl.load(kv_lens + seq, mask=here, other=0), PAGE)
    parts = wanted * pages // tl.maximum(tl.sum(pages, 0), 1)
    parts = tl.where(here, tl.maximum(tl.minimum(parts, pages), 1), 0)
    ends = tl.cumsum(parts, 0)
    tl.store(starts + seq, ends - parts, mask=here)
    tl.store(starts + batch, tl.sum(parts, 0))
    some = tl.maximum(parts, 1)
    for i in range(tl.max(parts, 0)):
        begin, end = pages * i // some, pages * (i + 1) // some
        row = table + (ends - parts + i) * 4
        tl.store(row, seq, mask=i < parts)
        tl.store(row + 1, begin, mask=i < parts)
        tl.store(row + 2, end - begin, mask=i < parts)
        tl.store(row + 3, parts, mask=i < parts)


def plan_splits(kv_lens: Tensor) -> Splits:
    """Cut a batch of lengths [B] int32 for this GPU. Nothing waits for the host."""
    batch, wanted = len(kv_lens), num_sms(kv_lens.device)
    table = kv_lens.new_empty(wanted + batch, 4)
    starts = kv_lens.new_empty(batch + 1)
    block = max(256, triton.next_power_of_2(batch))
    _plan_kernel[1,](kv_lens, table, starts, batch, wanted, PAGE, block, num_warps=4, **pdl(kv_lens))
    return Splits(table, starts)


@gluon.jit
def _store(acc, out, partial, rows, first_col, whole, v_dim: gl.constexpr):
    """Store columns of the output from first_col on: to `out` if the sequence was not cut, else to `partial`."""
    col = first_col + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))[:, None]
    row = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))[None]
    here = (row < rows) & (col < v_dim)
    if whole:
        gl.store(out + row * v_dim + col, acc.to(out.dtype.element_ty), mask=here)
    else:
        gl.store(partial + row * v_dim + col, acc, mask=here)


@gluon.jit
def _attend(
    q_left,
    q_right,
    q_rest,
    q_full,
    left,
    right,
    rest,
    full,
    empty,
    last_page,
    pages,
    last,
    scale,
    out,
    partial,
    lse,
    rows,
    whole,
    first_limit,
    of_token,
    v_dim: gl.constexpr,
    Q_LEN: gl.constexpr,
):
    """Run four warps: attend the rows to the pages, then store the split's output.

    Scores and outputs have the same layout, rows along its columns. So what is known by row needs no conversion.
    """
    PAGE: gl.constexpr = left.shape[1]
    HALF: gl.constexpr = left.shape[2]
    ROWS: gl.constexpr = q_left.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PAGE], gl.bfloat16)
    p = gl.allocate_shared_memory(gl.bfloat16, [ROWS, PAGE], p_layout).permute((1, 0))
    mbarrier.wait(q_full, 0)
    clear_end(left, right, rest, full, last)

    row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    key = gl.arange(0, PAGE, gl.SliceLayout(1, layout))
    # The last page, which comes first, may have no key for the rows of an earlier token.
    LOWEST: gl.constexpr = float("-inf") if Q_LEN == 1 else -1e30
    top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(0, layout))
    limit = gl.minimum(first_limit + row // of_token, last)
    total = gl.zeros([PAGE, ROWS], gl.float32, layout)  # summed over keys once, at the end
    zeros = gl.zeros([PAGE, ROWS], gl.float32, layout)
    acc_left = gl.zeros([HALF, ROWS], gl.float32, layout)
    acc_right = gl.zeros([HALF, ROWS], gl.float32, layout)
    for i in range(pages):
        here = i % 2
        mbarrier.wait(full.index(here), i // 2 & 1)
        scores = warpgroup_mma(rest.index(here), q_rest.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma(left.index(here), q_left.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma(right.index(here), q_right.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if Q_LEN == 1:
            scores = gl.where(((last_page - i) * PAGE + key < last)[:, None], scores, float("-inf"))
        else:
            scores = gl.where(((last_page - i) * PAGE + key)[:, None] < limit[None], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 0) * scale)
        weights = gl.exp2(scores * scale - new_top[None])
        p.store(weights.to(gl.bfloat16))
        shrink = gl.exp2(top - new_top)
        acc_left = acc_left * shrink[None]
        acc_right = acc_right * shrink[None]
        fence_async_shared()
        gl.thread_barrier()
        acc_left = warpgroup_mma(left.index(here).permute((1, 0)), p, acc_left, is_async=True)
        acc_right = warpgroup_mma(right.index(here).permute((1, 0)), p, acc_right, is_async=True)
        total = total * shrink[None] + weights
        top = new_top
        acc_left, acc_right = warpgroup_mma_wait(0, deps=[acc_left, acc_right])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(here), count=1)

    norm = gl.sum(total, 0)
    inverse = 1.0 / gl.where(norm > 0, norm, 1.0)  # an empty sequence gives zeros
    _store(acc_left * inverse[None], out, partial, rows, 0, whole, v_dim)
    _store(acc_right * inverse[None], out, partial, rows, HALF, whole, v_dim)
    if not whole:
        gl.store(lse + row, top + gl.log2(norm), mask=row < rows)


@gluon.jit
def _load(
    q_left_desc,
    q_right_desc,
    q_rest_desc,
    row,
    q_full,
    q_left,
    q_right,
    q_rest,
    left_desc,
    right_desc,
    rest_desc,
    page_row,
    last_page,
    pages,
    new_page,
    left,
    right,
    rest,
    full,
    empty,
    PDL: gl.constexpr,
):
    """Run the loader warp. Old pages fill both buffers while the kernel before still makes the queries."""
    if PDL:  # noqa: SIM102 (this is known at compile time, the next is not)
        if last_page >= new_page:
            gdc_wait()
    ahead = gl.minimum(pages, 2)
    load_pages(left_desc, right_desc, rest_desc, page_row, last_page, 0, ahead, left, right, rest, full, empty)
    if PDL:
        gdc_wait()
    load_rows(q_left_desc, q_right_desc, q_rest_desc, row, q_full, q_left, q_right, q_rest)
    load_pages(left_desc, right_desc, rest_desc, page_row, last_page, ahead, pages, left, right, rest, full, empty)


@gluon.jit(do_not_specialize=["page_table", "kv_lens", "batch", "table_stride"])
def few_heads_kernel(
    q_left_desc,
    q_right_desc,
    q_rest_desc,
    left_desc,
    right_desc,
    rest_desc,
    page_table,
    kv_lens,
    split_table,
    starts,
    out_ptr,
    partial_ptr,
    lse_ptr,
    batch,
    rows,
    of_token,
    scale,
    table_stride,
    v_dim: gl.constexpr,
    Q_LEN: gl.constexpr,
    PDL: gl.constexpr,
):
    """Compute one split per program. `rows`: the heads of all tokens of a sequence, Q H. `of_token`: those of one.

    Whatever is older than the step's own rows is read while the kernel before still runs: see kernels/pdl.py.
    """
    ROWS: gl.constexpr = q_left_desc.block_type.shape[0]
    PAGE: gl.constexpr = left_desc.block_type.shape[0]
    HALF: gl.constexpr = left_desc.block_type.shape[1]
    REST: gl.constexpr = rest_desc.block_type.shape[1]
    q_left = gl.allocate_shared_memory(gl.bfloat16, [ROWS, HALF], q_left_desc.layout)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [ROWS, HALF], q_left_desc.layout)
    q_rest = gl.allocate_shared_memory(gl.bfloat16, [ROWS, REST], q_rest_desc.layout)
    left = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, HALF], left_desc.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, HALF], left_desc.layout)
    rest = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, REST], rest_desc.layout)
    q_full, full, empty = barriers(1, 1), barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    if PDL:  # `pdl.let_next`, which Gluon cannot call
        gdc_launch_dependents()
    split = gl.program_id(0)
    if split >= gl.load(starts + batch):
        if PDL:
            gdc_wait()
        return
    entry = split_table + split * 4
    seq, first_page = gl.load(entry), gl.load(entry + 1)
    pages, used = gl.load(entry + 2), gl.load(entry + 3)
    kv_len = gl.load(kv_lens + seq)
    last_page = first_page + pages - 1
    last = gl.minimum((last_page + 1) * PAGE, kv_len)
    out_row, partial_row = seq.to(gl.int64) * rows, split.to(gl.int64) * rows
    attend = (
        q_left,
        q_right,
        q_rest,
        q_full.index(0),
        left,
        right,
        rest,
        full,
        empty,
        last_page,
        pages,
        last,
        scale,
        out_ptr + out_row * v_dim,
        partial_ptr + partial_row * v_dim,
        lse_ptr + partial_row,
        rows,
        used <= 1,
        kv_len - Q_LEN + 1,
        of_token,
        v_dim,
        Q_LEN,
    )
    page_row = page_table + seq.to(gl.int64) * table_stride
    new_page = (kv_len - Q_LEN) // PAGE  # the first page with rows of this step
    load = (
        q_left_desc,
        q_right_desc,
        q_rest_desc,
        seq * rows,
        q_full.index(0),
        q_left,
        q_right,
        q_rest,
        left_desc,
        right_desc,
        rest_desc,
        page_row,
        last_page,
        pages,
        new_page,
        left,
        right,
        rest,
        full,
        empty,
        PDL,
    )
    gl.warp_specialize([(_attend, attend), (_load, load)], [1], [24])


def serves(q: Tensor, batch: int, main: int, v_dim: int) -> bool:
    """Can it attend q [B Q, H, C + R], and is it the fastest there? `main`: the largest power of two of columns."""
    rows, rest = len(q) // max(1, batch) * q.shape[1], q.shape[2] - main
    return rows <= ROWS and 128 <= main <= 512 and v_dim <= main and 0 < rest <= 256 and hopper.on_hopper(q)


def launch(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    splits: Splits,
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    scale: float,
    main: int,
    rest: int,
    q_len: int,
    early: bool,
) -> None:
    """Fill `out` [B Q, H, v], or partial [N, Q H, v] and lse [N, Q H] for sequences with several splits.

    q [B Q, H, d], pages [pages * 64, d]. `scale` includes log2(e). `early`: it may start while the kernel
    before still runs. kernels/pdl.py says when that is right.
    """
    (_, of_token, kv_dim), half = q.shape, main // 2
    q_tiles, kv_tiles = (
        (tile(x, height, half), tile(x[:, half:], height, half), tile(x[:, main:], height, rest))
        for x, height in ((q.reshape(-1, kv_dim), ROWS), (pages, PAGE))
    )
    few_heads_kernel[len(splits.table),](
        *q_tiles,
        *kv_tiles,
        page_table,
        kv_lens,
        splits.table,
        splits.starts,
        out,
        partial,
        lse,
        len(kv_lens),
        q_len * of_token,
        of_token,
        scale,
        page_table.stride(0),
        out.shape[-1],
        Q_LEN=q_len,
        num_warps=4,
        maxnreg=128,  # of an SM's registers, half is left: the kernels that follow can wait there
        **(pdl(q) if early else {"PDL": False}),
    )
