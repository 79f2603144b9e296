"""Tokens to experts and back over one all-to-all each way. The same calls are served by NCCL and by gloo.

A token travels once to each rank that holds any of its experts, with the ids and weights of the experts it wants
there; that rank spreads it over its experts' rows, and sums the weighted results before they travel back:

    source rank                       expert rank                          source rank
    x [T, D], slots [T, K]  -- row -> scatter to experts, GEMMs, gather -- row -> sum over ranks [T, D]

A row on the wire is bytes (gloo knows no fp8), with its scales if the tokens are in fp8; what comes back never is:

    hidden | scales (float32) | K local expert ids (int32) | K weights (float32)

Two layouts, as in DeepEP: `Contiguous` ("normal": as many rows as were routed, sizes known on the host) for prefill,
`Masked` ("low latency": fixed shapes, counts only on the device, safe in a CUDA graph) for decode. One rank alone has a
third for the smallest decode steps, `Copies`, which sorts nothing. And where far more arrives for prefill than evenly
spread tokens would bring, `Sliced` has its experts take it a slice at a time: bad routing costs time, not memory.
A dispatch and a combine are each split into start and `Pending`, so that other work can run in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.ops import Ops
from parallel.mesh import Group

FEW_COPIES = 16  # of a step on one rank: it reads whole weights for each, but starts few kernels
IMBALANCE = 2  # copies at a rank, over their mean, from which on its experts take slices
Result = TypeVar("Result")


@dataclass(frozen=True)
class Contiguous:
    """Rows grouped by local expert, each group padded to the GEMM's alignment."""

    x: Tensor  # [M, D]; padding rows are undefined
    row_expert: Tensor  # [M] int32, -1 = padding
    way_back: tuple  # what combine needs
    scale: Tensor | None = None  # [M, D / 128] float32 if x is in fp8


@dataclass(frozen=True)
class Masked:
    """A fixed room for each local expert, filled from the front."""

    x: Tensor  # [L, rows, D]; rows past the count are undefined
    counts: Tensor  # [L] int32, on the device
    way_back: tuple
    scale: Tensor | None = None  # [L, rows, D / 128] float32 if x is in fp8


@dataclass(frozen=True)
class Copies:
    """Few tokens, which are not sorted: a GEMM reads the weights of each copy's slot. Bare, never in fp8."""

    x: Tensor  # [T, D]
    slots: Tensor  # [T, K] int64 local ids, -1 = nowhere
    way_back: tuple


@dataclass(frozen=True)
class Sliced:
    """Tokens as they arrived, with too many copies to be grouped at once: `part` groups `size` tokens of them. Experts
    give not rows but the tokens' weighted sums [N, D]."""

    x: Tensor  # [N, D]
    experts: Tensor  # [N, K] int64 local ids, -1 = not here
    weights: Tensor  # [N, K] float32
    size: int
    way_back: tuple
    scale: Tensor | None = None  # [N, D / 128] float32 if x is in fp8

    def part(self, at: int, ops: Ops, num_local: int) -> Contiguous:
        """The next `size` tokens from `at` on, grouped. Its way back is what `ep_gather` takes: index and weights."""
        end = at + self.size
        scales = None if self.scale is None else self.scale[at:end]
        rows, row_expert, index, *scale = ops.ep_scatter(
            self.x[at:end], self.experts[at:end], num_local, ops.alignment, scales=scales
        )
        return Contiguous(rows, row_expert, (index, self.weights[at:end]), *scale)


Arrived = Contiguous | Masked | Copies | Sliced


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """Started communication, to be received exactly once. What `receive()` gives makes the result of what came, once:
    rows in the experts' layout are large, and should not be there before the experts take them."""

    receive: Callable[[], Callable[[], Result]]

    def wait(self) -> Result:
        return self.receive()()


def once(make: Callable[..., Result], *given: Any) -> Callable[[], Result]:
    """`make(*given)`, which lets go of what it was given."""
    held = [given]
    return lambda: make(*held.pop())


class ContiguousAllToAll:
    """Variable splits. The row counts go ahead, so dispatch blocks the host until every rank has routed."""

    casts = False  # does it quantise by itself?
    num_sms = 0  # to leave to it while another micro-batch computes

    def __init__(self, group: Group, num_slots: int, ops: Ops, most_copies: int | None = None):
        """num_slots: P, over all ranks. most_copies: that are grouped at once (None: all); see `most_copies`."""
        self.group, self.ops, self.most_copies = group, ops, most_copies
        self.num_local = num_slots // group.size

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous | Sliced]:
        """x [T, D], bare or quantised; slots [T, K] physical ids, -1 = nowhere, none twice in a row; weights [T, K]."""
        payload = _columns(x)
        rank_of = slots.div(self.num_local, rounding_mode="floor")  # [T, K]; -1 stays -1
        to_rank = _one_hot(rank_of, self.group.size)  # [T, R] bool
        rank, token = to_rank.T.nonzero(as_tuple=True)  # ordered by rank, then token
        send = to_rank.sum(0)
        recv = self.group.all_to_all(send).wait()
        send, recv = torch.stack((send, recv)).tolist()  # the host needs both: one copy

        local = (slots[token] - rank[:, None] * self.num_local).where(rank_of[token] == rank[:, None], -1)
        wire, layout = _pack(*(column[token] for column in payload), local.to(torch.int32), weights[token])
        transfer = self.group.all_to_all(wire, send, recv)
        row = to_rank.T.flatten().cumsum(0).view(self.group.size, -1).T - 1  # [T, R] where (t, r) went on the wire
        returned = _distinct_rows(rank_of, row)

        def receive() -> Callable[[], Contiguous | Sliced]:
            nonlocal transfer
            *rows, experts, row_weights = _unpack(transfer.wait(), layout)
            transfer = None  # and with it the bytes as they were sent and came
            rows, scales = _rows(rows)
            return once(
                group_by_expert, self.ops, rows, scales, experts.long(), row_weights, self.num_local, self.most_copies,
                (returned, send, recv),
            )  # fmt: skip

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """y [M, D], the experts' outputs on the rows that arrived, and their way back -> [T, D] on the source ranks, in
        dispatch's order, and `plus` [T, D] added there."""
        summed, returned, send, recv = sum_of_copies(self.ops, y, *way_back)
        transfer = self.group.all_to_all(summed, recv, send)
        return Pending(lambda: once(self.ops.ep_gather, transfer.wait(), returned, None, plus))


class MaskedAllToAll:
    """Equal splits of T rows for each pair of ranks, whatever was routed; nothing waits for the host."""

    casts = False  # does it quantise by itself?
    num_sms = 0

    def __init__(self, group: Group, num_slots: int, ops: Ops):
        self.group, self.ops = group, ops
        self.num_local = num_slots // group.size

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Masked]:
        """As ContiguousAllToAll.dispatch; every rank must pass the same number T of tokens, padding included."""
        (num_tokens, top_k), ranks = slots.shape, self.group.size
        rank_of = slots.div(self.num_local, rounding_mode="floor")
        to_rank = _one_hot(rank_of, ranks)
        device = slots.device
        place = to_rank.cumsum(0) - 1 + torch.arange(ranks, device=device) * num_tokens  # [T, R] row on the wire
        sentinel = ranks * num_tokens
        source = torch.full((sentinel + 1,), num_tokens, dtype=torch.int64, device=device)
        token = torch.arange(num_tokens, device=device)[:, None].expand_as(place)
        source.scatter_(0, place.where(to_rank, sentinel).flatten(), token.flatten())
        source = source[:-1]  # [R * T] the token in each row on the wire; num_tokens = none

        # One more token, that wants no expert, fills the rows that nobody routed.
        payload = [torch.cat((column, column.new_zeros(1, column.shape[1]))) for column in _columns(x)]
        slots = torch.cat((slots, slots.new_full((1, top_k), -1)))
        weights = torch.cat((weights, weights.new_zeros(1, top_k)))
        first_slot = torch.arange(ranks, device=device).repeat_interleave(num_tokens)[:, None] * self.num_local
        local = slots[source] - first_slot
        local = local.where((local >= 0) & (local < self.num_local), -1)
        wire, layout = _pack(*(column[source] for column in payload), local.to(torch.int32), weights[source])
        transfer = self.group.all_to_all(wire)
        returned = _distinct_rows(rank_of, place)

        def receive() -> Callable[[], Masked]:
            nonlocal transfer
            *rows, experts, row_weights = _unpack(transfer.wait(), layout)
            transfer = None  # and with it the bytes as they were sent and came
            rows, scales = _rows(rows)
            return once(group, rows, scales, experts.long(), row_weights)

        def group(rows: Tensor, scales: Tensor | None, experts: Tensor, row_weights: Tensor) -> Masked:
            grouped, counts, index, *scale = self.ops.ep_scatter_masked(
                rows, experts, self.num_local, self.ops.alignment, scales=scales
            )
            return Masked(grouped, counts, (index, row_weights, returned), *scale)

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """y [L, rows, D] -> [T, D], as ContiguousAllToAll.combine."""
        index, row_weights, returned = way_back
        transfer = self.group.all_to_all(self.ops.ep_gather(y.flatten(0, 1), index, row_weights))
        return Pending(lambda: once(self.ops.ep_gather, transfer.wait(), returned, None, plus))


class LocalContiguous:
    """What is left of a dispatch when one rank holds every expert: nothing travels."""

    casts, num_sms = False, 0

    def __init__(self, num_slots: int, ops: Ops):
        self.num_local, self.ops = num_slots, ops

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        return Pending(lambda: once(self._group, x, slots, weights))

    def _group(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Contiguous:
        x, scales = (x, None) if isinstance(x, Tensor) else x
        rows, row_expert, index, *scale = self.ops.ep_scatter(
            x, slots, self.num_local, self.ops.alignment, scales=scales
        )
        return Contiguous(rows, row_expert, (index, weights), *scale)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """y [..., D]: a row for each copy, whatever the layout."""
        out = self.ops.ep_gather(y.flatten(0, -2), *way_back, plus)
        return Pending(lambda: lambda: out)


class LocalMasked(LocalContiguous):
    """The same in the masked layout. With few tokens there are not even rooms to sort them into."""

    def _group(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Masked | Copies:
        if isinstance(x, Tensor) and slots.numel() <= FEW_COPIES:
            return Copies(x, slots, (None, weights))
        x, scales = (x, None) if isinstance(x, Tensor) else x
        rows, counts, index, *scale = self.ops.ep_scatter_masked(
            x, slots, self.num_local, self.ops.alignment, scales=scales
        )
        return Masked(rows, counts, (index, weights), *scale)


def most_copies(tokens: int, top_k: int) -> int:
    """The most that a rank groups at once where each rank sends `tokens` tokens, which want `top_k` experts each:
    IMBALANCE times what arrives on average."""
    return IMBALANCE * tokens * top_k


def group_by_expert(
    ops: Ops,
    x: Tensor,
    scales: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    num_local: int,
    most: int | None,
    way_back: tuple,
    counts: list[int] | None = None,
) -> Contiguous | Sliced:
    """What arrived, grouped; in slices if it has over `most` copies. `counts`: of each expert, if the host knows them;
    else it must ask, where so many are possible. Their sums go back with `sum_of_copies`."""
    of_token = min(experts.shape[1], num_local)
    if most is not None and experts.shape[0] * of_token > most:
        copies = int((experts >= 0).sum()) if counts is None else sum(counts)
        if copies > most:
            return Sliced(x, experts, weights, max(1, most // of_token), (None, None, *way_back), scales)
    grouped, row_expert, index, *scale = ops.ep_scatter(x, experts, num_local, ops.alignment, counts, scales)
    return Contiguous(grouped, row_expert, (index, weights, *way_back), *scale)


def sum_of_copies(ops: Ops, y: Tensor, index: Tensor | None, weights: Tensor | None, *way_back: Any) -> tuple:
    """Experts' outputs -> the weighted sum for each token that arrived [N, D] (slices give those), and what else the
    way back needs."""
    return y if index is None else ops.ep_gather(y, index, weights), *way_back


def _one_hot(rank_of: Tensor, ranks: int) -> Tensor:
    """[T, K] ranks (-1 = none) -> [T, R] bool: does token t go to rank r?"""
    hot = torch.zeros(rank_of.shape[0], ranks + 1, dtype=torch.bool, device=rank_of.device)
    hot.scatter_(1, rank_of.where(rank_of >= 0, ranks), True)
    return hot[:, :ranks]


def _distinct_rows(rank_of: Tensor, row: Tensor) -> Tensor:
    """[T, K]: for the first of token t's experts on each rank, the row that comes back from there; -1 for the others.

    It makes the final sum run in a fixed order, so that results do not depend on how rows were grouped.
    """
    earlier = (rank_of[:, :, None] == rank_of[:, None, :]).tril(-1).any(-1)
    return row.gather(1, rank_of.clamp(min=0)).where((rank_of >= 0) & ~earlier, -1)


def _columns(x: Tensor | Quantized) -> tuple[Tensor, ...]:
    """What travels for each token, in dtypes that every op knows: fp8 in words of four."""
    if isinstance(x, Tensor):
        return (x,)
    values, scale = x
    return values.view(torch.int32), scale


def _rows(columns: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """_columns undone: (x, None), or fp8 values and their scales."""
    if len(columns) == 1:
        return columns[0], None
    return columns[0].view(torch.float8_e4m3fn), columns[1]


def _pack(*columns: Tensor) -> tuple[Tensor, list[tuple[torch.dtype, int]]]:
    """Rows of bytes, and what is in them: each column's dtype and width."""
    wire = torch.cat([column.contiguous().view(torch.uint8) for column in columns], 1)
    return wire, [(column.dtype, column.shape[1]) for column in columns]


def _unpack(wire: Tensor, layout: list[tuple[torch.dtype, int]]) -> list[Tensor]:
    pieces = wire.split([dtype.itemsize * width for dtype, width in layout], dim=1)
    return [piece.contiguous().view(dtype) for piece, (dtype, _) in zip(pieces, layout, strict=True)]
