"""Paged MLA decode on Hopper: `mla_decode.mla_decode`'s fast path, for head dims of 2^a + 2^b (`kernels/hopper.py`)."""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels import hopper
from kernels.hopper import barriers, clear_end, load_pages, load_rows, tile


@gluon.jit
def _split_plan(kv_lens, seq, batch, splits, most, PAGE: gl.constexpr, BLOCK_B: gl.constexpr):
    """`mla_decode._split_plan`, in Gluon."""
    every = gl.arange(0, BLOCK_B, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    all_pages = gl.sum(gl.cdiv(gl.load(kv_lens + every, mask=every < batch, other=0), PAGE), 0)
    pages = gl.cdiv(gl.load(kv_lens + seq), PAGE)
    wanted = (2 * splits * batch * pages + all_pages) // gl.maximum(2 * all_pages, 1)
    wanted = gl.maximum(gl.minimum(gl.minimum(wanted, most), pages // 2), 1)
    chunk = gl.maximum(gl.cdiv(pages, wanted), 1)
    return chunk, gl.cdiv(pages, chunk)


@gluon.jit
def _scores(q_left, q_right, q_rest, left, right, rest, zeros):
    scores = warpgroup_mma(q_rest, rest.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_left, left.permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma(q_right, right.permute((1, 0)), scores, is_async=True)
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _store(acc, out, partial, first_head, heads, first_col, whole, v_dim: gl.constexpr):
    """Store 64 heads' columns from first_col on: to `out` if the sequence was not cut, else to `partial`."""
    BLOCK_H: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1]
    row = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, acc.type.layout))[:, None]
    col = first_col + gl.arange(0, HALF, gl.SliceLayout(0, acc.type.layout))[None]
    here = (row < heads) & (col < v_dim)
    if whole:
        gl.store(out + row * v_dim + col, acc.to(out.dtype.element_ty), mask=here)
    else:
        gl.store(partial + row * v_dim + col, acc, mask=here)


@gluon.jit
def _decode_attend(
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
    first_head,
    heads,
    whole,
    first_limit,
    of_token,
    v_dim: gl.constexpr,
    Q_LEN: gl.constexpr,
):
    """Run eight warps: attend 64 heads to the pages, then store the split's output.

    The output's columns come in two halves. The right half is scaled while the tensor cores compute the left one.
    """
    BLOCK_H: gl.constexpr = q_left.shape[0]
    PAGE: gl.constexpr = left.shape[1]
    HALF: gl.constexpr = left.shape[2]
    # Each of the two warpgroups holds all 64 heads and half the columns: 32 of the scores, 128 of each output half.
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PAGE // 2, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HALF // 2, 16])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, PAGE], gl.bfloat16)
    p = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, PAGE], p_layout)
    mbarrier.wait(q_full, 0)
    clear_end(left, right, rest, full, last)

    head = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, score_layout))
    key = gl.arange(0, PAGE, gl.SliceLayout(0, score_layout))
    # The last page, which comes first, may have no key for the rows of an earlier token.
    LOWEST: gl.constexpr = float("-inf") if Q_LEN == 1 else -1e30
    top = gl.full([BLOCK_H], LOWEST, gl.float32, gl.SliceLayout(1, score_layout))
    limit = gl.minimum(first_limit + head // of_token, last)
    total = gl.zeros([BLOCK_H, PAGE], gl.float32, score_layout)  # summed over columns once, at the end
    zeros = gl.zeros([BLOCK_H, PAGE], gl.float32, score_layout)
    # With 32 keys per warpgroup, 16 columns take 16 cycles to multiply. They take 24 to read, at 128 bytes per cycle:
    # 2 KB of queries, 1 KB of keys. So registers hold a part of the queries.
    q_rest = q_rest.load(gl.DotOperandLayout(0, score_layout, 2))
    acc_left = gl.zeros([BLOCK_H, HALF], gl.float32, out_layout)
    acc_right = gl.zeros([BLOCK_H, HALF], gl.float32, out_layout)
    for i in range(pages):
        here = i % 2
        mbarrier.wait(full.index(here), i // 2 & 1)
        scores = _scores(q_left, q_right, q_rest, left.index(here), right.index(here), rest.index(here), zeros)
        if Q_LEN == 1:
            scores = gl.where(((last_page - i) * PAGE + key < last)[None], scores, float("-inf"))
        else:
            scores = gl.where(((last_page - i) * PAGE + key)[None] < limit[:, None], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_top[:, None])
        p.store(weights.to(gl.bfloat16))
        shrink = gl.exp2(top - new_top)
        each = gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
        acc_left = acc_left * each
        fence_async_shared()
        gl.thread_barrier()
        acc_left = warpgroup_mma(p, left.index(here), acc_left, is_async=True)
        acc_right = acc_right * each
        acc_right = warpgroup_mma(p, right.index(here), acc_right, is_async=True)
        total = total * shrink[:, None] + weights
        top = new_top
        acc_left, acc_right = warpgroup_mma_wait(0, deps=[acc_left, acc_right])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(here), count=1)

    norm = gl.sum(total, 1)
    inverse = 1.0 / gl.where(norm > 0, norm, 1.0)  # an empty sequence gives zeros
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, out_layout))[:, None]
    _store(acc_left * inverse, out, partial, first_head, heads, 0, whole, v_dim)
    _store(acc_right * inverse, out, partial, first_head, heads, HALF, whole, v_dim)
    if not whole:
        gl.store(lse + head, top + gl.log2(norm), mask=head < heads)


@gluon.jit(do_not_specialize=["page_table", "kv_lens", "splits", "table_stride"])
def decode_kernel(
    q_left_desc,
    q_right_desc,
    q_rest_desc,
    left_desc,
    right_desc,
    rest_desc,
    page_table,
    kv_lens,
    out_ptr,
    partial_ptr,
    lse_ptr,
    used_ptr,
    heads,
    of_token,
    splits,
    scale,
    table_stride,
    v_dim: gl.constexpr,
    BLOCK_B: gl.constexpr,
    Q_LEN: gl.constexpr,
):
    """`heads`: those of all tokens of a sequence, Q H. `of_token`: those of one, H."""
    BLOCK_H: gl.constexpr = q_left_desc.block_type.shape[0]
    PAGE: gl.constexpr = left_desc.block_type.shape[0]
    HALF: gl.constexpr = left_desc.block_type.shape[1]
    REST: gl.constexpr = rest_desc.block_type.shape[1]
    split, seq, most = gl.program_id(1), gl.program_id(2), gl.num_programs(1)
    chunk, used = _split_plan(kv_lens, seq, gl.num_programs(2), splits, most, PAGE, BLOCK_B)
    if split == 0 and gl.program_id(0) == 0:
        gl.store(used_ptr + seq, used)
    if split >= gl.maximum(used, 1):
        return
    kv_len = gl.load(kv_lens + seq)
    last = gl.minimum((split + 1) * chunk * PAGE, kv_len)
    pages = gl.cdiv(last, PAGE) - split * chunk  # 0 for an empty sequence
    last_page = split * chunk + pages - 1

    q_left = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, HALF], q_left_desc.layout)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, HALF], q_left_desc.layout)
    q_rest = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, REST], q_rest_desc.layout)
    left = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, HALF], left_desc.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, HALF], left_desc.layout)
    rest = gl.allocate_shared_memory(gl.bfloat16, [2, PAGE, REST], rest_desc.layout)
    q_full, full, empty = barriers(1, 1), barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    first_head = gl.program_id(0) * BLOCK_H
    q_row = seq * heads + first_head
    load_rows(q_left_desc, q_right_desc, q_rest_desc, q_row, q_full.index(0), q_left, q_right, q_rest)
    seq64 = seq.to(gl.int64)
    out_row, partial_row = seq64 * heads, (seq64 * most + split) * heads
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
        first_head,
        heads,
        used <= 1,
        kv_len - Q_LEN + 1,
        of_token,
        v_dim,
        Q_LEN,
    )
    table = page_table + seq64 * table_stride
    load = (left_desc, right_desc, rest_desc, table, last_page, 0, pages, left, right, rest, full, empty)
    gl.warp_specialize([(_decode_attend, attend), (load_pages, load)], [1], [24])


def can_decode(q: Tensor, main: int, v_dim: int) -> bool:
    return hopper.on_hopper(q) and 64 <= main <= 512 and v_dim <= main < q.shape[2]


def launch_decode(
    q: Tensor,
    rows: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    used: Tensor,
    splits: int,
    max_splits: int,
    scale: float,
    main: int,
    rest: int,
    q_len: int,
) -> None:
    """Fill `out` [B Q, H, v], or `partial` [B * max_splits, Q H, v] and `lse` for sequences with used > 1.

    The results are those of `mla_decode._decode_kernel`. q [B Q, H, d], rows [pages * 64, d]. A program takes 64 heads:
    72 KB of queries and two 72 KB pages fill an SM's shared memory, and the output's 128 KB fill half its registers.
    """
    (_, of_token, kv_dim), batch = q.shape, len(kv_lens)
    heads, half = q_len * of_token, main // 2
    q_tiles, kv_tiles = (
        (tile(x, 64, half), tile(x[:, half:], 64, half), tile(x[:, main:], 64, rest))
        for x in (q.reshape(-1, kv_dim), rows)
    )
    decode_kernel[triton.cdiv(heads, 64), max_splits, batch](
        *q_tiles,
        *kv_tiles,
        page_table,
        kv_lens,
        out,
        partial,
        lse,
        used,
        heads,
        of_token,
        splits,
        scale,
        page_table.stride(0),
        out.shape[-1],
        BLOCK_B=max(256, triton.next_power_of_2(batch)),
        Q_LEN=q_len,
        num_warps=8,
    )
