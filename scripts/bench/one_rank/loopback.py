"""Dispatchers for one rank of N alone: they send nothing, and invent the tokens that the other ranks would send.

For benchmarks of one rank's own work. Its experts get as many rows as in the whole deployment, in the same layouts, and
it computes everything that such a rank computes. Received rows are SIMULATED, and so are the results that return to
this rank's tokens: numbers of the right size without meaning. A transfer takes no time, or with a `SimulatedLink` the
modelled time. In DeepEP's normal mode the host waits for a dispatch's counts; here it never waits.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from kernels.addends import Addends
from kernels.fp8 import Quantized
from kernels.ops import Ops
from parallel.dispatch import Contiguous, Masked, Pending
from scripts.bench.one_rank.simulated_link import SimulatedLink
from scripts.bench.one_rank.simulated_load import SimulatedLoad

# Tokens that every rank sends -> the loads of successive dispatches, which repeat in a cycle.
Arriving = Callable[[int], Sequence[SimulatedLoad]]


class LoopbackContiguous:
    """A dispatcher with ContiguousAllToAll's contract.

    The received tokens are scattered to their experts and gathered again, because that is this rank's own work.
    """

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
    ) -> None:
        """`most`: the most tokens that a rank dispatches at once.

        `like`: a row [1, D] as it travels, bare or quantised. Received rows get its dtype and device.
        """
        self.arriving, self.top_k, self.ops, self.link = arriving, top_k, ops, link
        self.num_sms = link.num_sms if link is not None else 0
        bare = isinstance(like, Tensor)
        self.device, dtype = (like.device, like.dtype) if bare else (like[0].device, torch.bfloat16)
        generator = torch.Generator(self.device).manual_seed(0)
        tokens = max(arrivals.tokens for arrivals in arriving(most))
        value = torch.randn(tokens, hidden, generator=generator, device=self.device, dtype=dtype)
        self.rows = (value, None) if bare else ops.quantize_1x128(value)
        self.back = torch.randn(most, hidden, generator=generator, device=self.device, dtype=dtype)
        self.turns: dict[int, Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]] = {}  # by tokens sent; see `_make`

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        tokens = slots.shape[0]
        received = _start(self.link, "dispatch", tokens)
        if tokens not in self.turns:
            self.turns[tokens] = cycle([self._make(arrivals) for arrivals in self.arriving(tokens)])
        experts, row_weights, counts = next(self.turns[tokens])
        rows, scales = (part if part is None else part[: len(experts)] for part in self.rows)

        def receive() -> Callable[[], Contiguous]:
            received()
            return group

        def group() -> Contiguous:
            grouped, groups, index, *scale = self.ops.ep_scatter(
                rows, experts, len(counts), self.ops.alignment, counts, scales
            )
            return Contiguous(grouped, groups, (index, row_weights, tokens), *scale)

        return Pending(receive)

    def _make(self, arrivals: SimulatedLoad) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Return the received tokens' experts and weights, and the experts' counts."""
        ids = _assign(arrivals, self.top_k, self.device)
        return ids, torch.full(ids.shape, 1 / self.top_k, device=self.device), arrivals.counts

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Addends]:
        index, row_weights, tokens = way_back
        sent = self.ops.ep_gather(y, index, row_weights)
        received = _start(self.link, "combine", tokens)
        return _returned(self.back, tokens, plus, received, sent if self.link is not None else None)


class LoopbackMasked:
    """A dispatcher with MaskedAllToAll's contract. As in DeepEP, there are rows for all tokens of all ranks."""

    casts, num_sms = True, 0  # like DeepEP it casts; here that takes no time

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
    ) -> None:
        """`most`: the most tokens that a rank dispatches at once. `capacity`: rows per expert (ranks * most)."""
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
            # Column-major, as DeepEP returns them and DeepGEMM reads them.
            self.scale = torch.zeros(local, hidden // 128, capacity, device=device).transpose(1, 2)
            self.scale[:, : scale.shape[1]] = scale
            self.x.view(torch.uint8)[:, : values.shape[1]] = values.view(torch.uint8)
        else:
            self.x[:, : some.shape[1]] = some.to(dtype)
        self.back = torch.randn(most, hidden, generator=generator, device=device).to(dtype)

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Masked]:
        """Start a dispatch. A CUDA graph can capture it for numbers of tokens that ran before."""
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

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Addends]:
        (tokens,) = way_back
        return _returned(self.back, tokens, plus, _start(self.link, "combine", tokens))


def _start(link: SimulatedLink | None, what: str, tokens: int) -> Callable[[], None]:
    return (lambda: None) if link is None else link.start(what, tokens)


def _returned(
    back: Tensor, tokens: int, plus: Tensor | None, received: Callable[[], None], sent: Tensor | None = None
) -> Pending[Addends]:
    """Start a combine. `sent` is kept alive until it is received, as in normal mode; low latency copies it at once."""

    def receive() -> Callable[[], Addends]:
        nonlocal sent
        received()
        sent = None
        return lambda: Addends(back[:tokens], None, None, plus)

    return Pending(receive)


def _assign(arrivals: SimulatedLoad, top_k: int, device: torch.device) -> Tensor:
    """Return local expert ids [tokens, K], -1 = on another rank. No token has an expert twice.

    Each expert gets its count of copies. They are dealt to the tokens in turn, expert after expert.
    """
    expert = torch.arange(len(arrivals.counts)).repeat_interleave(torch.tensor(arrivals.counts))
    copy = torch.arange(len(expert))
    assigned = torch.full((arrivals.tokens, top_k), -1)
    assigned[copy % arrivals.tokens, copy // arrivals.tokens] = expert
    return assigned[torch.randperm(arrivals.tokens, generator=torch.Generator().manual_seed(0))].to(device)
