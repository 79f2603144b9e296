"""Routing in Triton: the moves from token order to expert order and back.

A copy is one (token, k) pair. Its row is its expert's first row plus its rank among that expert's copies, counted in
token order. There are no atomics, so the order is the same on every run.

    contiguous   many copies: count per block, sum the counts of earlier blocks, rank within a block by cumulative sum,
                 and move the tokens: a kernel each
    masked       fixed rooms. Few copies: each token's program walks over those of earlier tokens, and then moves the
                 token. Many: one program per expert walks over all of them, and a second kernel moves the tokens
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups import Groups
from kernels.pdl import after_previous, pdl


@triton.jit(do_not_specialize=["num_copies"])
def count_kernel(experts, block_counts, num_copies, L, EXPERTS: tl.constexpr, COPIES: tl.constexpr, PDL: tl.constexpr):
    """Count, in block_counts[e, block], the block's copies that go to expert e."""
    after_previous(PDL)
    ids = tl.arange(0, EXPERTS)
    copy = tl.program_id(0) * COPIES + tl.arange(0, COPIES)
    expert = tl.load(experts + copy, mask=copy < num_copies, other=-1).to(tl.int32)
    hot = (expert[:, None] == ids[None, :]).to(tl.int32)  # [COPIES, EXPERTS]
    tl.store(block_counts + ids * tl.num_programs(0) + tl.program_id(0), tl.sum(hot, 0), mask=ids < L)


@triton.jit(do_not_specialize=["blocks"])
def sum_blocks_kernel(block_counts, blocks, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """Add the counts of earlier blocks to each count of one expert, in place."""
    after_previous(PDL)
    at_expert, before = block_counts + tl.program_id(0).to(tl.int64) * blocks, 0
    for start in range(0, blocks, BLOCKS):
        at = start + tl.arange(0, BLOCKS)
        counts = tl.load(at_expert + at, mask=at < blocks, other=0)
        tl.store(at_expert + at, before + tl.cumsum(counts, 0), mask=at < blocks)
        before += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["num_copies"])
def place_kernel(
    experts,
    block_ends,
    ends,
    index,
    num_copies,
    L,
    EXPERTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COPIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store index[copy] = e's first row + copies to e in earlier blocks + earlier copies to e in its own block.

    A copy that goes nowhere gets -1. block_ends [L, blocks]: copies up to each block's end. The first program also
    stores where each expert's rows end.
    """
    after_previous(PDL)
    block, blocks = tl.program_id(0), tl.num_programs(0)
    ids = tl.arange(0, EXPERTS)
    total = tl.load(block_ends + ids * blocks + blocks - 1, mask=ids < L, other=0)
    padded = tl.cdiv(total, ALIGNMENT) * ALIGNMENT
    start = tl.cumsum(padded, 0) - padded
    if block == 0:
        tl.store(ends + ids, start + total, mask=ids < L)
    copy = block * COPIES + tl.arange(0, COPIES)
    expert = tl.load(experts + copy, mask=copy < num_copies, other=-1).to(tl.int32)
    hot = (expert[:, None] == ids[None, :]).to(tl.int32)
    first = start + tl.load(block_ends + ids * blocks + block - 1, mask=(ids < L) & (block > 0), other=0)
    rank = tl.sum((tl.cumsum(hot, 0) - 1 + first[None, :]) * hot, 1)  # [COPIES]
    tl.store(index + copy, tl.where(expert >= 0, rank, -1).to(tl.int64), mask=copy < num_copies)


@triton.jit(do_not_specialize_on_alignment=["scale_col"])
def _move_kernel(
    x,
    out,
    scales,
    scales_out,
    scale_row,
    scale_col,
    S,
    D,
    index,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store out[index[n, k]] = x[n] for every k: a token is read once. Its first program also moves its scales.

    Most copies may go nowhere. A branch, unlike a mask, skips their instructions.
    """
    after_previous(PDL, LET_NEXT=False)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = tl.load(x + token * D + cols, mask=cols < D)
    for k in tl.static_range(K):
        row = tl.load(index + token * K + k)
        if row >= 0:
            tl.store(out + row * D + cols, value, mask=cols < D)
    if scales is not None:  # noqa: SIM102 (this is known at compile time, the next is not)
        if tl.program_id(1) == 0:
            col = tl.arange(0, BLOCK_S)
            scale = tl.load(scales + token * scale_row + col * scale_col, mask=col < S)
            for k in tl.static_range(K):
                row = tl.load(index + token * K + k)
                if row >= 0:
                    tl.store(scales_out + row * S + col, scale, mask=col < S)


@triton.jit
def place_masked_kernel(experts, index, counts, num_copies, room, COPIES: tl.constexpr, PDL: tl.constexpr):
    """Number and count one expert's copies, in token order. The first program also writes the -1s."""
    after_previous(PDL)
    mine = tl.program_id(0)
    row = mine.to(tl.int64) * room
    for start in range(0, num_copies, COPIES):
        copy = start + tl.arange(0, COPIES)
        expert = tl.load(experts + copy, mask=copy < num_copies, other=-2).to(tl.int32)
        hot = (expert == mine).to(tl.int32)
        tl.store(index + copy, row + tl.cumsum(hot, 0) - 1, mask=hot > 0)
        tl.store(index + copy, tl.full([COPIES], -1, tl.int64), mask=(expert == -1) & (mine == 0))
        row += tl.sum(hot, 0)
    tl.store(counts + mine, (row - mine.to(tl.int64) * room).to(tl.int32))


@triton.jit(
    do_not_specialize=["tokens", "num_copies", "room"],
    do_not_specialize_on_alignment=["scale_col"],
)
def scatter_masked_kernel(
    x,
    out,
    scales,
    scales_out,
    scale_row,
    scale_col,
    S,
    D,
    experts,
    index,
    counts,
    tokens,
    num_copies,
    room,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Move a token to its experts' rooms. Each of its programs counts the copies of earlier tokens there.

    Behind the programs of the tokens comes one per expert, which counts all of its copies.
    """
    after_previous(PDL, LET_NEXT=False)
    token, expert, first_columns = tl.program_id(0), tl.program_id(0) - tokens, tl.program_id(1) == 0
    copy, k = tl.arange(0, COPIES), tl.arange(0, PADDED_K)
    if expert >= 0:
        if first_columns:
            count = tl.zeros([COPIES], tl.int32)
            for start in range(0, num_copies, COPIES):
                other = tl.load(experts + start + copy, mask=start + copy < num_copies, other=-1).to(tl.int32)
                count += (other == expert).to(tl.int32)
            tl.store(counts + expert, tl.sum(count, 0))
        return
    earlier = token * K  # copies of earlier tokens
    mine = tl.load(experts + earlier + k, mask=k < K, other=-1).to(tl.int32)
    before = tl.zeros([PADDED_K], tl.int32)
    for start in range(0, earlier, COPIES):
        other = tl.load(experts + start + copy, mask=start + copy < earlier, other=-2).to(tl.int32)
        before += tl.sum((other[:, None] == mine[None]).to(tl.int32), 0)
    here = (mine >= 0) & (before < room)  # a room ends, even if an expert should come twice
    row = tl.where(here, mine.to(tl.int64) * room + before, -1)
    if first_columns:
        tl.store(index + earlier + k, row, mask=k < K)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = tl.load(x + token.to(tl.int64) * D + cols, mask=cols < D)
    for i in tl.static_range(K):
        place = tl.sum(tl.where(k == i, row, 0), 0)
        if place >= 0:
            tl.store(out + place * D + cols, value, mask=cols < D)
    if scales is not None:  # noqa: SIM102 (this is known at compile time, the next is not)
        if first_columns:
            col = tl.arange(0, BLOCK_S)
            scale = tl.load(scales + token.to(tl.int64) * scale_row + col * scale_col, mask=col < S)
            for i in tl.static_range(K):
                place = tl.sum(tl.where(k == i, row, 0), 0)
                if place >= 0:
                    tl.store(scales_out + place * S + col, scale, mask=col < S)


@triton.jit
def _weighted(rows, row, weight_at, cols, D, WEIGHTED: tl.constexpr):
    """Return rows[row, cols] in float32, times its weight; zeros for row -1."""
    value = tl.load(rows + row * D + cols, mask=(cols < D) & (row >= 0), other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weight_at, mask=row >= 0, other=0.0)
    return value


@triton.jit
def add_copies(total, rows, index, weights, plus, token, cols, D, K: tl.constexpr, SPARSE: tl.constexpr):
    """Return total + plus[token, cols] + the weighted rows of the token's copies, in this order. total is float32.

    `token`: one, or a column of them. SPARSE, for one token: see `_gather_kernel`.
    """
    if plus is not None:
        total += tl.load(plus + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = token * K + k
        if index is not None:
            row = tl.load(index + row)
        weight_at = weights if weights is None else weights + token * K + k
        if not SPARSE:  # noqa: SIM114 (this is known at compile time, the next is not)
            total += _weighted(rows, row, weight_at, cols, D, weights is not None)
        elif row >= 0:
            total += _weighted(rows, row, weight_at, cols, D, weights is not None)
    return total


@triton.jit(do_not_specialize=["weights"])
def _gather_kernel(
    rows,
    index,
    weights,
    plus,
    out,
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPARSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum the weighted rows of one token's copies, and `plus`.

    SPARSE: most copies are elsewhere, so a branch per copy costs less than adding zeros. Otherwise there is no branch,
    because it would make the loads of a token's copies wait for one another.
    """
    after_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    total = add_copies(total, rows, index, weights, plus, token, cols, D, K, SPARSE)
    tl.store(out + token * D + cols, total.to(out.dtype.element_ty), mask=cols < D)


ONE_LAUNCH = 4096  # copies up to which one kernel does all; with more, each token would walk over too many


class _Move(NamedTuple):
    """New tensors, and what a kernel that moves rows there takes."""

    made: list[Tensor]
    arguments: tuple
    block_d: int  # columns of a program
    block_s: int  # at least all columns of the scales

    @classmethod
    def to(cls, x: Tensor, scales: Tensor | None, *lead: int) -> "_Move":
        """Plan to move rows of x [N, D], and of scales [N, S], into new tensors [*lead, D], [*lead, S]."""
        out = x.new_empty(*lead, x.shape[1])
        source, target = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (x.contiguous(), out))
        block = min(triton.next_power_of_2(x.shape[1]), 8192 // x.itemsize)
        if scales is None:
            return cls([out], (source, target, None, None, 0, 0, 0, x.shape[1]), block, 1)
        rows, width = scales.new_empty(*lead, scales.shape[1]), scales.shape[1]
        arguments = (source, target, scales, rows, *scales.stride(), width, x.shape[1])
        return cls([out, rows], arguments, block, triton.next_power_of_2(width))

    @property
    def programs(self) -> int:
        """Return how many share a row."""
        return triton.cdiv(self.made[0].shape[-1], self.block_d)


def _launch_move(move: _Move, index: Tensor) -> None:
    """Move row n to its rows index[n]."""
    tokens, top_k = index.shape
    if tokens and move.made[0].numel():
        _move_kernel[tokens, move.programs](*move.arguments, index, top_k, move.block_d, move.block_s, **pdl(index))


def ep_scatter(
    x: Tensor,
    experts: Tensor,
    num_local: int,
    alignment: int,
    counts: list[int] | None = None,
    scales: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[Any, ...]:
    """Group received tokens by expert, in token order, each group padded to `alignment` rows: `ref.ep_scatter`.

    x [N, D]; experts [N, K] int64 local ids, -1 = not here. Returns rows [M, D] (padding rows are undefined), their
    Groups, and index [N, K] int64, the row of token n's k-th copy (-1 = nowhere). With `scales` [N, S], also returns
    the scales of the rows [M, S].

    `counts`: copies per expert, rounded up to `alignment` or not, if the host knows them. `num_rows`: M, whatever the
    groups need, and no less than that; the rest is padding behind them. With neither, learning M costs one host sync.
    """
    experts = experts.contiguous()
    width, num_copies = triton.next_power_of_2(num_local), experts.numel()
    copies = max(16, min(256, 8192 // width))  # the [copies, experts] table lives in registers
    blocks = max(1, triton.cdiv(num_copies, copies))
    of_blocks = experts.new_empty(num_local, blocks, dtype=torch.int32)
    groups = Groups(experts.new_empty(num_local, dtype=torch.int32), alignment)
    index = torch.empty_like(experts)
    count_kernel[blocks,](experts, of_blocks, num_copies, num_local, width, copies, **pdl(x))
    sum_blocks_kernel[num_local,](of_blocks, blocks, BLOCKS=1024, **pdl(x))
    place_kernel[blocks,](
        experts, of_blocks, groups.ends, index, num_copies, num_local, width, alignment, copies, **pdl(x)
    )
    if num_rows is None:
        num_rows = groups.aligned(int(groups.ends[-1])) if counts is None else sum(map(groups.aligned, counts))
    move = _Move.to(x, scales, num_rows)
    _launch_move(move, index)
    rows, *scale = move.made
    return rows, groups, index, *scale


def ep_scatter_masked(
    x: Tensor, experts: Tensor, num_local: int, alignment: int = 1, scales: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Move received tokens to rooms [L, R, D], expert e's in its first counts[e] rows, in token order. No host sync.

    x [N, D]; experts [N, K] int64 local ids, -1 = not here, no expert twice per token. R is N rounded up to
    `alignment`. Returns rows [L, R, D] (rows past the count are undefined), counts [L] int32 and index [N, K] int64,
    each copy's row in [L * R] (-1 = nowhere). With `scales` [N, S], also returns the scales of the rows [L, R, S].
    """
    experts, room = experts.contiguous(), -(-x.shape[0] // alignment) * alignment
    index, counts = torch.empty_like(experts), experts.new_empty(num_local, dtype=torch.int32)
    move, (tokens, top_k) = _Move.to(x, scales, num_local, room), experts.shape
    if experts.numel() > ONE_LAUNCH:
        place_masked_kernel[num_local,](experts, index, counts, experts.numel(), room, COPIES=1024, **pdl(x))
        _launch_move(move, index)
        return move.made[0], counts, index, *move.made[1:]
    scatter_masked_kernel[tokens + num_local, move.programs](
        *move.arguments,
        experts,
        index,
        counts,
        tokens,
        experts.numel(),
        room,
        top_k,
        triton.next_power_of_2(top_k),
        512,
        move.block_d,
        move.block_s,
        **pdl(x),
    )
    rows, *scale = move.made
    return rows, counts, index, *scale


def ep_gather(rows: Tensor, index: Tensor | None, weights: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Return out[t] = plus[t] + sum over k of weights[t, k] * rows[index[t, k]], float32, in that order.

    rows [M, D], index [T, K] int64, weights [T, K] float32 or None, plus [T, D] or None -> [T, D] in rows' dtype. The
    bits are the same on every run. Index -1 adds nothing. `index` None: copy (t, k) is row t * K + k, and `weights`
    must be given.
    """
    tokens, top_k = (weights if index is None else index).shape
    out = rows.new_empty(tokens, rows.shape[-1])
    if out.numel():
        width, weights = rows.shape[-1], None if weights is None else weights.contiguous()
        sparse = index is not None and rows.numel() < out.numel() * top_k // 2
        block = min(triton.next_power_of_2(width), 8192 if sparse else 1024)
        _gather_kernel[tokens, triton.cdiv(width, block)](
            rows.contiguous(),
            None if index is None else index.contiguous(),
            weights,
            None if plus is None else plus.contiguous(),
            out,
            width,
            top_k,
            block,
            sparse,
            num_warps=max(1, block // 1024) if sparse else 2,
            **pdl(rows),
        )
    return out
