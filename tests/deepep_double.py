"""A double of DeepEP's `Buffer`, for one rank of a job of any size, on a CPU. It records our calls and checks them.

Signatures and configurations are those of a wheel (`deepep_wheel.json`, made by scripts/tools/deepep_wheel.py). The
rules are assertions of its sources: csrc/legacy/buffer.hpp, csrc/legacy/config.hpp, csrc/kernels/legacy/*.cu. The
double also plays the other ranks: it sends their tokens here, computes their experts, and checks what they get back.
"""

import inspect
import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels import ref
from parallel.mesh import Group

WHEEL = json.loads((Path(__file__).parent / "deepep_wheel.json").read_text())
SIGNATURES = {
    name: inspect.Signature(
        [
            inspect.Parameter(
                parameter[0], inspect.Parameter.POSITIONAL_OR_KEYWORD, default=(*parameter, inspect.Parameter.empty)[1]
            )
            for parameter in signature
        ]
    )
    for name, signature in WHEEL["signatures"].items()
}
PEERS, INT_MAX, SMS = 8, 2**31 - 1, 132
Tokens = tuple[Tensor, Tensor, Tensor]  # x [T, D], slots [T, K], weights [T, K]


def group_of(size: int, rank: int = 0) -> Group:
    """A group whose handle tells size and rank, as the library asks it."""
    handle: Any = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return Group(size, rank, handle)


def as_in_wheel(method: Callable) -> Callable:
    """Bind the arguments by the wheel's signature, record them with defaults filled in, and pass them as one object."""
    name = method.__name__
    signature, is_method = SIGNATURES[name], "self" in SIGNATURES[name].parameters

    @wraps(method)
    def call(*args: Any, **given: Any) -> Any:
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        arguments = SimpleNamespace(**bound.arguments)
        if not is_method:
            return method(arguments)
        library = arguments.__dict__.pop("self")
        if name != "__init__":
            library.calls.append((name, arguments))
        return method(library, arguments)

    return call


class Config:
    """Normal mode's configuration, with the size hints of csrc/legacy/config.hpp."""

    def __init__(self, num_sms: int, nvl_send: int, nvl_recv: int, rdma_send: int, rdma_recv: int) -> None:
        assert num_sms >= 0 and 0 < nvl_send < nvl_recv and rdma_send > 0
        self.num_sms, self.nvl_send, self.nvl_recv, self.rdma_send = num_sms, nvl_send, nvl_recv, rdma_send
        self.rdma_recv = -(-rdma_recv // rdma_send) * rdma_send
        assert rdma_send <= self.rdma_recv // 2

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks < PEERS or num_ranks % PEERS == 0
        assert num_ranks <= PEERS or self.num_sms % 2 == 0
        rdma_ranks, nvl_ranks = max(num_ranks // PEERS, 1), min(num_ranks, PEERS)
        rows = self.num_sms // 2 * nvl_ranks * self.nvl_recv
        total = self.num_sms // 2 * nvl_ranks * (2 * rdma_ranks + 3) * 4
        total += rows * hidden_bytes + rows * 8 + rows * 128 * 8 + rows * 128 * 4 + rows * 128 * 4
        return (total + 127) // 128 * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= PEERS:
            return 0
        assert num_ranks % PEERS == 0 and self.num_sms % 2 == 0
        channels, rdma_ranks = self.num_sms // 2, num_ranks // PEERS
        rows = channels * rdma_ranks * self.rdma_recv * 2
        total = channels * rdma_ranks * (PEERS * 2 + 2) * 2 * 4
        total += rows * hidden_bytes + rows * 8 + rows * 128 * 8 + rows * 128 * 4 + rows * 128 * 4 + rows * 16
        return (total + 127) // 128 * 128


def low_latency_layout(capacity: int, hidden: int, num_slots: int) -> int:
    scales = hidden // 128
    to_dispatch = 16 + max(2 * hidden, hidden + 4 * scales)
    to_combine = 4 * scales + 2 * hidden
    send = max(capacity * to_dispatch, num_slots * capacity * to_combine)
    receive = num_slots * capacity * max(to_dispatch, to_combine)
    return 2 * send + 2 * receive + 2 * ((num_slots * 4 + 127) // 128 * 128)


class Library:
    """The calls of deep_ep.Buffer that we make. `log` has what happened, in order; `calls` has every argument."""

    made: list["Library"] = []
    num_sms = 20
    row_dtype = torch.bfloat16  # float32 where a test compares sums that are not exact in bf16
    elsewhere: dict[int, Tokens] = {}  # the tokens of other ranks
    experts: Callable[[Tensor, Tensor], Tensor] | None = None  # (rows, slots) -> outputs; None: others return zeros

    @as_in_wheel
    def __init__(self, a: SimpleNamespace) -> None:
        assert a.group is not None or a.comm is not None
        self.rank, self.ranks = a.group.rank(), a.group.size()
        self.nvl, self.rdma = a.num_nvl_bytes, a.num_rdma_bytes
        self.given, self.log, self.calls, self.dirty = a, [], [], False
        self.qps, self.internode = a.num_qps_per_rank, self.ranks > PEERS
        self.queue_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        ranks, low_latency = self.ranks, a.low_latency_mode
        assert self.nvl % 128 == 0 and (self.nvl <= INT_MAX or self.rdma == 0)
        assert self.rdma % 128 == 0 and (low_latency or self.rdma <= INT_MAX)
        assert self.nvl // 16 < INT_MAX and self.rdma // 16 < INT_MAX
        assert 0 <= self.rank < ranks and (ranks <= PEERS * 20 or low_latency)
        assert ranks < PEERS or ranks % PEERS == 0
        assert self.rdma == 0 or ranks > PEERS or low_latency
        assert -(-self.nvl // (SMS // 2)) < INT_MAX and -(-self.rdma // (SMS // 2)) < INT_MAX
        assert not (low_latency or self.internode) or self.qps > 0
        Library.made.append(self)

    @staticmethod
    @as_in_wheel
    def set_num_sms(a: SimpleNamespace) -> None:
        assert a.new_num_sms % 2 == 0
        Library.num_sms = a.new_num_sms

    @staticmethod
    @as_in_wheel
    def get_dispatch_config(a: SimpleNamespace) -> Config:
        return Config(Library.num_sms, *WHEEL["dispatch_configs"][str(a.num_ranks)])

    @staticmethod
    @as_in_wheel
    def get_combine_config(a: SimpleNamespace) -> Config:
        return Config(Library.num_sms, *WHEEL["combine_configs"][str(a.num_ranks)])

    @staticmethod
    @as_in_wheel
    def get_low_latency_rdma_size_hint(a: SimpleNamespace) -> int:
        size = low_latency_layout(a.num_max_dispatch_tokens_per_rank, a.hidden, a.num_experts)
        return (size + 128) // 128 * 128

    @staticmethod
    @as_in_wheel
    def capture(_: SimpleNamespace) -> str:
        return "now"

    @as_in_wheel
    def get_dispatch_layout(self, a: SimpleNamespace) -> tuple:
        slots = a.topk_idx
        assert slots.dim() == 2 and slots.is_contiguous() and slots.dtype == torch.int64 and a.num_experts > 0
        assert a.previous_event == "now" and a.async_finish and a.allocate_on_comm_stream
        self.log.append("layout")
        local = a.num_experts // self.ranks
        in_rank = torch.zeros(len(slots), self.ranks + 1, dtype=torch.bool)
        in_rank = in_rank.scatter(1, torch.where(slots < 0, self.ranks, slots // local), True)[:, : self.ranks]
        in_rank = in_rank.contiguous()
        per_slot = torch.bincount(slots[slots >= 0], minlength=a.num_experts).int()
        nodes = in_rank.view(len(slots), -1, PEERS).any(2).sum(0).int() if self.internode else None
        return in_rank.sum(0).int(), nodes, per_slot, in_rank, "layout done"

    @as_in_wheel
    def dispatch(self, a: SimpleNamespace) -> tuple:
        x, scales = a.x if isinstance(a.x, tuple) else (a.x, None)
        self._check_config(a.config, x.shape[1] * 2)
        assert a.handle is None and a.num_worst_tokens == 0
        assert a.previous_event == "layout done" and a.async_finish and a.allocate_on_comm_stream
        assert (
            x.dim() == 2
            and x.is_contiguous()
            and x.dtype == (self.row_dtype if scales is None else torch.float8_e4m3fn)
        )
        assert scales is None or (scales.dtype == torch.float32 and scales.shape == (len(x), x.shape[1] // 128))
        for counts, size in ((a.num_tokens_per_rank, self.ranks), (a.num_tokens_per_expert, None)):
            assert counts.dtype == torch.int32 and counts.dim() == 1 and len(counts) == (size or len(counts))
        nodes = a.num_tokens_per_rdma_rank
        assert (nodes is not None and nodes.shape == (self.ranks // PEERS,)) if self.internode else nodes is None
        assert a.is_token_in_rank.dtype == torch.bool and a.is_token_in_rank.shape == (len(x), self.ranks)
        num_slots = len(a.num_tokens_per_expert)
        assert num_slots % self.ranks == 0 and num_slots // self.ranks <= 1024
        assert a.topk_idx.shape == a.topk_weights.shape and a.topk_weights.dtype == torch.float32
        if self.internode:
            machine, top_k = num_slots * PEERS // self.ranks, a.topk_idx.shape[1]
            assert machine <= 512 and top_k <= 32
            assert a.is_token_in_rank.view(len(x), -1, PEERS).any(2).sum(1).le(8).all(), "machines of a token"
        self.log.append("dispatch")
        self.dirty = True
        sources = self._all_tokens(a.x, a.topk_idx, a.topk_weights)
        rows, slots, weights = self._arriving(sources, num_slots)
        here = (slots >= 0).any(1)
        align = a.expert_alignment
        counts = torch.bincount(slots[slots >= 0], minlength=num_slots // self.ranks).tolist()
        kept = tuple(part[here] for part in rows) if isinstance(rows, tuple) else rows[here]
        handle = tuple([(here, sources, num_slots)] + [None] * (9 if self.internode else 5))
        return kept, slots[here], weights[here], [-(-n // align) * align for n in counts], handle, self._event()

    @as_in_wheel
    def combine(self, a: SimpleNamespace) -> tuple:
        self._check_config(a.config, a.x.shape[1] * 2)
        assert a.topk_weights is None and a.bias is None and len(a.handle) == (10 if self.internode else 6)
        assert a.previous_event == "now" and a.async_finish and a.allocate_on_comm_stream
        here, sources, num_slots = a.handle[0]
        assert a.x.dim() == 2 and a.x.is_contiguous() and a.x.dtype == self.row_dtype and len(a.x) == int(here.sum())
        self.log.append("combine")
        self.dirty = True
        sums = a.x.new_zeros(len(here), a.x.shape[1])
        sums[here] = a.x
        return self._returned(sums, sources, num_slots), None, self._event()

    @as_in_wheel
    def low_latency_dispatch(self, a: SimpleNamespace) -> tuple:
        self.log.append("low-latency dispatch")
        x, slots, capacity, num_slots = a.x, a.topk_idx, a.num_max_dispatch_tokens_per_rank, a.num_experts
        hidden, groups = x.shape[1], -(-num_slots // SMS)
        assert not self.dirty, "low latency expects zeros where normal mode has written"
        assert self.given.low_latency_mode and self.queue_depth >= (capacity + 1) * 2
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == self.row_dtype
        assert hidden in (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192), hidden
        assert slots.dim() == 2 and slots.is_contiguous() and slots.dtype == torch.int64
        assert len(x) == len(slots) and len(x) <= capacity and slots.shape[1] <= 11
        assert num_slots % self.ranks == 0 and (self.ranks * capacity) % 4 == 0
        assert groups * (32 // groups) >= 12 and 32 // groups > 1 and groups < 15
        assert self.qps >= num_slots // self.ranks, "a queue per slot of a rank"
        assert low_latency_layout(capacity, hidden, num_slots) <= self.rdma
        assert a.return_recv_hook and not a.async_finish and not a.round_scale and not a.use_ue8m0
        assert a.cumulative_local_expert_recv_stats is None and a.dispatch_wait_recv_cost_stats is None
        sources = [self._padded(tokens, capacity) for tokens in self._all_tokens(x, slots, torch.zeros(slots.shape))]
        rows, local, _ = self._arriving(sources, num_slots)
        rooms, counts, index = ref.ep_scatter_masked(rows, local, num_slots // self.ranks)
        if a.use_fp8:
            values, scale = ref.quantize_1x128(rooms)
            rooms = values, scale.transpose(1, 2).contiguous().transpose(1, 2)
        handle = (index, None, capacity, hidden, num_slots)
        return rooms, counts, handle, None, lambda: self.log.append("received")

    @as_in_wheel
    def low_latency_combine(self, a: SimpleNamespace) -> tuple:
        self.log.append("low-latency combine")
        index, _, capacity, hidden, num_slots = a.handle
        x, slots, weights = a.x, a.topk_idx, a.topk_weights
        assert x.shape == (num_slots // self.ranks, self.ranks * capacity, hidden)
        assert x.is_contiguous() and x.dtype == self.row_dtype
        assert slots.dtype == torch.int64 and slots.is_contiguous() and weights.is_contiguous()
        assert slots.shape == weights.shape and weights.dtype == torch.float32 and len(weights) <= capacity
        assert a.return_recv_hook and not a.async_finish and not a.use_logfmt and not a.zero_copy and a.out is None
        sent = next(given for name, given in reversed(self.calls) if name == "low_latency_dispatch")
        sources = [self._padded(tokens, capacity) for tokens in self._all_tokens(sent.x, slots, weights)]
        if sent.use_fp8:
            sources = [(ref.quantize_1x128(x), slots, weights) for x, slots, weights in sources]
        every = torch.cat([weights for _, _, weights in sources])
        out = self._returned(ref.ep_gather(x.flatten(0, 1), index, every), sources, num_slots)
        return out[: len(slots)], None, lambda: self.log.append("received")

    @as_in_wheel
    def clean_low_latency_buffer(self, a: SimpleNamespace) -> None:
        assert self.given.low_latency_mode
        assert low_latency_layout(a.num_max_dispatch_tokens_per_rank, a.hidden, a.num_experts) <= self.rdma
        self.log.append("clean")
        self.dirty = False

    @as_in_wheel
    def destroy(self, _: SimpleNamespace) -> None:
        assert self.given.explicitly_destroy
        self.log.append("destroy")

    def _check_config(self, config: Config, hidden_bytes: int) -> None:
        """The rules of the normal kernels; beyond one machine, those over RDMA."""
        assert config.num_sms % 2 == 0
        assert config.get_nvl_buffer_size_hint(hidden_bytes, self.ranks) <= self.nvl
        if not self.internode:
            assert self.ranks in (2, 4, 8)
            return
        nodes = self.ranks // PEERS
        assert nodes in (2, 3, 4, 6, 8, 12, 16, 18, 20)
        assert config.get_rdma_buffer_size_hint(hidden_bytes, self.ranks) <= min(self.rdma, INT_MAX)
        assert self.qps == config.num_sms // 2 or self.qps >= config.num_sms, "a queue per SM"
        assert hidden_bytes + 8 + 8 * 8 + 8 <= 16384, "a row in a warp's shared memory"
        warps = max(24 // nodes, 1)
        assert config.nvl_recv % nodes == 0 and config.nvl_recv // nodes > max(config.rdma_send, config.nvl_send)
        assert config.nvl_recv // nodes - warps >= config.nvl_send
        assert hidden_bytes // 16 % 32 == 0

    def _all_tokens(self, x: Tensor | tuple, slots: Tensor, weights: Tensor) -> list[tuple]:
        """The tokens of every rank, in rank order. Ranks that a test does not name have none."""
        first = x[0] if isinstance(x, tuple) else x
        nothing = (first.new_zeros(0, first.shape[1]), slots.new_zeros(0, slots.shape[1]), weights[:0])
        others = [self.elsewhere.get(rank, nothing) for rank in range(self.ranks)]
        return [(x, slots, weights) if rank == self.rank else given for rank, given in enumerate(others)]

    def _padded(self, tokens: Tokens, rows: int) -> Tokens:
        x, slots, weights = tokens
        room = rows - len(x)
        return (
            torch.cat((x, x.new_zeros(room, x.shape[1]))),
            torch.cat((slots, slots.new_full((room, slots.shape[1]), -1))),
            torch.cat((weights, weights.new_zeros(room, slots.shape[1]))),
        )

    def _arriving(self, sources: list[tuple], num_slots: int) -> tuple:
        """Everything that was sent, with local slot numbers; -1 = not here."""
        local = num_slots // self.ranks
        slots = torch.cat([slots for _, slots, _ in sources]) - self.rank * local
        slots = slots.masked_fill((slots < 0) | (slots >= local), -1)
        weights = torch.cat([weights for _, _, weights in sources]).masked_fill(slots < 0, 0)
        rows = [x for x, _, _ in sources]
        if isinstance(sources[self.rank][0], tuple):
            assert not self.elsewhere, "quantised rows come from this rank alone"
            return sources[self.rank][0], slots, weights
        return torch.cat(rows), slots, weights

    def _returned(self, sums: Tensor, sources: list[tuple], num_slots: int) -> Tensor:
        """This rank's tokens, summed over ranks. What the others get of this rank's experts must be right."""
        local, at, mine = num_slots // self.ranks, 0, None
        for rank, (x, slots, weights) in enumerate(sources):
            part = sums[at : at + len(slots)]
            at += len(slots)
            is_here = (slots >= 0) & (slots // local == self.rank)
            if rank != self.rank:
                torch.testing.assert_close(part, self._outputs(x, slots, weights, is_here).to(part.dtype))
            else:
                rest = self._outputs(x, slots, weights, (slots >= 0) & ~is_here)
                mine = (part.float() + rest).to(part.dtype)
        assert mine is not None
        return mine

    def _outputs(self, x: Tensor | tuple, slots: Tensor, weights: Tensor, wanted: Tensor) -> Tensor:
        rows = ref.dequantize_1x128(*x) if isinstance(x, tuple) else x.float()
        if self.experts is None or not len(rows):
            return torch.zeros_like(rows)
        copies = type(self).experts(rows[:, None], slots[..., None].float()) * weights[..., None]
        return copies.masked_fill(~wanted[..., None], 0).sum(1)

    def _event(self) -> SimpleNamespace:
        return SimpleNamespace(current_stream_wait=lambda: self.log.append("waited"))
