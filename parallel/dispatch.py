"""Tokens to experts and back over one all-to-all each way. The same calls are served by NCCL and by gloo.

A token travels once to each rank that holds any of its experts, with the ids and weights of the experts it wants
there; that rank spreads it over its experts' rows, and sums the weighted results before they travel back:

    source rank                       expert rank                          source rank
    x [T, D], slots [T, K]  -- row -> scatter to experts, GEMMs, gather -- row -> sum over ranks [T, D]

A row on the wire is bytes (gloo knows no fp8):  hidden | K local expert ids (int32) | K weights (float32).

Two layouts, as in DeepEP: `Contiguous` ("normal": as many rows as were routed, sizes known on the host) for prefill,
`Masked` ("low latency": fixed shapes, counts only on the device, safe in a CUDA graph) for decode.
Both calls are split into start and `Pending.wait`, so that other work can run in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kernels.backend import Ops
from parallel.mesh import Group

Result = TypeVar("Result")


@dataclass(frozen=True)
class Contiguous:
    """Rows grouped by local expert, each group padded to the GEMM's alignment."""

    x: Tensor  # [M, D]; padding rows are undefined
    row_expert: Tensor  # [M] int32, -1 = padding
    way_back: tuple  # what combine needs
    scale: Tensor | None = None  # [M, D / 128] float32, if x is fp8


@dataclass(frozen=True)
class Masked:
    """A fixed room for each local expert, filled from the front."""

    x: Tensor  # [L, rows, D]; rows past the count are undefined
    counts: Tensor  # [L] int32, on the device
    way_back: tuple
    scale: Tensor | None = None  # [L, rows, D / 128] float32, if x is fp8


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """Started communication. `wait()` gives the result and must be called exactly once."""

    wait: Callable[[], Result]


class ContiguousAllToAll:
    """Variable splits. The row counts go ahead, so dispatch blocks the host until every rank has routed."""

    def __init__(self, group: Group, num_slots: int, ops: Ops):
        self.group, self.ops = group, ops
        self.num_local = num_slots // group.size

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Contiguous]:
        """x [T, D]; slots [T, K] physical ids, -1 = nowhere, none twice in a row; weights [T, K] float32."""
        rank_of = slots.div(self.num_local, rounding_mode="floor")  # [T, K]; -1 stays -1
        to_rank = _one_hot(rank_of, self.group.size)  # [T, R] bool
        rank, token = to_rank.T.nonzero(as_tuple=True)  # ordered by rank, then token
        send = to_rank.sum(0)
        recv = self.group.all_to_all(send).wait()
        send, recv = torch.stack((send, recv)).tolist()  # the host needs both: one copy

        local = (slots[token] - rank[:, None] * self.num_local).where(rank_of[token] == rank[:, None], -1)
        transfer = self.group.all_to_all(_pack(x[token], local, weights[token]), send, recv)
        row = to_rank.T.flatten().cumsum(0).view(self.group.size, -1).T - 1  # [T, R] where (t, r) went on the wire
        returned = _distinct_rows(rank_of, row)

        def wait() -> Contiguous:
            rows, experts, row_weights = _unpack(transfer.wait(), x.dtype, x.shape[1], slots.shape[1])
            grouped, row_expert, index = self.ops.ep_scatter(rows, experts, self.num_local, self.ops.alignment)
            return Contiguous(grouped, row_expert, (index, row_weights, returned, send, recv))

        return Pending(wait)

    def combine(self, y: Tensor, arrived: Contiguous) -> Pending[Tensor]:
        """y [M, D], the experts' outputs on `arrived.x`'s rows -> [T, D] on the source ranks, in dispatch's order."""
        index, row_weights, returned, send, recv = arrived.way_back
        transfer = self.group.all_to_all(self.ops.ep_gather(y, index, row_weights), recv, send)
        return Pending(lambda: self.ops.ep_gather(transfer.wait(), returned))


class MaskedAllToAll:
    """Equal splits of `capacity` rows for each pair of ranks, whatever was routed; nothing waits for the host."""

    def __init__(self, group: Group, num_slots: int, ops: Ops, capacity: int):
        """`capacity`: the most tokens a rank dispatches at once. All ranks must pass the same."""
        self.group, self.ops, self.capacity = group, ops, capacity
        self.num_local = num_slots // group.size

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Masked]:
        """As ContiguousAllToAll.dispatch, for T <= capacity."""
        (num_tokens, top_k), ranks = slots.shape, self.group.size
        assert num_tokens <= self.capacity, f"{num_tokens=} over {self.capacity=}"
        rank_of = slots.div(self.num_local, rounding_mode="floor")
        to_rank = _one_hot(rank_of, ranks)
        place = to_rank.cumsum(0) - 1 + torch.arange(ranks, device=x.device) * self.capacity  # [T, R] row on the wire
        sentinel = ranks * self.capacity
        source = torch.full((sentinel + 1,), num_tokens, dtype=torch.int64, device=x.device)
        token = torch.arange(num_tokens, device=x.device)[:, None].expand_as(place)
        source.scatter_(0, place.where(to_rank, sentinel).flatten(), token.flatten())
        source = source[:-1]  # [R * capacity] the token in each row on the wire; num_tokens = none

        # One more token, that wants no expert, fills the rows that nobody routed.
        x = torch.cat((x, x.new_zeros(1, x.shape[1])))
        slots = torch.cat((slots, slots.new_full((1, top_k), -1)))
        weights = torch.cat((weights, weights.new_zeros(1, top_k)))
        first_slot = torch.arange(ranks, device=x.device).repeat_interleave(self.capacity)[:, None] * self.num_local
        local = slots[source] - first_slot
        local = local.where((local >= 0) & (local < self.num_local), -1)
        transfer = self.group.all_to_all(_pack(x[source], local, weights[source]))
        returned = _distinct_rows(rank_of, place)

        def wait() -> Masked:
            rows, experts, row_weights = _unpack(transfer.wait(), x.dtype, x.shape[1], top_k)
            grouped, counts, index = self.ops.ep_scatter_masked(rows, experts, self.num_local)
            return Masked(grouped, counts, (index, row_weights, returned))

        return Pending(wait)

    def combine(self, y: Tensor, arrived: Masked) -> Pending[Tensor]:
        """y [L, rows, D] -> [T, D], as ContiguousAllToAll.combine."""
        index, row_weights, returned = arrived.way_back
        transfer = self.group.all_to_all(self.ops.ep_gather(y.flatten(0, 1), index, row_weights))
        return Pending(lambda: self.ops.ep_gather(transfer.wait(), returned))


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


def _pack(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    parts = (x, experts.to(torch.int32), weights)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def _unpack(wire: Tensor, dtype: torch.dtype, hidden: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    x, experts, weights = wire.split((hidden * dtype.itemsize, 4 * top_k, 4 * top_k), dim=1)
    return (
        x.contiguous().view(dtype),
        experts.contiguous().view(torch.int32).long(),
        weights.contiguous().view(torch.float32),
    )
