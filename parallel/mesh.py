"""Mesh: which ranks do what together. The only reader of torchrun's environment.

Two groups explain the parallelism. Draw a job's ranks as a reshaped arange, one row a replica of the attention:

    torchrun --nproc-per-node 8, --attn-tp 2:

        arange(8).reshape(-1, 2) = [[0 1]     mesh.attn: my row. Attention heads, dense FFN and LM head are split
                                    [2 3]     over it; its ranks hold the same requests and the same KV.
                                    [4 5]     --attn-tp 1 makes every row one rank: that IS DP attention.
                                    [6 7]]    mesh.ep: every rank. The routed experts are split over it.
"""

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two and warns about the old names; 2.11 knows only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """Some ranks of the job. Every collective is a no-op in a group of one."""

    size: int = 1
    rank: int = 0  # mine within the group
    handle: dist.ProcessGroup | None = None

    def share(self, num_rows: int) -> int:
        """Rows a rank gets when `num_rows` are split evenly; the engine pads batches so that this divides."""
        assert num_rows % self.size == 0, f"{num_rows=} {self.size=}"
        return num_rows // self.size

    def scatter(self, x: Tensor) -> Tensor:
        """[T, ...] -> [T / size, ...]: my rows of what every rank holds. No communication."""
        share = self.share(x.shape[0])
        return x[self.rank * share : (self.rank + 1) * share]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[T, ...] -> [T / size, ...]: my rows of the sum over ranks."""
        if self.size == 1:
            return x
        out = x.new_empty(self.share(x.shape[0]), *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), group=self.handle)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """[T, ...] -> [T * size, ...], in rank order."""
        if self.size == 1:
            return x
        out = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        _all_gather(out, x.contiguous(), group=self.handle)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.handle, group_src=0)
        return x

    def all_to_all(self, x: Tensor, send: list[int] | None = None, recv: list[int] | None = None) -> "Transfer":
        """Rows to every rank, started: `send[r]` rows to rank r (equal shares if None). `.wait()` for the result."""
        if self.size == 1:
            return Transfer(x, None, x)
        out = x.new_empty(sum(recv) if recv is not None else x.shape[0], *x.shape[1:])
        return Transfer(out, dist.all_to_all_single(out, x, recv, send, group=self.handle, async_op=True), x)

    def exchange(self, item: Any) -> list[Any]:
        """Every member's (small, picklable) item, in rank order."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        dist.all_gather_object(items, item, group=self.handle)
        return items


@dataclass
class Transfer:
    """An all-to-all in flight. `source` is kept alive until the bytes have left it."""

    _out: Tensor
    _work: dist.Work | None
    source: Tensor

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._out


@dataclass(frozen=True)
class Mesh:
    """My place in the job. Make it with `Mesh.create`; `Mesh()` is the mesh of one CPU process."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    attn: Group = Group()
    ep: Group = Group()
    first_host: str = "127.0.0.1"  # where rank 0 runs

    @property
    def replica(self) -> int:
        """Which attention replica I belong to: the row of the drawing."""
        return self.rank // self.attn.size

    @property
    def num_replicas(self) -> int:
        return self.size // self.attn.size

    def nodes(self) -> int:
        """Machines, if every one has as many ranks of this job as any other, in a row; else 1. All ranks together."""
        hosts = self.ep.exchange(socket.gethostname())
        count = len(set(hosts))
        share = self.size // count
        return count if hosts == [hosts[i * share] for i in range(count) for _ in range(share)] else 1

    @property
    def leads(self) -> bool:
        """The first rank of a replica talks to the router for it."""
        return self.attn.rank == 0

    @classmethod
    def create(cls, attn_tp: int = 1, device: str = "auto") -> "Mesh":
        """Read torchrun's environment, join the job, make the groups. ValueError spells the equation it fails."""
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local_rank = launched_local_rank()
        if attn_tp < 1:
            raise ValueError(f"--attn-tp is {attn_tp}; it must be at least 1")
        if size % attn_tp:
            raise ValueError(f"ranks % --attn-tp must be 0, not {size} % {attn_tp} = {size % attn_tp}")
        device = pick_device(device, local_rank)
        if size == 1:
            return cls(device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        grid = torch.arange(size).reshape(-1, attn_tp)
        attn = Group()
        for row in grid.tolist():  # every rank must call new_group for every row, in the same order
            handle = dist.new_group(row) if attn_tp > 1 else None
            if rank in row:
                attn = Group(attn_tp, row.index(rank), handle)
        return cls(rank, size, device, attn, Group(size, rank, dist.group.WORLD), os.environ["MASTER_ADDR"])

    def agree(self, *mine: int) -> list[list[int]]:
        """The one small CPU collective of a step: every rank's numbers, a row a rank."""
        if self.size == 1:
            return [list(mine)]
        out = torch.empty(self.size * len(mine), dtype=torch.int64)
        _all_gather(out, torch.tensor(mine, dtype=torch.int64), group=self.ep.handle)
        return out.view(self.size, len(mine)).tolist()

    def limit_waits(self, seconds: float) -> None:
        """From now on a collective on CPU tensors fails on a rank that has waited so long for another one in it."""
        for group in (self.attn, self.ep):
            if group.handle is not None:
                backend = group.handle._get_backend(torch.device("cpu"))
                backend._set_default_timeout(datetime.timedelta(seconds=seconds))

    def ranks_on_my_gpu(self) -> int:
        """How many ranks of the job use the GPU that I use. All ranks together."""
        mine = gpu_id(self.device)
        return self.ep.exchange(mine).count(mine)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def gpu_id(device: torch.device) -> str:
    """Which GPU of all the machines', whatever number a process sees it under."""
    return str(torch.cuda.get_device_properties(device).uuid)


def launched_local_rank() -> int:
    """My rank among those of this machine, before there is a mesh; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is a GPU. Ranks beyond the number of GPUs share them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA GPU that torch can use")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
