"""Bytes over torch.distributed: a two-member process group of its own for each link, NCCL or gloo.

Built directly over a shared store, without init_process_group: the two sides belong to different jobs, each with its
own world, and a link must be able to die alone. Two-sided: both ends must call with tensors of the same shape. Several
tensors may be on their way at once, in one order on both ends.
"""

import datetime
import time

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=60)  # for the two sides to meet; with gloo, for one tensor to pass


class TorchTransfer:
    """A tensor on its way since `began` (of time.perf_counter), which is kept until it is through."""

    def __init__(self, x: Tensor, work: dist.Work, began: float, stream: torch.cuda.Stream | None):
        self.x, self.began, self._work, self._stream = x, began, work, stream

    def wait(self) -> None:
        """From one thread. After an abort it returns too, or raises; with gloo, when its time is over."""
        if self._stream is None:
            self._work.wait()
        else:
            with torch.cuda.stream(self._stream):
                self._work.wait()  # of NCCL it only has this stream wait
                through = self._stream.record_event()
            through.synchronize()


class TorchTransport:
    def __init__(self, store: dist.Store, me: int, device: torch.device):
        """`me` is 0 or 1. With gloo this blocks until the other side has come. Any of this may raise RuntimeError."""
        self.me, self.peer, self.device, self._aborted = me, 1 - me, device, False
        if device.type == "cuda":
            # Before the steps' kernels: an end that waits for room on its GPU keeps the other's SMs waiting, too.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            self.group = dist.ProcessGroupNCCL(store, me, 2, options)
            # It waits for the peer, which no other stream must: torch deals 32 of each priority in turn, and of this
            # one nobody else takes any (NCCL's own are of the highest, -3).
            self._stream = torch.cuda.Stream(device, priority=-2)
        else:
            self.group = dist.ProcessGroupGloo(store, me, 2, TIMEOUT)
            self._stream = None

    def greet(self) -> None:
        """Both ends, once, and member 0 only when the other is there. NCCL connects in its first transfer, which takes
        a second and blocks the call: by torch's source member 1's for the store's timeout at most, and member 0's until
        the other is in its own, which no abort ends before. Gloo has connected already."""
        if self._stream is not None:
            first = torch.zeros(1, device=self.device)
            (self.recv if self.me else self.send)(first).wait()

    def send(self, x: Tensor) -> TorchTransfer:
        """Starts to send `x`, once the current stream has made it; it may be overwritten when it is through."""
        began = time.perf_counter()
        return TorchTransfer(x, self.group.send([x], self.peer, 0), began, self._stream)

    def recv(self, x: Tensor) -> TorchTransfer:
        """Starts to fill `x`, in the order of the peer's sends. Call only when the peer has announced the send: a NCCL
        receive that nobody matches occupies the GPU, and one whose peer has died never ends by itself (see `abort`)."""
        began = time.perf_counter()
        return TorchTransfer(x, self.group.recv([x], self.peer, 0), began, self._stream)

    def abort(self) -> None:
        """From any thread, more than once, but not at once: end what is in flight, with NCCL. The CUDA context
        survives."""
        if not self._aborted:
            self._aborted = True
            self.group.abort()
