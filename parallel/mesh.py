"""Mesh: the groups of ranks in a job. It makes them of what `launched.py` knows.

Two groups explain the parallelism. Draw a job's ranks as a reshaped arange, with one row per replica of the attention:

    torchrun --nproc-per-node 8, --attn-tp 2:

        arange(8).reshape(-1, 2) = [[0 1]     mesh.attn: this rank's row. Heads, dense FFN and LM head are split
                                    [2 3]     over it; its ranks hold the same requests and the same KV.
                                    [4 5]     --attn-tp 1 makes every row one rank: that IS DP attention.
                                    [6 7]]    mesh.ep: every rank. The routed experts are split over it.
"""

import datetime
import functools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.interface import LOOPBACK, interface_of, local_host
from parallel.launched import launched_first_host, launched_local_rank, launched_rank, launched_size

# torch 2.13 renamed these two and warns about the old names; 2.11 knows only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"  # environment variables: the interface where each listens


@dataclass(frozen=True)
class Group:
    """Some ranks of the job. Every collective is a no-op in a group of one."""

    size: int = 1
    rank: int = 0  # this rank's number within the group
    handle: dist.ProcessGroup | None = None

    def share(self, num_rows: int) -> int:
        """Return the rows per rank when `num_rows` are split evenly. The engine pads batches so that this divides."""
        assert num_rows % self.size == 0, f"{num_rows=} {self.size=}"
        return num_rows // self.size

    def scatter(self, x: Tensor) -> Tensor:
        """Return this rank's rows of x, which all ranks hold: [T, ...] -> [T / size, ...]. No communication."""
        share = self.share(x.shape[0])
        return x[self.rank * share : (self.rank + 1) * share]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the sum over ranks: [T, ...] -> [T / size, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(self.share(x.shape[0]), *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), group=self.handle)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' rows, in rank order: [T, ...] -> [T * size, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        _all_gather(out, x.contiguous(), group=self.handle)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place. Returns x."""
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Copy the first rank's x to all ranks, in place. Returns x."""
        if self.size > 1:
            dist.broadcast(x, group=self.handle, group_src=0)
        return x

    def all_to_all(self, x: Tensor, send: list[int] | None = None, recv: list[int] | None = None) -> "AllToAll":
        """Start sending `send[r]` rows to every rank r; `recv[r]` rows arrive from it. None: equal shares."""
        if self.size == 1:
            return AllToAll(x, None, x)
        out = x.new_empty(sum(recv) if recv is not None else x.shape[0], *x.shape[1:])
        return AllToAll(out, dist.all_to_all_single(out, x, recv, send, group=self.handle, async_op=True), x)

    def exchange(self, item: Any, kind: Any) -> list[Any]:
        """Return every member's (small) item, in rank order. `kind`: its type, which msgspec checks at the other ranks.

        Torch's own exchange of objects unpickles them, and so runs the code of whoever gets between two ranks. Raises
        ValueError for bytes that are no such item.
        """
        if self.size == 1:
            return [item]
        mine = torch.frombuffer(bytearray(msgspec.msgpack.encode(item)), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([mine.numel()])).tolist()
        padded = mine.new_zeros(1, max(sizes))
        padded[0, : mine.numel()] = mine
        rows, decode = self.all_gather(padded).numpy(), _decoder(kind).decode
        return [decode(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def first_problem(self, problem: str | None) -> str | None:
        """Return the first member's problem, by rank, of those that have one.

        It may name a path with bytes that are no UTF-8, which the others get escaped.
        """
        sent = None if problem is None else problem.encode(errors="backslashreplace").decode()
        return next(filter(None, self.exchange(sent, str | None)), None)

    def barrier(self) -> None:
        """Wait until every member has come here."""
        self.exchange(None, None)


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder:
    return msgspec.msgpack.Decoder(kind)


@dataclass
class AllToAll:
    """An all-to-all in flight. It keeps `source` alive until its bytes are sent. `wait` returns the result."""

    _out: Tensor
    _work: dist.Work | None
    source: Tensor

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._out


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the job. Make it with `Mesh.create`; `Mesh()` is the mesh of a single CPU process."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    attn: Group = Group()
    ep: Group = Group()
    first_host: str = LOOPBACK  # where the other ranks reach rank 0
    node_of_rank: tuple[int, ...] = ()  # the machine of each rank, numbered from 0; empty: all are on one

    @property
    def replica(self) -> int:
        """The attention replica that this rank belongs to: its row of the drawing."""
        return self.rank // self.attn.size

    @property
    def num_replicas(self) -> int:
        return self.size // self.attn.size

    @property
    def ranks_per_node(self) -> int | None:
        """The number of ranks on each machine. None: the machines have unequal shares, or ranks not in a row."""
        share = self.size // max(1, len(set(self.node_of_rank)))
        in_a_row = tuple(rank // share for rank in range(self.size))
        return share if self.node_of_rank in ((), in_a_row) else None

    @property
    def nodes(self) -> int:
        """The number of machines, as experts are placed on them: one if `ranks_per_node` is None."""
        return self.size // (self.ranks_per_node or self.size)

    @property
    def leads(self) -> bool:
        """Whether this rank is its replica's first: it talks to the router for the replica."""
        return self.attn.rank == 0

    @classmethod
    def create(cls, attn_tp: int = 1, device: str = "auto") -> "Mesh":
        """Join the job that torchrun has launched, make the groups. Collective.

        `device`: auto, cpu or cuda. Raises ValueError with the equation that does not hold.
        """
        size, rank, local_rank = launched_size(), launched_rank(), launched_local_rank()
        if attn_tp < 1:
            raise ValueError(f"--attn-tp is {attn_tp}; it must be at least 1")
        if size % attn_tp:
            raise ValueError(f"ranks % --attn-tp must be 0, not {size} % {attn_tp} = {size % attn_tp}")
        my_device = pick_device(device, local_rank)
        if size == 1:
            return cls(device=my_device)
        if my_device.type == "cuda":
            torch.cuda.set_device(my_device)
        first_host = launched_first_host()
        grid = torch.arange(size).reshape(-1, attn_tp)
        attn = Group()
        with on_interface(first_host):
            dist.init_process_group("cpu:gloo,cuda:nccl" if my_device.type == "cuda" else "gloo")
            for row in grid.tolist():  # every rank must call new_group for every row, in the same order
                handle = dist.new_group(row) if attn_tp > 1 else None
                if rank in row:
                    assert not isinstance(handle, int)  # new_group returns a number to ranks outside the group
                    attn = Group(attn_tp, row.index(rank), handle)
        ep = Group(size, rank, dist.group.WORLD)
        return cls(rank, size, my_device, attn, ep, first_host, numbered(ep.exchange(machine_id(), str)))

    def agree(self, *mine: int) -> list[list[int]]:
        """Exchange numbers: return every rank's, one row per rank. The one small CPU collective of a step."""
        if self.size == 1:
            return [list(mine)]
        out = torch.empty(self.size * len(mine), dtype=torch.int64)
        _all_gather(out, torch.tensor(mine, dtype=torch.int64), group=self.ep.handle)
        return out.view(self.size, len(mine)).tolist()

    def limit_waits(self, seconds: float) -> None:
        """From now on, make a collective on CPU tensors fail on a rank that has waited `seconds` for another rank."""
        for group in (self.attn, self.ep):
            if group.handle is not None:
                backend = group.handle._get_backend(torch.device("cpu"))
                backend._set_default_timeout(datetime.timedelta(seconds=seconds))

    def ranks_on_my_gpu(self) -> int:
        """Return the number of ranks in the job that use this rank's GPU. Collective."""
        my_gpu = gpu_id(self.device)
        return self.ep.exchange(my_gpu, str).count(my_gpu)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def on_interface(first_host: str) -> Iterator[None]:
    """Let gloo and NCCL listen at the interface towards rank 0, unless the user has named one.

    Gloo would otherwise listen at the address of this machine's name, and NCCL at any interface. On one machine that is
    the loopback, and only for the groups made meanwhile: links to other machines are made later. Over several machines
    it is where the machines reach one another.
    """
    here = first_host == LOOPBACK
    name = interface_of(LOOPBACK if here else local_host(first_host))
    wanted = [variable for variable in ((GLOO,) if here else (GLOO, NCCL)) if variable not in os.environ]
    if name is None:
        yield
        return
    os.environ.update(dict.fromkeys(wanted, name))
    try:
        yield
    finally:
        for variable in wanted if here else ():
            del os.environ[variable]


def machine_id() -> str:
    """Return what tells this machine from the others: its name, and its kernel's boot, since names may repeat."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def numbered(names: list[str]) -> tuple[int, ...]:
    """Return a number for each name, equal for equal names, from 0 in the order of their first appearance."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(order[name] for name in names)


def gpu_id(device: torch.device) -> str:
    """Return the GPU's identity over all machines, independent of the number that a process sees."""
    return str(torch.cuda.get_device_properties(device).uuid)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device named auto, cpu or cuda. `auto` is CUDA if there is a GPU. More ranks than GPUs share them.

    Raises ValueError if there is no GPU for cuda.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA GPU that torch can use")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
