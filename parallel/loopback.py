"""One rank of N, alone: a dispatcher that sends nothing, and lets made-up tokens of the other ranks arrive.

For benchmarks of one rank's own work: the experts get as many rows as they would in the whole deployment, in the same
layouts, and all that a rank computes it computes. What arrives is SIMULATED, and so is what comes back to this rank's
tokens: numbers of the right size without meaning. No transfer takes any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from kernels.backend import Ops, Quantized
from parallel.dispatch import Contiguous, Masked, Pending


@dataclass(frozen=True)
class Arrivals:
    """What reaches this rank in one dispatch."""

    counts: tuple[int, ...]  # rows of each of its experts
    tokens: int  # distinct tokens: those that want several of its experts arrive once

    @classmethod
    def even(
        cls, tokens: int, ranks: int, top_k: int, slots: int, skew: float = 1.0, distinct: float | None = None
    ) -> "Arrivals":
        """Of `ranks` ranks with `tokens` tokens each, that choose `top_k` of `slots` slots, slots / ranks of them here.

        `skew`: the fullest expert's rows over the mean, at most 2; the others fall evenly below it, around the same
        mean. `distinct`: the share of all tokens that come here (`share_of_tokens`); None: no more than must.
        ValueError for what cannot be.
        """
        if slots % ranks:
            raise ValueError(f"slots % ranks must be 0, not {slots} % {ranks} = {slots % ranks}")
        if not 1 <= skew <= 2:
            raise ValueError(f"skew is {skew}; it must be in [1, 2]")
        local = slots // ranks
        mean = tokens * ranks * top_k / slots
        slope = 0.0 if local == 1 else 2 / (local - 1)
        counts = _whole([mean * (1 + (skew - 1) * (1 - slope * i)) for i in range(local)])
        least = max(max(counts), -(-sum(counts) // top_k))
        return cls(counts, max(least, round((distinct or 0.0) * tokens * ranks)))

    @classmethod
    def recorded(cls, loads: Sequence[float], tokens: int, top_k: int, distinct: float | None = None) -> "Arrivals":
        """As a recording says: `loads` of this rank's slots, as shares of all copies of all ranks' `tokens` tokens."""
        counts = _whole([load * tokens * top_k for load in loads])
        least = max(max(counts), -(-sum(counts) // top_k))
        return cls(counts, max(least, round((distinct or 0.0) * tokens)))


def _whole(parts: list[float]) -> tuple[int, ...]:
    """Rounded so that the sum is the rounded sum: what is missing goes to the largest remainders."""
    counts = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])
    for i in by_remainder[: round(sum(parts)) - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def share_of_tokens(experts: int, ranks: int, top_k: int, groups: int = 1, groups_chosen: int = 1) -> float:
    """The share of tokens that want any of a rank's experts, which lie in one group, under uniform group-limited
    routing: the group is chosen, and not all of the token's experts are elsewhere in the chosen groups."""
    local, within = max(1, experts // ranks), experts * groups_chosen // groups
    return groups_chosen / groups * (1 - comb(within - local, top_k) / comb(within, top_k))


class LoopbackContiguous:
    """ContiguousAllToAll's contract. The arrived tokens are scattered to their experts and gathered again, for that is
    this rank's own work."""

    casts = False

    def __init__(
        self,
        arrivals: Arrivals,
        hidden: int,
        top_k: int,
        ops: Ops,
        like: Tensor | Quantized,
    ):
        """`like`: a row [1, D] as it travels, bare or quantised: what arrives is of its dtype, on its device."""
        self.arrivals, self.ops = arrivals, ops
        bare = isinstance(like, Tensor)
        device, dtype = (like.device, like.dtype) if bare else (like[0].device, torch.bfloat16)
        generator = torch.Generator(device).manual_seed(0)
        value = torch.randn(arrivals.tokens, hidden, generator=generator, device=device)
        self.rows = value.to(dtype) if bare else ops.quantize_1x128(value.to(dtype))
        self.experts = _assign(arrivals, top_k, device)
        self.weights = torch.full(self.experts.shape, 1 / top_k, device=device)
        self.back = torch.randn(1, hidden, generator=generator, device=device).to(
            like.dtype if bare else torch.bfloat16
        )

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        rows, scales = (self.rows, None) if isinstance(self.rows, Tensor) else self.rows

        def wait() -> Contiguous:
            grouped, row_expert, index, *scale = self.ops.ep_scatter(
                rows, self.experts, len(self.arrivals.counts), self.ops.alignment, scales=scales
            )
            return Contiguous(grouped, row_expert, (index, slots.shape[0]), *scale)

        return Pending(wait)

    def combine(self, y: Tensor, arrived: Contiguous, plus: Tensor | None = None) -> Pending[Tensor]:
        index, tokens = arrived.way_back
        self.ops.ep_gather(y, index, self.weights)  # what would be sent back
        return _returned(self.back, tokens, plus)


class LoopbackMasked:
    """MaskedAllToAll's contract, and DeepEP's room: rows for all that every rank may send."""

    casts = True  # as DeepEP does, and here at no cost

    def __init__(
        self,
        arrivals: Arrivals,
        capacity: int,
        hidden: int,
        ops: Ops,
        device: torch.device,
        fp8: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """`capacity`: rows of an expert's room: ranks * tokens a rank."""
        local = len(arrivals.counts)
        if max(arrivals.counts) > capacity:
            raise ValueError(f"rows of an expert <= capacity must hold, not {max(arrivals.counts)} <= {capacity}")
        generator = torch.Generator(device).manual_seed(0)
        some = torch.randn(local, max(arrivals.counts), hidden, generator=generator, device=device)
        self.counts = torch.tensor(arrivals.counts, dtype=torch.int32, device=device)
        self.x = torch.zeros(local, capacity, hidden, dtype=torch.float8_e4m3fn if fp8 else dtype, device=device)
        self.scale = None
        if fp8:
            values, scale = ops.quantize_1x128(some.to(dtype))
            # Column by column, as DeepEP gives them and DeepGEMM reads them.
            self.scale = torch.zeros(local, hidden // 128, capacity, device=device).transpose(1, 2)
            self.scale[:, : scale.shape[1]] = scale
            self.x.view(torch.uint8)[:, : values.shape[1]] = values.view(torch.uint8)
        else:
            self.x[:, : some.shape[1]] = some.to(dtype)
        self.back = torch.randn(1, hidden, generator=generator, device=device).to(dtype)

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Masked]:

        def wait() -> Masked:
            return Masked(self.x, self.counts, (slots.shape[0],), self.scale)

        return Pending(wait)

    def combine(self, y: Tensor, arrived: Masked, plus: Tensor | None = None) -> Pending[Tensor]:
        return _returned(self.back, arrived.way_back[0], plus)


def _returned(back: Tensor, tokens: int, plus: Tensor | None) -> Pending[Tensor]:
    def wait() -> Tensor:
        out = back.expand(tokens, -1)
        return out.clone() if plus is None else out + plus

    return Pending(wait)


def _assign(arrivals: Arrivals, top_k: int, device: torch.device) -> Tensor:
    """[tokens, K] local expert ids, -1 = elsewhere: each expert as often as promised, none twice for a token. Copies
    are dealt to the tokens in turn, expert after expert."""
    expert = torch.arange(len(arrivals.counts)).repeat_interleave(torch.tensor(arrivals.counts))
    copy = torch.arange(len(expert))
    assigned = torch.full((arrivals.tokens, top_k), -1)
    assigned[copy % arrivals.tokens, copy // arrivals.tokens] = expert
    return assigned[torch.randperm(arrivals.tokens, generator=torch.Generator().manual_seed(0))].to(device)
