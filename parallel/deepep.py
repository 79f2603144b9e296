"""The calls of `parallel/dispatch.py` on DeepEP's kernels, for jobs that DeepEP can serve.

DeepEP (DeepSeek's expert-parallel library, its `Buffer`) has one mode per layout:

    Contiguous   "normal": one kernel moves each token once to every rank that wants it, on a given number of SMs.
                 The host must learn how many rows arrive, so the second half of a dispatch blocks it.
    Masked       "low latency": fixed shapes, no host. A dispatch or combine is a send kernel and, when `receive` is
                 called, a receive kernel. It holds no SM in between. It can cast to fp8 as it sends.

Normal mode, for two micro-batches a and b (c = communication stream; the host blocks only where it says so):

    host   a.dispatch | b's experts enqueued | a.receive: blocks until the counts are there | b.combine | a's experts
    c      layout of a                         counts, rows of a (while the GPU computes b's experts)

Over several machines the same calls are served, over RDMA between machines and NVLink within them. That was never run.
This module loads without `deep_ep`, which is imported only when a `DeepEPBuffer` is made.
"""

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.addends import Addends
from kernels.fp8 import Quantized
from kernels.ops import Ops
from parallel import rdma
from parallel.deepep_sizes import NUM_SMS, PER_NODE, Sizes, misfits, padded
from parallel.dispatch import Contiguous, Masked, Pending, Sliced, group_by_expert, once, sum_of_copies
from parallel.mesh import Group

QUEUE_DEPTH = 1024  # NVSHMEM_QP_DEPTH, unless it is set


class DeepEPBuffer:
    """The memory that both modes communicate through, one per process. Creating it is collective."""

    def __init__(
        self,
        group: Group,
        num_slots: int,
        hidden: int,
        capacity: int,
        num_sms: int = NUM_SMS,
        normal: bool = True,
    ) -> None:
        """Allocate the memory. Collective; all ranks must pass the same arguments.

        `capacity`: the most tokens that a rank dispatches at once in low latency, rounded up so that ranks * capacity
        is a multiple of 4. `num_sms`: SMs for the normal kernels, an even number. `normal`: whether normal mode will be
        used, too.
        """
        import deep_ep  # pyright: ignore[reportMissingImports] (optional, and it has no stubs)

        if num_sms < 2 or num_sms % 2:
            raise ValueError(f"num_sms % 2 must be 0, not {num_sms} % 2 = {num_sms % 2}")
        ranks = group.size
        self.num_slots, self.num_local = num_slots, num_slots // ranks
        self.hidden = hidden
        self.num_sms = num_sms
        self.capacity = padded(capacity, ranks)
        self.configs = None  # of normal mode: dispatch's and combine's
        nvlink, queues = 0, self.num_local  # low latency has a queue over RDMA per slot
        shared = deep_ep.Buffer.get_low_latency_rdma_size_hint(self.capacity, hidden, ranks, num_slots)
        if normal:
            deep_ep.Buffer.set_num_sms(num_sms)  # sets it for the class; the two configurations below copy it
            self.configs = deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)
            nvlink = max(config.get_nvl_buffer_size_hint(2 * hidden, ranks) for config in self.configs)
            if ranks > PER_NODE:  # normal mode uses the memory of low latency, and a queue per SM
                rdma_hints = [config.get_rdma_buffer_size_hint(2 * hidden, ranks) for config in self.configs]
                shared, queues = max(shared, *rdma_hints), max(queues, num_sms)
        self.num_bytes = nvlink + shared  # of GPU memory
        sends = 2 * (self.capacity + 1)  # in flight to one rank, at most; the library wants all of them in its queue
        if sends > int(os.environ.get("NVSHMEM_QP_DEPTH", QUEUE_DEPTH)):
            os.environ["NVSHMEM_QP_DEPTH"] = str(1 << (sends - 1).bit_length())
        self.library = deep_ep.Buffer(
            group.handle,
            nvlink,
            shared,
            low_latency_mode=True,
            num_qps_per_rank=queues,
            explicitly_destroy=True,
        )
        self.in_flight = InFlight()
        self.dirty = False  # a normal step has used the memory since it was last cleaned

    def prepare_low_latency(self) -> None:
        """Zero the memory that low latency expects to be zero, if a normal step has used it. Collective.

        A low-latency dispatch does so itself. But a replay of a CUDA graph does not, so call this before a graph with a
        dispatch in it is captured or replayed.
        """
        if self.dirty:
            self.library.clean_low_latency_buffer(self.capacity, self.hidden, self.num_slots)
            self.dirty = False

    def close(self) -> None:
        """Free the memory. Collective.

        Call it after every CUDA graph with DeepEP in it was reset, and before the process group is destroyed.
        """
        self.library.destroy()


class InFlight:
    """The low-latency operation that was started and not yet received. There may be only one.

    DeepEP has two regions, used in turn, and each operation zeroes the other region's flags. A second operation that
    starts before the first was received wipes the first one's flags. All ranks would then wait until a time-out.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.count = 0

    def start(self, what: str) -> Callable[[], None]:
        """Note that `what` ("dispatch" or "combine") starts. Returns a function to call when it is received."""
        name = f"{what} {self.count}"
        assert self.name is None, f"low-latency {name} started while {self.name} was not waited for"
        self.name = name
        self.count += 1

        def received() -> None:
            assert self.name == name, f"low-latency {name} was waited for twice"
            self.name = None

        return received


class ContiguousDeepEP:
    """Serve ContiguousAllToAll's contract in normal mode, for bf16 or quantised rows."""

    casts = False

    def __init__(self, buffer: DeepEPBuffer, ops: Ops, most_copies: int | None = None) -> None:
        """`most_copies`: how many copies are grouped at once (None: all); see `dispatch.most_copies`."""
        assert buffer.configs is not None, "the buffer was made without normal mode"
        self.dispatch_config, self.combine_config = buffer.configs
        self.buffer, self.ops, self.num_sms, self.most_copies = buffer, ops, buffer.num_sms, most_copies

    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], slots: Tensor, weights: Tensor
    ) -> Pending[Contiguous | Sliced]:
        """Start sending tokens to their experts' ranks. Collective.

        x [T, D] bf16, or the pair (e4m3 [T, D], float32 scales [T, D / 128]), which arrives unchanged. slots [T, K]
        int64 physical ids, -1 = nowhere; weights [T, K] float32.

        The rows leave only when `receive` is called. It blocks the host until all ranks have got there, so enqueue
        other work first. Until then x must not change.
        """
        buffer, library = self.buffer, self.buffer.library
        buffer.dirty = True
        slots, weights = slots.contiguous(), weights.contiguous()
        # `capture` marks what the communication stream must wait for: the inputs, and nothing enqueued after them.
        per_rank, per_rdma_rank, per_slot, in_rank, ready = library.get_dispatch_layout(
            slots, buffer.num_slots, previous_event=library.capture(), async_finish=True, allocate_on_comm_stream=True
        )

        def receive() -> Callable[[], Contiguous | Sliced]:
            rows, experts, row_weights, counts, handle, done = library.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_slot,
                topk_idx=slots,
                topk_weights=weights,
                expert_alignment=self.ops.alignment,
                config=self.dispatch_config,
                previous_event=ready,
                async_finish=True,
                allocate_on_comm_stream=True,
            )
            done.current_stream_wait()
            rows, scales = (rows, None) if isinstance(rows, Tensor) else rows
            return once(
                group_by_expert,
                self.ops,
                rows,
                scales,
                experts,
                row_weights,
                buffer.num_local,
                self.most_copies,
                (handle,),
                counts,
            )

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Addends]:
        """Start returning the experts' outputs y [M, D] bf16, one per received row. Collective.

        The result is [T, D] on the source ranks, in dispatch's order, beside `plus` [T, D], which the next norm adds.
        The sum over a rank's experts is rounded to bf16 before it travels.

        Hazard: the result lies in memory of the communication stream, and the norm may read it after another half's
        dispatch has begun. The memory must be kept until then: DeepEP's published source records that stream, too.
        """
        library = self.buffer.library
        summed, handle = sum_of_copies(self.ops, y, *way_back)
        out, _, done = library.combine(
            summed,
            handle,
            config=self.combine_config,
            previous_event=library.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )

        def receive() -> Callable[[], Addends]:
            done.current_stream_wait()
            return once(Addends, out, None, None, plus)

        return Pending(receive)


class MaskedDeepEP:
    """Serve MaskedAllToAll's contract in low-latency mode.

    A CUDA graph must have one combine per dispatch. Operations use two regions in turn, and a replay must begin with
    the region that the capture began with.
    """

    casts, num_sms = True, 0

    def __init__(self, buffer: DeepEPBuffer, fp8: bool = False) -> None:
        """`fp8`: the kernel casts the rows that it sends. They arrive as e4m3 with their scales."""
        self.buffer, self.fp8 = buffer, fp8

    def dispatch(self, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending[Masked]:
        """Start sending tokens to their experts' ranks. Collective.

        x [T, D] bf16, even if `fp8`; slots [T, K] int64, -1 = nowhere; weights [T, K] float32; T <= capacity. Raises
        AssertionError if another low-latency dispatch or combine is in flight.
        """
        buffer = self.buffer
        assert isinstance(x, Tensor), "low latency casts to fp8 itself: it takes bf16"
        assert x.shape[0] <= buffer.capacity, f"num_tokens={x.shape[0]} over self.capacity={buffer.capacity}"
        received = buffer.in_flight.start("dispatch")
        buffer.prepare_low_latency()
        slots, weights = slots.contiguous(), weights.contiguous()
        rows, counts, handle, _, receive = buffer.library.low_latency_dispatch(
            x, slots, buffer.capacity, buffer.num_slots, use_fp8=self.fp8, return_recv_hook=True
        )

        # Scales [L, R * capacity, D / 128] are stored column by column (their middle stride is 1), as DeepGEMM reads
        # them. A kernel that wants rows makes its own copy.
        values, scale = rows if self.fp8 else (rows, None)
        return Pending(_received(received, receive, once(Masked, values, counts, (handle, slots, weights), scale)))

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Addends]:
        """Start returning the experts' outputs y [L, R * capacity, D] bf16. Collective.

        The result is [T, D], weighted and summed in float32 on the source rank, beside `plus` [T, D], which the next
        norm adds. Raises AssertionError as dispatch does.
        """
        handle, slots, weights = way_back
        received = self.buffer.in_flight.start("combine")
        out, _, receive = self.buffer.library.low_latency_combine(y, slots, weights, handle, return_recv_hook=True)

        return Pending(_received(received, receive, once(Addends, out, None, None, plus)))


def _received(received: Callable[[], None], receive: Callable[[], None], result: Callable) -> Callable[[], Callable]:
    """Return a `Pending`'s `receive`: it ends the operation in flight and enqueues its receive kernel."""

    def both() -> Callable:
        received()
        receive()
        return result

    return both


def obstacles(sizes: Sizes, device: torch.device, decodes: bool = True) -> list[str]:
    """Return the rules by which DeepEP cannot serve a job on this rank, a line each. Empty: it can.

    `decodes`: False for a job that only prefills; see `misfits`.
    """
    if device.type != "cuda":
        return ["no GPU"]
    found = misfits(sizes, decodes)
    if torch.cuda.get_device_capability(device) != (9, 0):
        return [*found, "needs Hopper"]
    try:
        importlib.import_module("deep_ep")
    except Exception as error:  # it may fail in its own way: another torch, another NCCL, no NVSHMEM, no compiler
        found.append(f"deep_ep does not import ({type(error).__name__}: {error})")
    return found + (rdma.obstacles() if sizes.crosses else [])
