"""The calls of `parallel/dispatch.py` on DeepEP's kernels, for jobs that it can serve.

DeepEP (DeepSeek's expert-parallel library, its `Buffer`) has a mode for each layout:

    Contiguous   "normal": one kernel moves each token once to every rank that wants it, in as few SMs as it is told.
                 The host must learn how much arrives, so the second half of a dispatch blocks it.
    Masked       "low latency": fixed shapes, no host; a dispatch or combine is a send kernel and, when `receive` is
                 called, a receive kernel, and holds no SM in between. It casts to fp8 on the way.

Normal mode, for two micro-batches a and b (c = communication stream; the host blocks only where it says so):

    host   a.dispatch | b's experts enqueued | a.receive: blocks until the counts are there | b.combine | a's experts
    c      layout of a                         counts, rows of a (while the GPU computes b's experts)

`deep_ep` is imported when a `DeepEPBuffer` is made, so this module loads without it.
"""

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ops import Ops
from parallel.dispatch import Contiguous, Masked, Pending, Sliced, group_by_expert, once, sum_of_copies
from parallel.mesh import Group

RANKS = (2, 4, 8)  # one machine; beyond it the normal kernels go over RDMA, which was never tried here
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # the low-latency kernels are compiled for these
MAX_TOP_K = 11  # of the low-latency kernels
MAX_CAPACITY = 1024  # their count of tokens sent to one expert stops being unique above
MAX_LOCAL = 1024  # slots a rank, of the normal kernels
QUEUE_DEPTH = 1024  # NVSHMEM_QP_DEPTH, unless it is set
NUM_SMS = 20  # that the normal kernels hold: DeepEP's default


class DeepEPBuffer:
    """The memory that both modes communicate through: one for each process, made by all ranks together."""

    def __init__(self, group: Group, num_slots: int, hidden: int, capacity: int, num_sms: int = NUM_SMS):
        """`capacity`: the most tokens a rank dispatches at once in low latency (rounded up so that ranks * capacity is
        a multiple of 4); `num_sms`: how many SMs the normal kernels take, even. The same on all ranks."""
        import deep_ep

        if num_sms < 2 or num_sms % 2:
            raise ValueError(f"num_sms % 2 must be 0, not {num_sms} % 2 = {num_sms % 2}")
        ranks = group.size
        self.num_slots, self.num_local, self.hidden, self.num_sms = num_slots, num_slots // ranks, hidden, num_sms
        self.capacity = capacity + (-capacity) % max(1, 4 // ranks)
        deep_ep.Buffer.set_num_sms(num_sms)  # of the class: the two configurations below keep what it was
        self.dispatch_config = deep_ep.Buffer.get_dispatch_config(ranks)
        self.combine_config = deep_ep.Buffer.get_combine_config(ranks)
        configs = (self.dispatch_config, self.combine_config)
        normal = max(config.get_nvl_buffer_size_hint(2 * hidden, ranks) for config in configs)
        low_latency = deep_ep.Buffer.get_low_latency_rdma_size_hint(self.capacity, hidden, ranks, num_slots)
        self.num_bytes = normal + low_latency  # of GPU memory
        sends = 2 * (self.capacity + 1)  # in flight to a rank at most; the library wants them all to fit its queue
        if sends > int(os.environ.get("NVSHMEM_QP_DEPTH", QUEUE_DEPTH)):
            os.environ["NVSHMEM_QP_DEPTH"] = str(1 << (sends - 1).bit_length())
        self.library = deep_ep.Buffer(
            group.handle,
            normal,
            low_latency,
            low_latency_mode=True,
            num_qps_per_rank=self.num_local,
            explicitly_destroy=True,
        )
        self.in_flight = InFlight()
        self.dirty = False

    def prepare_low_latency(self) -> None:
        """Clean what a normal step may have left where low latency expects zeros. All ranks must call it together.

        A low-latency dispatch does so itself. Call it before a CUDA graph with one in it is captured or replayed, for
        a replay runs none of this.
        """
        if self.dirty:
            self.library.clean_low_latency_buffer(self.capacity, self.hidden, self.num_slots)
            self.dirty = False

    def close(self) -> None:
        """Free the memory: all ranks together, after every CUDA graph with DeepEP in it was reset and before the
        process group goes."""
        self.library.destroy()


class InFlight:
    """Which low-latency operation was started and not yet received: at most one.

    There are two regions, used in turn, and each operation zeroes the other's flags. A second one that starts before
    the first was received wipes what has arrived for it, and all ranks would wait for that until a time-out.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.count = 0

    def start(self, what: str) -> Callable[[], None]:
        """`what` is "dispatch" or "combine". Returns what to call when it has been received."""
        name = f"{what} {self.count}"
        assert self.name is None, f"low-latency {name} started while {self.name} was not waited for"
        self.name = name
        self.count += 1

        def received() -> None:
            assert self.name == name, f"low-latency {name} was waited for twice"
            self.name = None

        return received


class ContiguousDeepEP:
    """ContiguousAllToAll's contract in normal mode, for bf16 or quantised rows."""

    casts = False

    def __init__(self, buffer: DeepEPBuffer, ops: Ops, most_copies: int | None = None):
        """most_copies: that are grouped at once (None: all); see `dispatch.most_copies`."""
        self.buffer, self.ops, self.num_sms, self.most_copies = buffer, ops, buffer.num_sms, most_copies

    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], slots: Tensor, weights: Tensor
    ) -> Pending[Contiguous | Sliced]:
        """x [T, D] bf16, or the pair (e4m3 [T, D], float32 scales [T, D / 128]), which travels and arrives as it is;
        slots [T, K] int64 physical ids, -1 = nowhere; weights [T, K] float32.

        The rows leave when `receive` is called, which blocks the host until all ranks have come so far: enqueue what
        else there is to compute before. They are read until then, and must not change.
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
                config=buffer.dispatch_config,
                previous_event=ready,
                async_finish=True,
                allocate_on_comm_stream=True,
            )
            done.current_stream_wait()
            rows, scales = (rows, None) if isinstance(rows, Tensor) else rows
            return once(
                group_by_expert, self.ops, rows, scales, experts, row_weights, buffer.num_local, self.most_copies,
                (handle,), counts,
            )  # fmt: skip

        return Pending(receive)

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """y [M, D] bf16, the experts' outputs on the rows that arrived, and their way back -> [T, D] on the source
        ranks, in dispatch's order, and `plus` [T, D] added there.
        The sum over a rank's experts is rounded to bf16 before it travels."""
        library = self.buffer.library
        summed, handle = sum_of_copies(self.ops, y, *way_back)
        out, _, done = library.combine(
            summed,
            handle,
            config=self.buffer.combine_config,
            previous_event=library.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )

        def receive() -> Callable[[], Tensor]:
            done.current_stream_wait()
            return once(_added, out, plus)

        return Pending(receive)


class MaskedDeepEP:
    """MaskedAllToAll's contract in low-latency mode. In a CUDA graph there must be a combine for each dispatch, so
    that a replay begins where the capture did: with the first of the two regions that operations use in turn."""

    casts, num_sms = True, 0

    def __init__(self, buffer: DeepEPBuffer, fp8: bool = False):
        """fp8: the kernel casts the rows it sends; they arrive as e4m3 with their scales."""
        self.buffer, self.fp8 = buffer, fp8

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Masked]:
        """x [T, D] bf16, with fp8 too; slots [T, K] int64, -1 = nowhere; weights [T, K] float32; T <= capacity.

        AssertionError if another low-latency dispatch or combine was started and not waited for.
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

        # Scales [L, R * capacity, D / 128] stand column by column (their middle stride is 1), as DeepGEMM reads them; a
        # kernel that wants rows makes its own copy.
        values, scale = rows if self.fp8 else (rows, None)
        return Pending(_received(received, receive, once(Masked, values, counts, (handle, slots, weights), scale)))

    def combine(self, y: Tensor, way_back: tuple, plus: Tensor | None = None) -> Pending[Tensor]:
        """y [L, R * capacity, D] bf16 -> [T, D], weighted and summed in float32 on the source rank, and `plus` [T, D]
        added. AssertionError as in dispatch."""
        handle, slots, weights = way_back
        received = self.buffer.in_flight.start("combine")
        out, _, receive = self.buffer.library.low_latency_combine(y, slots, weights, handle, return_recv_hook=True)

        return Pending(_received(received, receive, once(_added, out, plus)))


def _added(out: Tensor, plus: Tensor | None) -> Tensor:
    return out if plus is None else out + plus


def _received(received: Callable[[], None], receive: Callable[[], None], result: Callable) -> Callable[[], Callable]:
    """A `Pending`'s: notes that nothing is in flight any more, and enqueues the kernel that waits for what is."""

    def both() -> Callable:
        received()
        receive()
        return result

    return both


def obstacle(
    ranks: int, num_slots: int, hidden: int, top_k: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why DeepEP cannot serve a job of so many ranks; None if it can. `num_slots`: P, over all ranks; `capacity`: the
    most tokens a rank dispatches in a decode step. The limits are those of its 2.0 wheels for Hopper."""
    if device.type != "cuda":
        return "no GPU"
    if ranks not in RANKS:
        return f"ranks must be one of {_listed(RANKS)}, not {ranks}"
    if num_slots % ranks:
        return f"physical experts % ranks must be 0, not {num_slots} % {ranks} = {num_slots % ranks}"
    if num_slots // ranks > MAX_LOCAL:
        return f"physical experts / ranks must be at most {MAX_LOCAL}, not {num_slots} / {ranks} = {num_slots // ranks}"
    if hidden not in HIDDEN:
        return f"hidden size must be one of {_listed(HIDDEN)}, not {hidden}"
    if top_k > MAX_TOP_K:
        return f"experts a token must be at most {MAX_TOP_K}, not {top_k}"
    if capacity > MAX_CAPACITY:
        return f"tokens a rank dispatches in a decode step must be at most {MAX_CAPACITY}, not {capacity}"
    if dtype != torch.bfloat16:
        return f"needs bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "needs Hopper"
    try:
        importlib.import_module("deep_ep")
    except Exception as error:  # it may fail in its own way: another torch, another NCCL, no compiler
        return f"deep_ep does not import ({type(error).__name__}: {error})"
    return None


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
