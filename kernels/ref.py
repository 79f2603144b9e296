"""The pure-torch twin of every op: the specification that the fast kernels are tested against, and the CPU path.

WAITING names the twins that read numbers on the host, by the kind of step that uses them: a CUDA graph cannot capture
them.

T tokens, D hidden, H heads, C kv latent, R rope dims, K experts per token, L local experts, I expert width.
"""

from collections import abc
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.addends import Delta, summed
from kernels.fp8 import Quantized, dequantize_1x128, dequantize_128x128, quantize_1x128
from kernels.groups import Groups
from kernels.ref_attention import decode_plan, mla_decode, prefill_attention  # noqa: F401 (twins, too)

WAITING = {
    "decodes": ("mla_decode", "swiglu_masked", "grouped_gemm_masked", "grouped_gemm_masked_fp8"),
    "prompts": (
        "prefill_attention",
        "ep_scatter",
        "grouped_gemm_contiguous",
        "grouped_gemm_contiguous_fp8",
    ),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., D] / rms(x) * weight [D] over the last dim. The mean square is taken in float32."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, delta: Delta, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Do the residual add before a norm: return (rms_norm(x + delta), x + delta). Addends are summed and rounded first.

    x [..., D], or [T, D] with `Addends`. The sum over copies is `ep_gather`'s, to the bit.
    """
    total = x + summed(delta, ep_gather)
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[0], x[1]), (x[2], x[3]), ... of x [T, ..., R]. cos, sin [T, R / 2] float32."""
    shape = (x.shape[0], *[1] * (x.dim() - 2), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def absorb_query(
    q: Tensor, w_uk: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, plan: Any = None
) -> Tensor:
    """Return absorbed MLA's query (DeepSeek-V2, section 2.1): q' = [W_UK^T q_nope, rope(q_rope)] for every head.

    q [B, H, nope + R], w_uk [H, nope, C], tables [length, R / 2] float32, indexed by positions [B] -> [B, H, C + R].
    `plan`: that of mla_decode, which must be the next op.
    """
    nope, key = q.tensor_split((w_uk.shape[1],), -1)
    latent = torch.bmm(nope.transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((latent, rope(key, cos_table[positions], sin_table[positions])), -1)


def project_values(attended: Tensor, w_uv: Tensor, quantize: bool = False) -> Tensor | Quantized:
    """Multiply attended [B, H, C] with its head's w_uv [H, v, C] -> [B, H, v].

    With `quantize`: return quantize_1x128 of the result flattened to [B, H v].
    """
    out = torch.bmm(attended.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    return quantize_1x128(out.flatten(1)) if quantize else out


def rope_query(q: Tensor, cos_table: Tensor, sin_table: Tensor, positions: Tensor, rope_dim: int) -> None:
    """Rotate the last `rope_dim` columns of every head of q [T, H, nope + R], in place.

    cos_table, sin_table [length, R / 2] float32, indexed by positions [T] int64.
    """
    q[..., -rope_dim:] = rope(q[..., -rope_dim:], cos_table[positions], sin_table[positions])


def norm_rope_write(
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_table: Tensor,
    sin_table: Tensor,
    positions: Tensor,
    rows: Tensor,
    kv_pages: Tensor,
) -> None:
    """Write MLA's cache (DeepSeek-V2, section 2.1): [rms_norm(latent), rope(shared key)] of each token, in place.

    kv [T, C + R], norm_weight [C], kv_pages [pages, 64, C + R], contiguous, all of one dtype; cos_table, sin_table
    [length, R / 2] float32, indexed by positions [T] int64. Token t goes to row rows[t] (int64) of the flat pages. If
    several tokens go to one row, any one of them stays.
    """
    latent, key = kv.tensor_split((norm_weight.numel(),), -1)
    roped = rope(key, cos_table[positions], sin_table[positions])
    kv_pages.view(-1, kv.shape[-1])[rows] = torch.cat((rms_norm(latent, norm_weight, eps), roped), -1)


def write_and_absorb(
    q: Tensor,
    w_uk: Tensor,
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_table: Tensor,
    sin_table: Tensor,
    positions: Tensor,
    rows: Tensor,
    kv_pages: Tensor,
    plan: Any = None,
) -> Tensor:
    """Do norm_rope_write of kv [B, C + R], and absorb_query of q [B, H, nope + R]. Neither needs the other."""
    norm_rope_write(kv, norm_weight, eps, cos_table, sin_table, positions, rows, kv_pages)
    return absorb_query(q, w_uk, cos_table, sin_table, positions, plan)


def silu_mul(x: Tensor, groups: Groups | None = None) -> Tensor:
    """Return silu(gate) * up: x [..., 2I], gate first -> [..., I]. With `groups`, rows of padding are undefined."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, bare: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return (normed, values, scales): rms_norm, and quantize_1x128 of it. normed is None unless `bare`."""
    normed = rms_norm(x, weight, eps)
    return normed if bare else None, *quantize_1x128(normed)


def add_rms_norm_quant(
    x: Tensor, delta: Delta, weight: Tensor, eps: float, bare: bool = True
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Do the residual add, as in add_rms_norm, before rms_norm_quant: return (normed, values, scales, x + delta)."""
    total = x + summed(delta, ep_gather)
    return *rms_norm_quant(total, weight, eps, bare), total


def silu_mul_quant(x: Tensor, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """Return quantize_1x128 of silu(gate) * up, x [..., 2I], with nothing rounded in between.

    With `groups`, the results of padding are undefined.
    """
    return quantize_1x128(silu_mul(x.float()))


def silu_mul_quant_masked(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Do silu_mul_quant on x[e, :counts[e]]; the rest is undefined.

    x [L, R, 2I], counts [L] int32 -> values [L, R, I] and scales [L, R, ceil(I / 128)].
    """
    return silu_mul_quant(x)


def gemm_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return x [M, D] in 1x128 @ weight [N, D].T in 128x128 -> [M, N], summed in float32 and rounded to bf16."""
    return (dequantize_1x128(x, x_scale) @ dequantize_128x128(weight, weight_scale).T).bfloat16()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, D] @ weight [N, D].T -> [T, N], in their dtype."""
    return F.linear(x, weight)


def ffn_beside(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return silu_mul(x @ gate_up.T) @ down.T: x [T, D], gate_up [2I, D], down [D, I] -> [T, D].

    Other kernels may run at the same time, and share its SMs.
    """
    return linear(silu_mul(linear(x, gate_up)), down)


def linear_float32(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x [T, D] @ weight [N, D].T in float32 [T, N]. Products of bf16 are exact there; only sums are rounded.

    `out` [T, N] float32, contiguous: where to put it; None: in a new tensor.
    """
    return torch.mm(x.float(), weight.float().T, out=out)


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
    """Choose each token's experts and their weights, as DeepSeek-V3's gate does (technical report, section 2.1.2).

    Scores are sigmoid(logit), or with `softmax` the softmax over experts. Experts compete by score + bias. First the
    best `topk_group` groups win, by the sum of their `group_best` best experts: 2 in V3, 1 in V2's
    `group_limited_greedy`. Then their best `top_k` experts win. The weights are the scores WITHOUT the bias.

    logits [T, E] float32, bias [E] -> ids [T, K] int64 and weights [T, K] float32. With slot_of_expert [E], ids are
    slots. They are -1 in rows where is_token [T] is False.
    """
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        groups = choice.unflatten(-1, (n_group, -1))  # [T, G, E / G]
        best = groups.topk(min(group_best, groups.shape[-1]), dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        keep = torch.zeros(groups.shape[:2], dtype=torch.bool, device=logits.device).scatter(1, best, True)
        choice = groups.masked_fill(~keep[..., None], float("-inf")).flatten(1)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    ids = ids if slot_of_expert is None else slot_of_expert[ids]
    ids = ids if is_token is None else ids.masked_fill(~is_token[:, None], -1)
    return ids, weights * scale


def _movable(x: Tensor) -> Tensor:
    """Return x in a dtype that every indexing op supports: fp8 as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def ep_scatter(
    x: Tensor,
    experts: Tensor,
    num_local: int,
    alignment: int,
    counts: abc.Sequence[int] | None = None,
    scales: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[Any, ...]:
    """Group received tokens by expert, each group padded to `alignment` rows.

    x [N, D]; experts [N, K] local ids, -1 = not here. Returns rows [M, D] (padding rows are undefined), their Groups,
    and index [N, K], the row of token n's k-th copy (-1 = nowhere). With `scales` [N, S], also returns the scales of
    the rows [M, S].

    `counts`: copies per expert, rounded up to `alignment` or not, if the host knows them. `num_rows`: M, whatever the
    groups need, and no less than that; the rest is padding behind them. Either spares a host sync.
    """
    flat = experts.flatten()
    copies = torch.bincount(flat[flat >= 0], minlength=num_local)
    sizes = (copies + alignment - 1) // alignment * alignment
    assert counts is None or [-(-c // alignment) * alignment for c in counts] == sizes.tolist(), f"{counts=} {copies=}"
    starts = sizes.cumsum(0) - sizes
    order = torch.argsort(flat, stable=True)[(flat < 0).sum() :]  # copies by expert, each expert's in token order
    expert = flat[order]
    first = copies.cumsum(0) - copies
    rows = starts[expert] + torch.arange(len(order), device=x.device) - first[expert]
    needed = int(sizes.sum())
    total = needed if num_rows is None else num_rows
    assert total >= needed, f"{num_rows=} {sizes=}"
    index = torch.full_like(flat, -1)
    index[order] = rows
    groups = Groups((starts + copies).to(torch.int32), alignment)
    moved = []
    for source in (x,) if scales is None else (x, scales):
        out = source.new_empty(total, source.shape[1])
        _movable(out)[rows] = _movable(source)[order // experts.shape[1]]
        moved.append(out)
    return moved[0], groups, index.view_as(experts), *moved[1:]


def ep_scatter_masked(
    x: Tensor, experts: Tensor, num_local: int, alignment: int = 1, scales: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Move received tokens to rooms [L, R, D], expert e's in its first counts[e] rows. Fixed shapes: no host sync.

    x [N, D]; experts [N, K] local ids, -1 = not here, no expert twice per token. R is N rounded up to `alignment`.
    Returns rows [L, R, D] (rows past the count are undefined), counts [L] int32 and index [N, K], each copy's row in
    [L * R] (-1 = nowhere). With `scales` [N, S], also returns the scales of the rows [L, R, S].
    """
    num_rows = x.shape[0]
    room = -(-num_rows // alignment) * alignment
    chosen = torch.zeros(num_rows, num_local + 1, dtype=torch.int64, device=x.device)
    chosen.scatter_(1, experts.where(experts >= 0, num_local), 1)
    chosen = chosen[:, :num_local]  # the last column caught the -1s
    place = chosen.cumsum(0) - chosen  # [N, L] rank of token n among expert e's tokens
    counts = chosen.sum(0).to(torch.int32)
    local = experts.clamp(min=0)
    index = (local * room + place.gather(1, local)).where(experts >= 0, -1)
    source = torch.zeros(num_local * room + 1, dtype=torch.int64, device=x.device)
    token = torch.arange(num_rows, device=x.device)[:, None].expand_as(index)
    source.scatter_(0, index.where(index >= 0, num_local * room).flatten(), token.flatten())
    moved = [
        _movable(t)[source[:-1]].view(t.dtype).view(num_local, room, t.shape[1])
        for t in ((x,) if scales is None else (x, scales))
    ]
    return moved[0], counts, index, *moved[1:]


def ep_gather(rows: Tensor, index: Tensor | None, weights: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Return out[t] = plus[t] + sum over k of weights[t, k] * rows[index[t, k]], in float32 -> [T, D].

    Index -1 adds nothing. `index` None: copy (t, k) is row t * K + k, and `weights` must be given.
    """
    if index is None:
        assert weights is not None
        index = torch.arange(weights.numel(), device=rows.device).view_as(weights)
    if rows.shape[0] == 0:
        index = index[:, :0]
    terms = rows[index.clamp(min=0)].float()  # [T, K, D]
    if weights is not None:
        terms = terms * weights[:, : index.shape[1], None]
    out = terms.where(index[..., None] >= 0, 0.0).sum(1)
    return (out if plus is None else out + plus).to(rows.dtype)


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply each group's rows by its expert's weight.T; padding is undefined.

    x [M, D], weight [L, N, D] -> [M, N].
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(groups.ranges()):
        if start < end:
            torch.mm(x[start:end], weight[expert].T, out=out[start:end])
    return out


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return out[e, :counts[e]] = x[e, :counts[e]] @ weight[e].T; the rest is undefined.

    x [L, R, D], weight [L, N, D], counts [L] int32 -> [L, R, N].
    """
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    for expert, count in enumerate(counts.tolist()):
        if count:
            torch.mm(x[expert, :count], weight[expert].T, out=out[expert, :count])
    return out


def swiglu_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return silu_mul of grouped_gemm_masked; the rest is undefined. weight [L, 2I, D] -> [L, R, I]."""
    out = x.new_empty(*x.shape[:2], weight.shape[1] // 2)
    for expert, (count, rows) in enumerate(zip(counts.tolist(), grouped_gemm_masked(x, weight, counts), strict=True)):
        if count:
            out[expert, :count] = silu_mul(rows[:count])
    return out


def gemm_of_copies(x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    """Return out[c] = x's row @ weight[slots[c]].T for every copy c = t * K + k; zeros where slots is -1.

    x [T, D] or one row per copy [T * K, D], weight [L, N, D], slots [T, K] -> [T * K, N]. For few tokens.
    """
    slot = slots.flatten()
    rows = x.repeat_interleave(len(slot) // max(1, len(x)), 0)
    out = torch.bmm(weight[slot.clamp(min=0)], rows[:, :, None])[..., 0]
    return out.masked_fill(slot[:, None] < 0, 0.0)


def swiglu_of_copies(x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    """Return silu_mul of gemm_of_copies: weight [L, 2I, D] -> [T * K, I]."""
    return silu_mul(gemm_of_copies(x, weight, slots))


def grouped_gemm_contiguous_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Groups
) -> Tensor:
    """Do grouped_gemm_contiguous on x [M, D] in 1x128 and weight [L, N, D] in 128x128 -> bf16, summed in float32."""
    x, weight = dequantize_1x128(x, x_scale), dequantize_128x128(weight, weight_scale)
    return grouped_gemm_contiguous(x, weight, groups).bfloat16()


def grouped_gemm_masked_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor) -> Tensor:
    """Do grouped_gemm_masked on x [L, R, D] in 1x128 and weight [L, N, D] in 128x128 -> bf16, summed in float32."""
    x, weight = dequantize_1x128(x, x_scale), dequantize_128x128(weight, weight_scale)
    return grouped_gemm_masked(x, weight, counts).bfloat16()


def pack_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> None:
    """Copy pages [n] int64 of every layer of pool [layers, pages, 64, W] to packed [layers, n, 64, W] contiguous."""
    torch.index_select(pool, 1, pages, out=packed)


def unpack_pages(packed: Tensor, pool: Tensor, pages: Tensor) -> None:
    """Undo `pack_pages`, in place: packed [layers, n, 64, W] -> pool's pages [n] int64, all different."""
    page = pool[0, 0].numel()
    wide_pool, wide_packed = (x.view(*x.shape[:2], page).view(torch.int64) for x in (pool, packed))  # faster on a CPU
    wide_pool.index_copy_(1, pages, wide_packed)
