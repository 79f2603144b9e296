"""A transport over torch.distributed: one two-member process group per link, NCCL or gloo.

The group is built directly over a shared store, without init_process_group. The two sides belong to different jobs,
each with its own world, and a link must be able to fail alone. It is two-sided: both ends must call with tensors of
the same shape. Several tensors may be in flight, in the same order at both ends.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - as in disagg/handoff/connect.py

from disagg.handoff.transport import TIMEOUT
from parallel.interface import resolve

# How many SMs a link's copies take from the steps beside them. Between GPUs of one host NCCL alone would take more, and
# slow a step down far more (docs/results.md). The environment's NCCL_MAX_CTAS comes first.
LINK_SMS = 4


class TorchTransfer:
    """A tensor in flight since `began` (time.perf_counter()), kept alive until the transfer has completed."""

    def __init__(self, x: Tensor, work: dist.Work, began: float, stream: torch.cuda.Stream | None) -> None:
        self.x, self.nbytes, self.began, self._work, self._stream = x, x.nbytes, began, work, stream

    def wait(self) -> None:
        """Wait for completion, in one thread. After an abort it returns or raises; with gloo, after the time-out."""
        if self._stream is None:
            self._work.wait()
        else:
            with torch.cuda.stream(self._stream):
                self._work.wait()  # with NCCL, this only makes the stream wait
                completed = self._stream.record_event()
            completed.synchronize()


class TorchTransport:
    one_sided = in_place = False

    def __init__(self, store: Store, me: int, device: torch.device, host: str) -> None:
        """`me` is 0 or 1. `host`: where gloo listens, this machine's address as the peer reaches it.

        With gloo this blocks until the peer has connected. Raises RuntimeError if that fails.
        """
        self.me, self.peer, self.device, self._aborted = me, 1 - me, device, False
        if device.type == "cuda":
            # Before the steps' kernels: while one end waits for room on its GPU, the other end's SMs wait, too.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options.config.max_ctas = LINK_SMS
            self.group = dist.ProcessGroupNCCL(store, me, 2, options)
            # This stream waits for the peer, so no other work may share it. torch hands out 32 streams per priority in
            # turn, and nothing else here asks for this priority. (NCCL's own streams have the highest, -3.)
            self._stream = torch.cuda.Stream(device, priority=-2)
        else:
            options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue] - not in torch's stubs
            options._timeout = TIMEOUT
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=resolve(host))]
            self.group = dist.ProcessGroupGloo(store, me, 2, options)
            self._stream = None

    def greet(self) -> None:
        """Connect. Both ends call it once, member 0 only when member 1 is at the pipe.

        NCCL connects in its first transfer, which takes a second and blocks the call. According to torch's source,
        member 1 blocks at most for the store's timeout. Member 0 blocks until member 1 is in its own call, and no abort
        ends that. Gloo has connected already.
        """
        if self._stream is not None:
            first = torch.zeros(1, device=self.device)
            (self.recv(first, b"") if self.me else self.send(first)[0]).wait()

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    # torch's stubs declare `send` and `recv` for ProcessGroup only; the backends' own bindings have them too.

    def send(self, x: Tensor, pages: list[int] | None = None) -> tuple[TorchTransfer, bytes]:
        """Start to send `x`, after the work queued on the current stream. Overwrite `x` only after its completion."""
        assert pages is None, "only whole tensors"
        began = time.perf_counter()
        work = self.group.send([x], self.peer, 0)  # pyright: ignore[reportAttributeAccessIssue]
        return TorchTransfer(x, work, began, self._stream), b""

    def recv(self, x: Tensor, location: bytes, pages: list[int] | None = None) -> TorchTransfer:
        """Start to fill `x`. Receives match the peer's sends in order. Call it only for an announced send.

        An unmatched NCCL receive occupies the GPU. One whose peer has died never ends by itself (see `abort`).
        """
        assert pages is None, "only whole tensors"
        began = time.perf_counter()
        work = self.group.recv([x], self.peer, 0)  # pyright: ignore[reportAttributeAccessIssue]
        return TorchTransfer(x, work, began, self._stream)

    def was_read(self) -> None:
        raise ValueError("the other end says that it has read, and it receives")

    def abort(self) -> None:
        """End the transfers in flight, with NCCL. Any thread may call it, repeatedly, but not two at a time.

        The CUDA context survives.
        """
        if not self._aborted:
            self._aborted = True
            self.group.abort()


class TorchEndpoint:
    def __init__(self, device: torch.device, host: str) -> None:
        """`host`: this rank's address, where gloo listens."""
        self.device, self.host = device, host
        self.about = f"torch.distributed over {'NCCL' if device.type == 'cuda' else 'gloo'}"

    def connect(self, store: Store, me: int) -> TorchTransport:
        return TorchTransport(store, me, self.device, self.host)
