"""One rank of N, alone: a dispatcher that sends nothing, and lets made-up tokens of the other ranks arrive.

For benchmarks of one rank's own work: the experts get as many rows as they would in the whole deployment, in the same
layouts, and all that a rank computes it computes. What arrives is SIMULATED, and so is what comes back to this rank's
tokens: numbers of the right size without meaning. A transfer takes no time, or with a `SimulatedLink` the modelled one.
DeepEP's normal mode would also make the host wait for a dispatch's counts; here it never waits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import comb, prod

import torch
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.ops import Ops
from parallel.dispatch import Contiguous, Masked, Pending
from scripts.bench.one_rank.simulated_link import SimulatedLink


@dataclass(frozen=True)
class SimulatedLoad:
    """What reaches this rank in one dispatch."""

    counts: tuple[int, ...]  # rows of each of its experts
    tokens: int  # distinct tokens: those that want several of its experts arrive once

    @classmethod
    def even(
        cls, tokens: int, ranks: int, top_k: int, slots: int, skew: float = 1.0, distinct: float | None = None
    ) -> "SimulatedLoad":
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
    def of_shares(cls, shares: Sequence[float], tokens: int, ranks: int, top_k: int) -> "SimulatedLoad":
        """Of `ranks` ranks with `tokens` tokens each, that choose `top_k` slots; `shares`: of all those choices, that
        fall on each of this rank's experts. Which tokens choose one is taken not to depend on which choose another.
        ValueError for a share that needs more tokens than there are."""
        if max(shares) * top_k > 1:
            raise ValueError(f"shares * top_k must be at most 1, not {max(shares):.4f} * {top_k}")
        counts = _whole([share * tokens * ranks * top_k for share in shares])
        least = max(max(counts), -(-sum(counts) // top_k))
        return cls(counts, max(least, round(tokens * ranks * (1 - prod(1 - share * top_k for share in shares)))))


def _whole(parts: list[float]) -> tuple[int, ...]:
    """Rounded so that the sum is the rounded sum: what is missing goes to the largest remainders."""
    counts = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])
    for i in by_remainder[: round(sum(parts)) - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def share_of_tokens(experts: int, places: int, top_k: int, groups: int = 1, groups_chosen: int = 1) -> float:
    """The share of tokens that want any of the experts in one of `places` (ranks, or nodes of ranks), under uniform
    group-limited routing. A place holds a part of one group, or whole groups: some of those are chosen, and then not
    all of the token's experts are elsewhere in the chosen groups."""
    local, within = max(1, experts // places), experts * groups_chosen // groups
    mine = max(1, groups * local // experts)  # groups
    share = 0.0
    for chosen in range(1, min(mine, groups_chosen) + 1):
        likely = comb(mine, chosen) * comb(groups - mine, groups_chosen - chosen) / comb(groups, groups_chosen)
        share += likely * (1 - comb(within - local // mine * chosen, top_k) / comb(within, top_k))
    return share


# When every rank sends so many tokens: what arrives in one dispatch, in the next, and so on, and then again.
Arriving = Callable[[int], Sequence[SimulatedLoad]]


class LoopbackContiguous:
    """ContiguousAllToAll's contract. The arrived tokens are scattered to their experts and gathered again, for that is
    this rank's own work."""

    casts = False

    def __init__(
        self,
        arriving: Arriving,
        most: int,
        hidden: int,
        top_k: int,
        ops: Ops,
        like: Tensor | Quantized,
        link: SimulatedLink | None = None,
    ):
        """`most`: tokens that a rank dispatches at once. `like`: a row [1, D] as it travels, bare or quantised: what
        arrives is of its dtype, on its device."""
        self.arriving, self.top_k, self.ops, self.link = arriving, top_k, ops, link
        self.num_sms = link.num_sms if link is not None else 0
        bare = isinstance(like, Tensor)
        self.device, dtype = (like.device, like.dtype) if bare else (like[0].device, torch.bfloat16)
        generator = torch.Generator(self.device).manual_seed(0)
        tokens = max(arrivals.tokens for arrivals in arriving(most))
        value = torch.randn(tokens, hidden, generator=generator, device=self.device, dtype=dtype)
        self.rows = (value, None) if bare else ops.quantize_1x128(value)
        self.back = torch.randn(1, hidden, generator=generator, device=self.device, dtype=dtype)
        self.turns: dict[int, Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]] = {}  # by tokens sent, see `_made`

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        tokens = slots.shape[0]
        received = _start(self.link, "dispatch", tokens)
        if tokens not in self.turns:
            self.turns[tokens] = cycle([self._made(arrivals) for arrivals in self.arriving(tokens)])
        experts, row_weights, counts = next(self.turns[tokens])
        rows, scales = (part if part is None else part[: len(experts)] for part in self.rows)

        def receive() -> Callable[[], Contiguous]:
            received()
            return group

        def group() -> Contiguous:
            grouped, row_expert, index, *scale = self.ops.ep_scatter(
                rows, experts, len(counts), self.ops.alignment, counts, scales
            )
            return Contiguous(grouped, row_expert, (index, row_weights, tokens), *scale)

        return Pending(receive)

    def _made(self, arrivals: SimulatedLoad) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Of the tokens that arrive, the experts and weights; the experts' counts."""
        ids = _assign(arrivals, self.top_k, self.device)
        return ids, torch.full(ids.shape, 1 / self.top_k, device=self.device), arrivals.counts

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        index, row_weights, tokens = way_back
        sent = self.ops.ep_gather(y, index, row_weights)
        received = _start(self.link, "combine", tokens)
        return _returned(self.back, tokens, plus, received, sent if self.link is not None else None)


class LoopbackMasked:
    """MaskedAllToAll's contract, and DeepEP's room: rows for all that every rank may send."""

    casts, num_sms = True, 0  # it casts as DeepEP does, and here at no cost

    def __init__(
        self,
        arriving: Arriving,
        most: int,
        capacity: int,
        hidden: int,
        ops: Ops,
        device: torch.device,
        fp8: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        link: SimulatedLink | None = None,
    ):
        """`most`: tokens a rank dispatches at once; `capacity`: rows of an expert's room: ranks * tokens a rank."""
        self.arriving, self.link, at_most = arriving, link, arriving(most)
        local, rows = len(at_most[0].counts), max(max(arrivals.counts) for arrivals in at_most)
        if rows > capacity:
            raise ValueError(f"rows of an expert <= capacity must hold, not {rows} <= {capacity}")
        generator = torch.Generator(device).manual_seed(0)
        some = torch.randn(local, rows, hidden, generator=generator, device=device)
        self.turns: dict[int, Iterator[Tensor]] = {}  # by tokens sent: the experts' counts
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
        """A CUDA graph can capture sizes that ran before."""
        tokens = slots.shape[0]
        received = _start(self.link, "dispatch", tokens)
        if tokens not in self.turns:
            counts = torch.tensor([arrivals.counts for arrivals in self.arriving(tokens)], dtype=torch.int32)
            self.turns[tokens] = cycle(counts.to(self.x.device))
        counts = next(self.turns[tokens])

        def receive() -> Callable[[], Masked]:
            received()
            return lambda: Masked(self.x, counts, (tokens,), self.scale)

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        (tokens,) = way_back
        return _returned(self.back, tokens, plus, _start(self.link, "combine", tokens))


def _start(link: SimulatedLink | None, what: str, tokens: int) -> Callable[[], None]:
    return (lambda: None) if link is None else link.start(what, tokens)


def _returned(
    back: Tensor, tokens: int, plus: Tensor | None, received: Callable[[], None], sent: Tensor | None = None
) -> Pending[Tensor]:
    """`sent` is kept until it is received, as normal mode keeps it; low latency copies it away at once."""

    def receive() -> Callable[[], Tensor]:
        nonlocal sent
        received()
        sent = None
        out = back.expand(tokens, -1)
        return lambda: out.clone() if plus is None else out + plus

    return Pending(receive)


def _assign(arrivals: SimulatedLoad, top_k: int, device: torch.device) -> Tensor:
    """[tokens, K] local expert ids, -1 = elsewhere: each expert as often as promised, none twice for a token. Copies
    are dealt to the tokens in turn, expert after expert."""
    expert = torch.arange(len(arrivals.counts)).repeat_interleave(torch.tensor(arrivals.counts))
    copy = torch.arange(len(expert))
    assigned = torch.full((arrivals.tokens, top_k), -1)
    assigned[copy % arrivals.tokens, copy // arrivals.tokens] = expert
    return assigned[torch.randperm(arrivals.tokens, generator=torch.Generator().manual_seed(0))].to(device)
