"""Bytes over torch.distributed: a two-member process group of its own for each link, NCCL or gloo.

Built directly over a shared store, without init_process_group: the two sides belong to different jobs, each with its
own world, and a link must be able to die alone. Two-sided: both ends must call with tensors of the same shape.
"""

import datetime

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=60)  # for the two sides to meet, and for one tensor to pass


class TorchTransport:
    def __init__(self, store: dist.Store, me: int, device: torch.device):
        """`me` is 0 or 1; blocks until the other side has come. Any of this may raise RuntimeError."""
        self.peer, self.device = 1 - me, device
        if device.type == "cuda":
            self.group = dist.ProcessGroupNCCL(store, me, 2, dist.ProcessGroupNCCL.Options())
        else:
            self.group = dist.ProcessGroupGloo(store, me, 2, TIMEOUT)

    def send(self, x: Tensor) -> None:
        """Returns when `x` may be overwritten."""
        self._finish(self.group.send([x], self.peer, 0))

    def recv(self, x: Tensor) -> None:
        """Fills `x`; returns when it is all there. Call only when the peer has announced the send: a NCCL receive
        that nobody matches occupies the GPU, and one whose peer has died never ends by itself (see `abort`)."""
        self._finish(self.group.recv([x], self.peer, 0))

    def _finish(self, work: dist.Work) -> None:
        work.wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # NCCL's wait() only orders streams

    def abort(self) -> None:
        """From any thread: end what is in flight. The CUDA context survives."""
        self.group.abort()
