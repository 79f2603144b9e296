"""Worlds of real processes on this machine, over gloo (and NCCL on a GPU), with a time limit and a free port.

A world starts slowly, because its processes connect to each other. So a test starts one world and checks many things.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import Group, Mesh
from tests.processes import fork_server

TIMEOUT = timedelta(seconds=120)


def run_world(size: int, body: Callable[..., None], *args: Any, timeout_s: float = 240, device: str = "cpu") -> None:
    """Call `body(rank, *args)` in `size` processes that form one world. Raises AssertionError if a rank fails.

    device: "cuda" adds NCCL. Ranks share GPUs if there are fewer GPUs than ranks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn") if device == "cuda" else fork_server
    errors = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, size, store.port, errors, device, body, args), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
        time.sleep(0.05)
    stuck = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
    failed = any(process.exitcode for process in ranks)
    for process in ranks:
        process.kill()
        process.join()
    assert failed or not stuck, f"ranks {stuck} were still running after {timeout_s} s"
    if not errors.empty():
        raise AssertionError(errors.get())
    assert not failed, f"exit codes {[p.exitcode for p in ranks]}"


def _rank(rank: int, size: int, port: int, errors: Any, device: str, body: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    backend, status = "gloo", 0
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        body(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        if device == "cpu":
            raise
        status = 1
    if device == "cuda":  # without exit handlers, which after a failure would wait for kernels that never end
        sys.stdout.flush()
        os._exit(status)


def sub_mesh(first: int, size: int, attn_tp: int = 1) -> Mesh | None:
    """Return the mesh of a job within the world: `size` ranks from rank `first` on; None on ranks outside it.

    EVERY rank of the world must call this, because it makes process groups.
    """
    ranks = list(range(first, first + size))
    me, ep, attn = dist.get_rank(), Group(), Group()
    handle = dist.new_group(ranks) if size > 1 else None
    if me in ranks and size > 1:
        ep = Group(size, me - first, handle)
    for row in torch.tensor(ranks).reshape(-1, attn_tp).tolist():
        handle = dist.new_group(row) if attn_tp > 1 else None
        if me in row:
            attn = Group(attn_tp, row.index(me), handle)
    return Mesh(me - first, size, torch.device("cpu"), attn, ep) if me in ranks else None
