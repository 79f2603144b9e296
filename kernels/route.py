"""Routing in Triton: the top-k gate, and the moves from token order to expert order and back.

A copy is one (token, k) pair. Its row is its expert's first row plus its rank among that expert's copies, counted in
token order. There are no atomics, so the order is the same on every run.

    contiguous   many copies: count per block, sum the counts of earlier blocks, rank within a block by cumulative sum
    masked       few copies: one program per expert walks over all of them
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.pdl import after_previous, pdl


@triton.jit(do_not_specialize=["is_token"])
def _gate_kernel(
    logits,
    bias,
    slot_of_expert,
    is_token,
    ids_out,
    weights_out,
    num_experts,
    n_group,
    topk_group,
    top_k,
    scale,
    NORMALIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Route one token per program. Its experts are [groups, experts per group], padded to powers of two [G, P]."""
    after_previous(PDL, LET_NEXT=False)
    token = tl.program_id(0).to(tl.int64)
    per_group = num_experts // n_group
    group, place = tl.arange(0, G), tl.arange(0, P)
    expert = group[:, None] * per_group + place[None, :]  # [G, P]
    exists = (group < n_group)[:, None] & (place < per_group)[None, :]
    scores = tl.load(logits + token * num_experts + expert, mask=exists, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        scores = tl.exp(scores - tl.max(tl.max(scores, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    else:
        scores = tl.sigmoid(scores)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
    choice = tl.where(choice == choice, choice, -1e30)  # with NaN, argmax could find one expert twice, or none
    choice = tl.where(exists, choice, float("-inf"))

    if G > 1:  # keep the topk_group groups whose GROUP_BEST best experts sum highest
        value, first = tl.max(choice, 1, return_indices=True)  # [G]
        if GROUP_BEST == 2:
            second = tl.max(tl.where(place[None, :] == first[:, None], float("-inf"), choice), 1)
            value = tl.where(per_group > 1, value + second, value)
        value = tl.where(group < n_group, value, float("-inf"))
        keep = group < 0
        for _ in range(topk_group):
            winner = tl.argmax(value, 0)  # the lower id on a tie
            keep = keep | (group == winner)
            value = tl.where(group == winner, float("-inf"), value)
        choice = tl.where(keep[:, None], choice, float("-inf"))

    choice, scores, expert = tl.reshape(choice, [G * P]), tl.reshape(scores, [G * P]), tl.reshape(expert, [G * P])
    slot, k = tl.arange(0, G * P), tl.arange(0, K)
    ids = tl.zeros((K,), dtype=tl.int32)
    weights = tl.zeros((K,), dtype=tl.float32)
    for i in range(top_k):
        taken = slot == tl.argmax(choice, 0)
        ids = tl.where(k == i, tl.sum(tl.where(taken, expert, 0), 0), ids)
        weights = tl.where(k == i, tl.sum(tl.where(taken, scores, 0.0), 0), weights)
        choice = tl.where(taken, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    ids = ids.to(tl.int64)
    if slot_of_expert is not None:
        ids = tl.load(slot_of_expert + ids, mask=k < top_k, other=-1)
    if is_token is not None:
        ids = tl.where(tl.load(is_token + token), ids, -1)
    tl.store(ids_out + token * top_k + k, ids, mask=k < top_k)
    tl.store(weights_out + token * top_k + k, weights * scale, mask=k < top_k)


def gate_topk(
    logits: Tensor,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
    slot_of_expert: Tensor | None = None,
    is_token: Tensor | None = None,
    softmax: bool = False,
    group_best: int = 2,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts in one launch; ties go to the lower id. Contract: `ref.gate_topk`.

    logits [T, E] float32, bias [E], slot_of_expert [E] int64, is_token [T] bool -> ids [T, K] int64, by falling
    score + bias, and weights [T, K] float32. Raises ValueError if the experts do not divide into the groups, or if
    `group_best` is neither 1 nor 2.
    """
    tokens, num_experts = logits.shape
    if num_experts % n_group:
        raise ValueError(f"{num_experts=} is not a multiple of {n_group=}")
    if group_best not in (1, 2):
        raise ValueError(f"{group_best=} must be 1 or 2")
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    if tokens:
        g, p = triton.next_power_of_2(n_group), triton.next_power_of_2(num_experts // n_group)
        _gate_kernel[tokens,](
            logits.contiguous(),
            bias,
            slot_of_expert,
            is_token,
            ids,
            weights,
            num_experts,
            n_group,
            topk_group,
            top_k,
            scale,
            normalize,
            softmax,
            group_best,
            g,
            p,
            triton.next_power_of_2(top_k),
            num_warps=1,
            **pdl(logits),
        )
    return ids, weights


@triton.jit(do_not_specialize=["num_copies"])
def _count_kernel(experts, block_counts, num_copies, L, EXPERTS: tl.constexpr, COPIES: tl.constexpr, PDL: tl.constexpr):
    """Count, in block_counts[e, block], the block's copies that go to expert e."""
    after_previous(PDL)
    ids = tl.arange(0, EXPERTS)
    copy = tl.program_id(0) * COPIES + tl.arange(0, COPIES)
    expert = tl.load(experts + copy, mask=copy < num_copies, other=-1).to(tl.int32)
    hot = (expert[:, None] == ids[None, :]).to(tl.int32)  # [COPIES, EXPERTS]
    tl.store(block_counts + ids * tl.num_programs(0) + tl.program_id(0), tl.sum(hot, 0), mask=ids < L)


@triton.jit(do_not_specialize=["num_copies"])
def _place_kernel(
    experts,
    block_ends,
    starts,
    index,
    row_expert,
    num_copies,
    L,
    EXPERTS: tl.constexpr,
    COPIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store index[copy] = e's first row + copies to e in earlier blocks + earlier copies to e in its own block.

    A copy that goes nowhere gets -1.
    """
    after_previous(PDL)
    block = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    copy = block * COPIES + tl.arange(0, COPIES)
    expert = tl.load(experts + copy, mask=copy < num_copies, other=-1).to(tl.int32)
    hot = (expert[:, None] == ids[None, :]).to(tl.int32)
    before = tl.load(block_ends + ids * tl.num_programs(0) + block - 1, mask=(ids < L) & (block > 0), other=0)
    first = tl.load(starts + ids, mask=ids < L, other=0) + before  # [EXPERTS]
    rank = tl.sum((tl.cumsum(hot, 0) - 1 + first[None, :]) * hot, 1)  # [COPIES]
    here = expert >= 0
    row = tl.where(here, rank, -1).to(tl.int64)
    tl.store(index + copy, row, mask=copy < num_copies)
    tl.store(row_expert + row, expert, mask=here)


@triton.jit
def _place_masked_kernel(experts, index, counts, num_copies, room, COPIES: tl.constexpr, PDL: tl.constexpr):
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


@triton.jit(do_not_specialize_on_alignment=["scale_col"])
def _move_kernel(
    x,
    index,
    out,
    scales,
    scales_out,
    scale_row,
    scale_col,
    S,
    D,
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
def _weighted(rows, row, weight_at, cols, D, WEIGHTED: tl.constexpr):
    """Return rows[row, cols] in float32, times its weight; zeros for row -1."""
    value = tl.load(rows + row * D + cols, mask=(cols < D) & (row >= 0), other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weight_at, mask=row >= 0, other=0.0)
    return value


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
    tl.store(out + token * D + cols, total.to(out.dtype.element_ty), mask=cols < D)


def _move(x: Tensor, scales: Tensor | None, index: Tensor, *lead: int) -> list[Tensor]:
    """Move rows of x [N, D], and of scales [N, S], to their places in new tensors [*lead, D], [*lead, S]."""
    out = x.new_empty(*lead, x.shape[1])
    moved = [out] if scales is None else [out, scales.new_empty(*lead, scales.shape[1])]
    if x.shape[0] and out.numel():
        source, target = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (x.contiguous(), out))
        block = min(triton.next_power_of_2(x.shape[1]), 8192 // x.itemsize)
        strides = (0, 0, 0) if scales is None else (*scales.stride(), scales.shape[1])
        _move_kernel[x.shape[0], triton.cdiv(x.shape[1], block)](
            source,
            index,
            target,
            scales,
            None if scales is None else moved[1],
            *strides,
            x.shape[1],
            index.shape[1],
            block,
            1 if scales is None else triton.next_power_of_2(scales.shape[1]),
            **pdl(x),
        )
    return moved


def ep_scatter(
    x: Tensor,
    experts: Tensor,
    num_local: int,
    alignment: int,
    counts: list[int] | None = None,
    scales: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """Group received tokens by expert, in token order, each group padded to `alignment` rows: `ref.ep_scatter`.

    x [N, D]; experts [N, K] int64 local ids, -1 = not here. Returns rows [M, D] (padding rows are undefined),
    row_expert [M] int32 (-1 = padding) and index [N, K] int64, the row of token n's k-th copy (-1 = nowhere). With
    `scales` [N, S], also returns the scales of the rows [M, S].

    `counts`: copies per expert, rounded up to `alignment` or not, if the host knows them. `num_rows`: M, whatever the
    groups need, and no less than that; the rest is padding behind them. With neither, learning M costs one host sync.
    """
    experts = experts.contiguous()
    width, num_copies = triton.next_power_of_2(num_local), experts.numel()
    copies = max(16, min(256, 8192 // width))  # the [copies, experts] table lives in registers
    blocks = max(1, triton.cdiv(num_copies, copies))
    block_ends = experts.new_empty(num_local, blocks, dtype=torch.int32)
    _count_kernel[blocks,](experts, block_ends, num_copies, num_local, width, copies, **pdl(x))
    block_ends = block_ends.cumsum(1, dtype=torch.int32)
    sizes = (block_ends[:, -1] + alignment - 1) // alignment * alignment
    ends = sizes.cumsum(0)
    if num_rows is None:
        num_rows = int(ends[-1]) if counts is None else sum(-(-count // alignment) * alignment for count in counts)
    row_expert = torch.full((num_rows,), -1, dtype=torch.int32, device=x.device)
    index = torch.empty_like(experts)
    _place_kernel[blocks,](
        experts, block_ends, ends - sizes, index, row_expert, num_copies, num_local, width, copies, **pdl(x)
    )
    rows, *scale = _move(x, scales, index, num_rows)
    return rows, row_expert, index, *scale


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
    _place_masked_kernel[num_local,](experts, index, counts, experts.numel(), room, COPIES=1024, **pdl(x))
    rows, *scale = _move(x, scales, index, num_local, room)
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
