"""A transport's library by itself: the smallest loop that reads scattered pages, as the reference for the handoff.

Decode reads pages of 64 tokens of one layer from prefill's memory to other places of its own, without packing.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disagg.handoff.transports import mooncake_tcp, nixl_ucx
from parallel.mesh import Group

PAGE = 64 * 576 * 2  # bytes of a page of one layer of DeepSeek-V3's KV in bf16
ENTRIES = 1024  # per batch of Mooncake's, which refuses larger ones
CPU = torch.device("cpu")


def read_scattered(transport: str, world: Group, reader: int, total: int, repeat: int) -> list[float]:
    """Measure the library with about `total` bytes, from rank 0 to rank `reader`. Returns bytes/s.

    Every rank calls it. Raises RuntimeError if other bytes arrive than were sent.
    """
    count, rng = max(1, total // PAGE), random.Random(0)
    sent = torch.randint(256, (2 * count, PAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs, mine = (rng.sample(range(2 * count), count) for _ in range(2))
    pool = sent if world.rank == 0 else torch.zeros_like(sent)
    read = {"nixl": with_nixl, "mooncake": with_mooncake}[transport](pool, world, reader, mine, theirs)
    rates = []
    for _ in range(repeat + 1 if world.rank == reader else 0):
        start = time.perf_counter()
        read()
        rates.append(count * PAGE / (time.perf_counter() - start))
    found = world.exchange(rates[1:], list[float])[reader]
    if world.rank == reader and not pool[mine].equal(sent[theirs]):
        raise RuntimeError("other bytes arrived than were sent")
    return found


def with_nixl(pool: Tensor, world: Group, reader: int, mine: list[int], theirs: list[int]) -> Callable[[], None]:
    api = nixl_ucx.load(CPU)
    agent = api.nixl_agent(uuid.uuid4().hex, api.nixl_agent_config(backends=["UCX"], enable_prog_thread=False))
    agent.register_memory(pool, backends=["UCX"])
    metadata, base = world.exchange((agent.get_agent_metadata(), pool.data_ptr()), tuple[bytes, int])[0]

    def serve() -> None:
        while True:
            agent.get_new_notifs()
            time.sleep(0.0003)

    def prepare(name: Any, base: int) -> Any:
        return agent.prep_xfer_dlist(name, [(base + i * PAGE, PAGE, 0) for i in range(len(pool))], "DRAM")

    if world.rank == 0:
        threading.Thread(target=serve, daemon=True).start()
    if world.rank != reader:
        return lambda: None
    here, there = prepare("NIXL_INIT_AGENT", pool.data_ptr()), prepare(agent.add_remote_agent(metadata), base)

    def read() -> None:
        handle = agent.make_prepped_xfer("READ", here, mine, there, theirs)
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(0.0003)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        assert state == "DONE", state

    return read


def with_mooncake(pool: Tensor, world: Group, reader: int, mine: list[int], theirs: list[int]) -> Callable[[], None]:
    engine = mooncake_tcp.load(CPU).TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(pool.data_ptr(), pool.nbytes) == 0
    # `pool` and `engine` must live as long as they are read from: the other ranks' functions keep them.
    session, base = world.exchange((f"127.0.0.1:{engine.get_rpc_port()}", pool.data_ptr()), tuple[str, int])[0]

    def read() -> None:
        batches = []
        for at in range(0, len(mine), ENTRIES):
            here = [pool.data_ptr() + i * PAGE for i in mine[at : at + ENTRIES]]
            there = [base + i * PAGE for i in theirs[at : at + ENTRIES]]
            batches.append(engine.batch_transfer_async_read(session, here, there, [PAGE] * len(here)))
        assert engine.get_batch_transfer_status(batches) == 0

    return read
