"""Paged MLA decode in Triton, with split KV. `attention.py` says what it shares with prefill.

The heads of a sequence's Q tokens are rows of one matrix, Q H of them, which all multiply the same pages. Only the last
Q - 1 keys are not for all rows. So two tokens of 16 heads cost what one of 32 heads does.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import decode_few_heads, decode_hopper, hopper
from kernels.attention import LOG2_E, attention_scores, softmax_step
from kernels.decode_few_heads import PAGE, Splits
from kernels.gemm import num_sms
from kernels.pdl import after_previous, let_next, pdl, wait_for_previous

FLOOR = tl.constexpr(-1e30)  # below every score: the maximum of a row that has seen no key, where there are such rows


@triton.jit
def _load_kv(kv_main, kv_rest, page_table, n, PAGE: tl.constexpr, MAIN: tl.constexpr, HAS_REST: tl.constexpr):
    row = tl.load(page_table + n // PAGE) * PAGE + n % PAGE
    main = kv_main.load([row, 0])  # [N, MAIN]
    rest = kv_rest.load([row, MAIN]) if HAS_REST else main
    return main, rest


@triton.jit
def _split_plan(kv_lens, seq, batch, splits, most, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, LEAST: tl.constexpr):
    """Return how a sequence is cut: blocks per split, at least LEAST, and splits in use (0 for an empty sequence).

    A sequence of average length gets `splits`, others more or fewer in proportion, so all programs take about as long.
    """
    index = tl.arange(0, BLOCK_B)
    all_blocks = tl.sum(tl.cdiv(tl.load(kv_lens + index, mask=index < batch, other=0), BLOCK_N), 0)
    blocks = tl.cdiv(tl.load(kv_lens + seq), BLOCK_N)
    wanted = (2 * splits * batch * blocks + all_blocks) // tl.maximum(2 * all_blocks, 1)  # rounded
    wanted = tl.maximum(tl.minimum(tl.minimum(wanted, most), blocks // LEAST), 1)
    chunk = tl.maximum(tl.cdiv(blocks, wanted), 1)
    return chunk, tl.cdiv(blocks, chunk)


@triton.jit
def _last_keys(q_main, q_rest, kv_main, kv_rest, page_table, n, last, limit, top, total, acc, acc_rest, scale,
               BLOCK_N: tl.constexpr, MAIN: tl.constexpr, PAGE: tl.constexpr, HAS_REST: tl.constexpr,
               REST_VALUES: tl.constexpr, Q_LEN: tl.constexpr):  # fmt: skip
    """Attend a block of keys, of which some rows see only some. Rows past `last` may hold anything, even NaN."""
    key = n + tl.arange(0, BLOCK_N)
    here = key < last
    main, rest = _load_kv(kv_main, kv_rest, page_table, n, PAGE, MAIN, HAS_REST)
    main = tl.where(here[:, None], main, 0.0)
    rest = tl.where(here[:, None], rest, 0.0)
    seen = here[None]
    if Q_LEN > 1:
        seen = seen & (key[None] < limit[:, None])
    scores = tl.where(seen, attention_scores(q_main, q_rest, main, rest, HAS_REST), float("-inf"))
    weights, top, shrink = softmax_step(scores, top, scale)
    total = total * shrink[:, None] + weights
    weights = weights.to(main.dtype)
    acc = tl.dot(weights, main, acc * shrink[:, None], input_precision="ieee")
    if REST_VALUES:
        acc_rest = tl.dot(weights, rest, acc_rest * shrink[:, None], input_precision="ieee")
    return top, total, acc, acc_rest


@triton.jit(do_not_specialize=["page_table", "kv_lens", "splits", "table_stride"])
def _decode_kernel(
    q_ptr,
    kv_main,
    kv_rest,
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
    q_stride,
    q_head_stride,
    table_stride,
    kv_dim: tl.constexpr,
    v_dim: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    REST_VALUES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    LEAST: tl.constexpr,
    Q_LEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """`heads`: those of all tokens of a sequence, Q H. `of_token`: those of one, H."""
    after_previous(PDL)
    split, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + seq)
    chunk, used = _split_plan(kv_lens, seq, tl.num_programs(2), splits, tl.num_programs(1), BLOCK_N, BLOCK_B, LEAST)
    if split == 0 and tl.program_id(0) == 0:
        tl.store(used_ptr + seq, used)
    if split >= tl.maximum(used, 1):
        return
    first = split * chunk * BLOCK_N
    last = tl.minimum(first + chunk * BLOCK_N, kv_len)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    col, rest_col = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    has_rest: tl.constexpr = kv_dim > MAIN
    q_row = q_ptr + seq * q_stride + head[:, None] * q_head_stride
    q_main = tl.load(q_row + col, mask=head[:, None] < heads, other=0.0)  # [BLOCK_H, MAIN]
    q_rest = q_main
    if has_rest:
        q_rest = tl.load(q_row + rest_col, mask=(head[:, None] < heads) & (rest_col < kv_dim), other=0.0)
    page_table += seq * table_stride

    top = tl.full([BLOCK_H], float("-inf") if Q_LEN == 1 else FLOOR, tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)  # summed over columns once, at the end
    acc = tl.zeros([BLOCK_H, MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_H, REST], tl.float32)
    limit = kv_len - Q_LEN + 1 + head // of_token  # keys that a row sees
    for_all = last if Q_LEN == 1 else tl.maximum(tl.minimum(last, kv_len - Q_LEN + 1), first)
    whole = first + (for_all - first) // BLOCK_N * BLOCK_N
    for n in range(first, whole, BLOCK_N):
        main, rest = _load_kv(kv_main, kv_rest, page_table, n, PAGE, MAIN, has_rest)
        scores = attention_scores(q_main, q_rest, main, rest, has_rest)
        weights, top, shrink = softmax_step(scores, top, scale)
        total = total * shrink[:, None] + weights
        weights = weights.to(main.dtype)
        acc = tl.dot(weights, main, acc * shrink[:, None], input_precision="ieee")
        if REST_VALUES:
            acc_rest = tl.dot(weights, rest, acc_rest * shrink[:, None], input_precision="ieee")
    if Q_LEN == 1:
        if whole < last:
            top, total, acc, acc_rest = _last_keys(
                q_main, q_rest, kv_main, kv_rest, page_table, whole, last, limit, top, total, acc, acc_rest, scale,
                BLOCK_N, MAIN, PAGE, has_rest, REST_VALUES, Q_LEN,
            )  # fmt: skip
    else:
        for n in tl.range(whole, last, BLOCK_N, num_stages=1):  # one block or two: nothing to load ahead
            top, total, acc, acc_rest = _last_keys(
                q_main, q_rest, kv_main, kv_rest, page_table, n, last, limit, top, total, acc, acc_rest, scale,
                BLOCK_N, MAIN, PAGE, has_rest, REST_VALUES, Q_LEN,
            )  # fmt: skip

    norm = tl.sum(total, 1)
    norm_or_1 = tl.where(norm > 0, norm, 1.0)  # an empty sequence gives zeros
    acc, acc_rest = acc / norm_or_1[:, None], acc_rest / norm_or_1[:, None]
    here, here_rest = (head[:, None] < heads) & (col < v_dim), (head[:, None] < heads) & (rest_col < v_dim)
    if used <= 1:
        kind = out_ptr.dtype.element_ty
        out = out_ptr + (seq * heads + head[:, None]) * v_dim
        tl.store(out + col, acc.to(kind), mask=here)
        if REST_VALUES:
            tl.store(out + rest_col, acc_rest.to(kind), mask=here_rest)
    else:
        place = (seq * tl.num_programs(1) + split) * heads + head  # [BLOCK_H]
        partial = partial_ptr + place[:, None] * v_dim
        tl.store(partial + col, acc, mask=here)
        if REST_VALUES:
            tl.store(partial + rest_col, acc_rest, mask=here_rest)
        tl.store(lse_ptr + place, top + tl.log2(norm), mask=head < heads)


@triton.jit(do_not_specialize=["starts", "most"])
def _combine_kernel(
    partial,
    lse_ptr,
    used_ptr,
    starts,
    out,
    heads,
    most,
    v_dim,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge BLOCK of a sequence's outputs, all heads in a row. Splits are weighted by their share of the softmax sum.

    Sequence b's are splits starts[b] to starts[b + 1]; with `starts` None, the first used_ptr[b] of the `most` from
    b * most on.
    """
    let_next(PDL)
    seq = tl.program_id(1).to(tl.int64)
    if starts is None:
        wait_for_previous(PDL)
        start = seq * most
        used = tl.load(used_ptr + seq)
    else:  # of the step's plan, which is older than the kernel before: see kernels/pdl.py
        start = tl.load(starts + seq).to(tl.int64)
        used = tl.load(starts + seq + 1) - start.to(tl.int32)
        wait_for_previous(PDL)
    if used <= 1:
        return
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live, head = col < heads * v_dim, col // v_dim
    top, total = tl.full([BLOCK], FLOOR, tl.float32), tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # so many loads in flight
            here, row = live & (first + i < used), (start + first + i) * heads
            lse = tl.load(lse_ptr + row + head, mask=here, other=float("-inf"))
            value = tl.load(partial + row * v_dim + col, mask=here, other=0.0)
            new_top = tl.maximum(top, lse)
            shrink, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
            acc, total, top = acc * shrink + weight * value, total * shrink + weight, new_top
    tl.store(out + seq * heads * v_dim + col, (acc / total).to(out.dtype.element_ty), mask=live)


def _combine(
    partial: Tensor, lse: Tensor, used: Tensor | None, starts: Tensor | None, out: Tensor, batch: int, most: int = 0
) -> None:
    """Merge splits into `out`, with about two programs per SM: many would take longer to start than to run."""
    heads, v_dim = lse.shape[-1], partial.shape[-1]
    block = triton.next_power_of_2(triton.cdiv(batch * heads * v_dim, 2 * num_sms(out.device)))
    block = min(2048, max(128, block))
    _combine_kernel[triton.cdiv(heads * v_dim, block), batch](
        partial, lse, used, starts, out, heads, most, v_dim, block, min(16, 4096 // block), num_warps=4, **pdl(out)
    )


def _columns(dim: int) -> tuple[int, int]:
    """Cut `dim` in two: MAIN, its largest power of two, and REST, the power of two that covers the remainder."""
    main = 1 << dim.bit_length() - 1
    return main, max(16, triton.next_power_of_2(dim - main))


def _choose_splits(programs: int, pages: int, device: torch.device) -> int:
    """Return the number of splits, for a sequence of average length, that should finish first.

    The estimate: a sequence holds at most 32 pages, and starting a program costs as much as 2 pages. A program fills a
    whole SM, so 192 of them on 132 SMs take two waves at 73 % of the machine. Split in two, 384 take three half waves
    at 97 %.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    max_splits = max(1, min(64, pages // 2))
    return min(range(1, max_splits + 1), key=lambda s: -(-programs * s // sms) * (-(-min(pages, 32) // s) + 2))


class Cut(NamedTuple):
    """How a batch is cut into programs."""

    rows: int  # heads of a program, those of all Q tokens counted
    keys: int  # of a block
    warps: int
    splits: int  # of a sequence of average length
    least: int  # blocks per split


FEW_SEQUENCES = 2  # up to which cutting a sequence into its smallest parts pays, with FEW_HEADS at most
FEW_HEADS = 16


def _cut(q: Tensor, batch: int, heads: int, pages: int, gluon: bool) -> Cut:
    """`gluon`: for `decode_hopper`, which has one size of program."""
    fast = q.dtype == torch.bfloat16  # float32 multiplies outside the tensor cores: small tiles
    if fast and not gluon and len(q) == batch <= FEW_SEQUENCES and heads <= FEW_HEADS:
        return Cut(16, 32, 4, max(1, min(64, 2 * pages)), 1)
    rows, keys, warps = (64, PAGE, 8) if fast else (16, 16, 4)
    splits = _choose_splits(batch * triton.cdiv(heads, rows), pages, q.device)
    return Cut(rows, keys, warps, splits, 2)


def decode_plan(kv_lens: Tensor, q_len: int, heads: int) -> Splits | None:
    """Return the `plan` that a step's calls of `mla_decode` share. None where `decode_few_heads` does not serve."""
    fits = q_len * heads <= decode_few_heads.ROWS and len(kv_lens) > 0
    return decode_few_heads.plan_splits(kv_lens) if fits and hopper.is_hopper(kv_lens.device) else None


def mla_decode(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    v_dim: int | None = None,
    plan: Splits | None = None,
) -> Tensor:
    """Attend the last Q tokens per sequence with absorbed MLA. Contract: `ref.mla_decode`; `v_dim` None: all columns.

    q [B Q, H, C + R], kv_pages [pages, 64, C + R], both bf16 or both float32; page_table [B, P] int32, kv_lens [B]
    int32 -> [B Q, H, v_dim]. Length 0 gives zeros. The grid depends on shapes alone, and the host reads no length: safe
    in a CUDA graph.

    64 heads share a program, so it reads a page into shared memory once. The page serves as keys, and its first columns
    as values. Sequences are cut into splits that fill the GPU evenly; a second kernel merges the splits. On Hopper,
    bf16 with v_dim <= C takes `decode_few_heads` or `decode_hopper`: pass v_dim. A `plan` is read early:
    kernels/pdl.py says when that is right.
    """
    (tokens, of_token, kv_dim), batch = q.shape, len(kv_lens)
    v_dim = v_dim or kv_dim
    out = q.new_empty(tokens, of_token, v_dim)
    if out.numel() == 0:
        return out
    q_len = tokens // batch
    heads = q_len * of_token
    in_a_row = q_len == 1 or q.stride(0) == of_token * q.stride(1)
    q = q if q.stride(-1) == 1 and in_a_row else q.contiguous()
    main, rest = _columns(kv_dim)
    rows = kv_pages.view(-1, kv_dim)
    if decode_few_heads.serves(q, batch, main, v_dim):
        splits = plan or decode_few_heads.plan_splits(kv_lens)
        partial, lse = _partial(len(splits.table), heads, v_dim, q.device)
        early = plan is not None
        decode_few_heads.launch(
            q, rows, page_table, kv_lens, splits, out, partial, lse, scale * LOG2_E, main, rest, q_len, early
        )
        _combine(partial, lse, None, splits.starts, out, batch)
        return out
    gluon = decode_hopper.can_decode(q, main, v_dim)
    cut = _cut(q, batch, heads, page_table.shape[1], gluon)
    splits = max_splits = cut.splits
    if batch > 1:  # a long sequence among short ones takes more than the average
        max_splits = min(2 * splits, max(1, page_table.shape[1] * PAGE // cut.keys // cut.least))
    partial, lse = _partial(batch * max_splits, heads, v_dim, q.device)
    used = torch.empty(batch, dtype=torch.int32, device=q.device)
    if gluon:
        decode_hopper.launch_decode(
            q, rows, page_table, kv_lens, out, partial, lse, used, splits, max_splits, scale * LOG2_E, main, rest, q_len
        )
    else:
        _decode_kernel[triton.cdiv(heads, cut.rows), max_splits, batch](
            q,
            TensorDescriptor.from_tensor(rows, [cut.keys, main]),
            TensorDescriptor.from_tensor(rows, [cut.keys, rest]),
            page_table,
            kv_lens,
            out,
            partial,
            lse,
            used,
            heads,
            of_token,
            splits,
            scale * LOG2_E,
            q_len * q.stride(0),
            q.stride(1),
            page_table.stride(0),
            kv_dim,
            v_dim,
            BLOCK_H=cut.rows,
            BLOCK_N=cut.keys,
            MAIN=main,
            REST=rest,
            PAGE=PAGE,
            REST_VALUES=v_dim > main,
            BLOCK_B=triton.next_power_of_2(batch),
            LEAST=cut.least,
            Q_LEN=q_len,
            num_stages=1 if q.dtype == torch.float32 else 2,
            num_warps=cut.warps,
            **pdl(q),
        )
    if max_splits > 1:
        _combine(partial, lse, used, None, out, batch, max_splits)
    return out


def _partial(splits: int, heads: int, v_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate what splits leave to be merged: outputs [splits, heads, v_dim], and log2 of the softmax sums."""
    outputs = torch.empty(splits, heads, v_dim, dtype=torch.float32, device=device)
    return outputs, outputs.new_empty(splits, heads)
