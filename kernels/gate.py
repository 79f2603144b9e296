"""The top-k gate in Triton: a token's experts and their weights, from its logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.pdl import after_previous, pdl


@triton.jit(do_not_specialize=["is_token"])
def gate_kernel(
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

    choice, scores = tl.reshape(choice, [G * P]), tl.reshape(scores, [G * P])
    slot, k = tl.arange(0, G * P), tl.arange(0, K)
    ids = tl.zeros((K,), dtype=tl.int32)
    weights = tl.zeros((K,), dtype=tl.float32)
    for i in range(top_k):
        best = tl.argmax(choice, 0)
        taken = slot == best
        ids = tl.where(k == i, best // P * per_group + best % P, ids)
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
        gate_kernel[tokens,](
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
