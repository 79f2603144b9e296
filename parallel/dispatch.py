"""Tokens to experts and back over one all-to-all each way. The same calls are served by NCCL and by gloo.

A token travels once to each rank that holds any of its experts, with the ids and weights of the experts it wants
there. That rank copies it to its experts' rows, and sums the weighted results before they travel back:

    source rank                       expert rank                          source rank
    x [T, D], slots [T, K]  -- row -> scatter to experts, GEMMs, gather -- row -> sum over ranks [T, D]

A row on the wire is bytes, because gloo has no fp8. Tokens in fp8 travel with their scales; results are never in fp8:

    hidden | scales (float32) | K local expert ids (int32) | K weights (float32)

The experts take rows in one of four layouts. The first two are as in DeepEP:

    Contiguous   "normal", for prefill: the routed rows, their number known on the host
    Masked       "low latency", for decode: fixed shapes, counts only on the device, safe in a CUDA graph
    Copies       for the smallest decode steps on a single rank: nothing is sorted
    Sliced       for prefill with far more rows than balanced routing brings: the experts take one slice at a time,
                 so that bad routing costs time, not memory

A dispatch and a combine each have a start and a `Pending`, so that other work can run in between. The result of a
combine may be `Addends`, which the next norm sums. The all-to-alls and `LocalContiguous` sum at once. Their rows are
several times as large as the sum, and would live on while another micro-batch runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kernels.addends import Addends, Delta
from kernels.fp8 import Quantized
from kernels.groups import Groups
from kernels.ops import Ops
from parallel.copies import grouped_rows
from parallel.mesh import Group

FEW_COPIES = 16  # the most that use `Copies`, which reads an expert's weights once per copy but starts few kernels
Result = TypeVar("Result")


@dataclass(frozen=True)
class Contiguous:
    """Rows grouped by local expert, each group padded to the GEMM's alignment."""

    x: Tensor  # [M, D]; padding rows are undefined
    groups: Groups
    way_back: tuple  # what combine needs
    scale: Tensor | None = None  # [M, D / 128] float32 if x is in fp8


@dataclass(frozen=True)
class Masked:
    """A fixed room per local expert, filled from the front."""

    x: Tensor  # [L, rows, D]; rows past the count are undefined
    counts: Tensor  # [L] int32, on the device
    way_back: tuple
    scale: Tensor | None = None  # [L, rows, D / 128] float32 if x is in fp8


@dataclass(frozen=True)
class Copies:
    """Few tokens, unsorted: for each copy, a GEMM reads the weights of its slot. Never quantised."""

    x: Tensor  # [T, D]
    slots: Tensor  # [T, K] int64 local ids, -1 = nowhere
    way_back: tuple


@dataclass(frozen=True)
class Sliced:
    """Received tokens with too many copies to be grouped at once. `part` groups `size` tokens.

    The experts return the tokens' weighted sums [N, D] instead of rows.
    """

    x: Tensor  # [N, D]
    experts: Tensor  # [N, K] int64 local ids, -1 = not here
    weights: Tensor  # [N, K] float32
    size: int
    way_back: tuple
    scale: Tensor | None = None  # [N, D / 128] float32 if x is in fp8

    def part(self, at: int, ops: Ops, num_local: int) -> Contiguous:
        """Group `size` tokens from token `at` on. The way back is (index, weights), as `ep_gather` takes them."""
        end = at + self.size
        scales = None if self.scale is None else self.scale[at:end]
        rows, groups, index, *scale = ops.ep_scatter(
            self.x[at:end], self.experts[at:end], num_local, ops.alignment, scales=scales
        )
        return Contiguous(rows, groups, (index, self.weights[at:end]), *scale)


Arrived = Contiguous | Masked | Copies | Sliced


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """A dispatch or combine in progress.

    Call `receive()` once. It waits for the data and returns a function. Call that function once. It returns the result:
    grouped rows, or sums. The two calls are separate because grouped rows are large, and should exist only while the
    experts run.
    """

    receive: Callable[[], Callable[[], Result]]

    def wait(self) -> Result:
        return self.receive()()


def once(make: Callable[..., Result], *given: Any) -> Callable[[], Result]:
    """Return a function that calls `make(*given)` once and keeps no reference to `given` afterwards."""
    arguments = [given]
    return lambda: make(*arguments.pop())


class ContiguousAllToAll:
    """Variable splits. The row counts go ahead, so dispatch blocks the host until every rank has routed."""

    casts = False  # whether dispatch itself quantises
    num_sms = 0  # SMs to leave free for it while another micro-batch computes

    def __init__(self, group: Group, num_slots: int, ops: Ops, most_copies: int | None = None) -> None:
        """`num_slots`: P, over all ranks. `most_copies`: how many copies are grouped at once (None: all)."""
        self.group, self.ops, self.most_copies = group, ops, most_copies
        self.num_local = num_slots // group.size

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous | Sliced]:
        """Start sending tokens to their experts' ranks. Collective.

        x [T, D], bare or quantised; slots [T, K] physical ids, -1 = nowhere, no slot twice per token; weights [T, K].
        """
        payload = _columns(x)
        rank_of = slots.div(self.num_local, rounding_mode="floor")  # [T, K]; -1 stays -1
        to_rank = _one_hot(rank_of, self.group.size)  # [T, R] bool
        rank, token = to_rank.T.nonzero(as_tuple=True)  # ordered by rank, then token
        send = to_rank.sum(0)
        recv = self.group.all_to_all(send).wait()
        send, recv = torch.stack((send, recv)).tolist()  # the host needs both: one copy, one wait

        local = (slots[token] - rank[:, None] * self.num_local).where(rank_of[token] == rank[:, None], -1)
        wire, layout = _pack(*(column[token] for column in payload), local.to(torch.int32), weights[token])
        transfer = self.group.all_to_all(wire, send, recv)
        row = to_rank.T.flatten().cumsum(0).view(self.group.size, -1).T - 1  # [T, R] row of (t, r) on the wire
        returned = _distinct_rows(rank_of, row)

        def receive() -> Callable[[], Contiguous | Sliced]:
            nonlocal transfer
            *rows, experts, row_weights = _unpack(transfer.wait(), layout)
            transfer = None  # frees the bytes sent and received
            rows, scales = _rows(rows)
            return once(
                group_by_expert,
                self.ops,
                rows,
                scales,
                experts.long(),
                row_weights,
                self.num_local,
                self.most_copies,
                (returned, send, recv),
            )

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """Start returning the experts' outputs y [M, D], one per received row. Collective.

        The result is [T, D] on the source ranks, in dispatch's order, with `plus` [T, D] added there.
        """
        summed, returned, send, recv = sum_of_copies(self.ops, y, *way_back)
        transfer = self.group.all_to_all(summed, recv, send)
        return Pending(lambda: once(self.ops.ep_gather, transfer.wait(), returned, None, plus))


class MaskedAllToAll:
    """Equal splits: T rows per pair of ranks, whatever was routed. Nothing waits for the host."""

    casts = False
    num_sms = 0

    def __init__(self, group: Group, num_slots: int, ops: Ops) -> None:
        self.group, self.ops = group, ops
        self.num_local = num_slots // group.size

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Masked]:
        """Start a dispatch, as ContiguousAllToAll does. Collective; T, padding included, must be equal on all ranks."""
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

        # One more token, which wants no expert, fills the unused rows.
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
            transfer = None  # frees the bytes sent and received
            rows, scales = _rows(rows)
            return once(group, rows, scales, experts.long(), row_weights)

        def group(rows: Tensor, scales: Tensor | None, experts: Tensor, row_weights: Tensor) -> Masked:
            grouped, counts, index, *scale = self.ops.ep_scatter_masked(
                rows, experts, self.num_local, self.ops.alignment, scales=scales
            )
            return Masked(grouped, counts, (index, row_weights, returned), *scale)

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """Start returning y [L, rows, D] -> [T, D], as ContiguousAllToAll.combine does. Collective."""
        index, row_weights, returned = way_back
        transfer = self.group.all_to_all(self.ops.ep_gather(y.flatten(0, 1), index, row_weights))
        return Pending(lambda: once(self.ops.ep_gather, transfer.wait(), returned, None, plus))


class LocalContiguous:
    """The dispatch of a single rank, which holds every expert: nothing travels, and nothing waits for the host.

    There are as many rows as the copies may take at most. A CUDA graph can hold it.
    """

    casts, num_sms = False, 0

    def __init__(self, num_slots: int, ops: Ops) -> None:
        self.num_local, self.ops = num_slots, ops

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        return Pending(lambda: once(self._group, x, slots, weights))

    def _group(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Contiguous:
        x, scales = (x, None) if isinstance(x, Tensor) else x
        most = grouped_rows(slots.numel(), self.num_local, self.ops.alignment)
        rows, groups, index, *scale = self.ops.ep_scatter(
            x, slots, self.num_local, self.ops.alignment, scales=scales, num_rows=most
        )
        return Contiguous(rows, groups, (index, weights), *scale)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Delta]:
        """Sum y [M, D] -> [T, D]."""
        index, weights = way_back
        out = self.ops.ep_gather(y, index, weights, plus)
        return Pending(lambda: lambda: out)


class LocalMasked(LocalContiguous):
    """The same in the masked layout. Up to FEW_COPIES are not even sorted into rooms."""

    def _group(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Masked | Copies:
        if isinstance(x, Tensor) and slots.numel() <= FEW_COPIES:
            return Copies(x, slots, (None, weights))
        x, scales = (x, None) if isinstance(x, Tensor) else x
        rows, counts, index, *scale = self.ops.ep_scatter_masked(
            x, slots, self.num_local, self.ops.alignment, scales=scales
        )
        return Masked(rows, counts, (index, weights), *scale)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Delta]:
        """Return y [..., D], one row per copy, as `Addends` of [T, D]."""
        index, weights = way_back
        addends = Addends(y.flatten(0, -2), index, weights, plus)
        return Pending(lambda: lambda: addends)


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
    """Group the received tokens, in slices if they have more than `most` copies. See `sum_of_copies` for the way back.

    `counts`: copies per expert, if the host knows them. Otherwise, if more than `most` are possible, this waits for the
    GPU.
    """
    of_token = min(experts.shape[1], num_local)
    if most is not None and experts.shape[0] * of_token > most:
        copies = int((experts >= 0).sum()) if counts is None else sum(counts)
        if copies > most:
            return Sliced(x, experts, weights, max(1, most // of_token), (None, None, *way_back), scales)
    rows, groups, index, *scale = ops.ep_scatter(x, experts, num_local, ops.alignment, counts, scales)
    return Contiguous(rows, groups, (index, weights, *way_back), *scale)


def sum_of_copies(ops: Ops, y: Tensor, index: Tensor | None, weights: Tensor | None, *way_back: Any) -> tuple:
    """Return the weighted sum [N, D] per received token, and the rest of the way back. Slices are summed already."""
    return y if index is None else ops.ep_gather(y, index, weights), *way_back


def _one_hot(rank_of: Tensor, ranks: int) -> Tensor:
    """Return [T, R] bool: does token t go to rank r? `rank_of` [T, K], -1 = none."""
    hot = torch.zeros(rank_of.shape[0], ranks + 1, dtype=torch.bool, device=rank_of.device)
    hot.scatter_(1, rank_of.where(rank_of >= 0, ranks), True)
    return hot[:, :ranks]


def _distinct_rows(rank_of: Tensor, row: Tensor) -> Tensor:
    """Return [T, K]: for the first of token t's experts on each rank, the row that returns from there; -1 for others.

    So the final sum has a fixed order, and results do not depend on how rows were grouped.
    """
    earlier = (rank_of[:, :, None] == rank_of[:, None, :]).tril(-1).any(-1)
    return row.gather(1, rank_of.clamp(min=0)).where((rank_of >= 0) & ~earlier, -1)


def _columns(x: Tensor | Quantized) -> tuple[Tensor, ...]:
    """Return the columns that travel, in dtypes that every op supports: fp8 as words of four values."""
    if isinstance(x, Tensor):
        return (x,)
    values, scale = x
    return values.view(torch.int32), scale


def _rows(columns: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Undo `_columns`: return (x, None), or fp8 values and their scales."""
    if len(columns) == 1:
        return columns[0], None
    return columns[0].view(torch.float8_e4m3fn), columns[1]


def _pack(*columns: Tensor) -> tuple[Tensor, list[tuple[torch.dtype, int]]]:
    """Join columns to rows of bytes. Returns the rows, and each column's dtype and width."""
    wire = torch.cat([column.contiguous().view(torch.uint8) for column in columns], 1)
    return wire, [(column.dtype, column.shape[1]) for column in columns]


def _unpack(wire: Tensor, layout: list[tuple[torch.dtype, int]]) -> list[Tensor]:
    pieces = wire.split([dtype.itemsize * width for dtype, width in layout], dim=1)
    return [piece.contiguous().view(dtype) for piece, (dtype, _) in zip(pieces, layout, strict=True)]
