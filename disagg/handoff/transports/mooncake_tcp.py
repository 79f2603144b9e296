"""A transport over Mooncake's transfer engine with TCP, between the host memory of two processes.

A process has one engine, which listens on two ports of all this machine's addresses: it has no setting for that. Its
threads move the bytes, and it is safe for threads.

Prefill packs the pages, because the engine is slow with many small reads. A read is cut into pieces, which the engine
moves over several connections. Each is a batch of one entry. For a larger batch the engine's quick question
(`transfer_check_status`) tells of the first entry only. Its other question blocks without a pause, gives up after a
time, and frees what may still be written then.

The engine has no way to cancel. A read whose peer has died ends with an error. One whose peer is frozen may last as
long as that. Its buffer and its credit stay taken until then: at most one link's share for each frozen peer.
"""

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - as in disagg/handoff/connect.py

from disagg.handoff.transport import TIMEOUT, Transfer
from disagg.handoff.transports.one_sided import PAUSE_S, OneSided, Run, Staging

PACKAGE = "mooncake-transfer-engine-non-cuda"
PIECE = 16 * 2**20  # bytes
SETTINGS = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "16384",  # more than the links to one peer can have; else some are refused
}
NO_BATCH = (0, 2**64 - 1)  # instead of a batch: the engine has refused it
RUNNING, DONE, TIMED_OUT = 0, 1, -2  # a batch that is late is not over


def load(device: torch.device) -> Any:
    """Import the library. Raises ValueError, which says what is missing."""
    if device.type == "cuda":
        raise ValueError("--transport mooncake is for CPUs here; on GPUs, nixl and torch serve")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import mooncake.engine as engine  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        hint = "Debian's libibverbs1" if "libibverbs" in str(error) else f"the package {PACKAGE}"
        raise ValueError(f"--transport mooncake needs {hint} (scripts/setup mooncake): {error}") from None
    return engine


class MooncakeEndpoint:
    def __init__(self, host: str, pool: Tensor) -> None:
        """`host`: this rank's address. Raises ValueError like `load`."""
        if ":" in host:
            raise ValueError(f"--transport mooncake: it needs an IPv4 address, not {host}")
        self.engine = load(pool.device).TransferEngine()
        if self.engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise ValueError(f"--transport mooncake: the engine does not start at {host}")
        self.session = f"{host}:{self.engine.get_rpc_port()}"
        self.staging = Staging(pool)
        if self.engine.register_memory(self.staging.memory.data_ptr(), self.staging.memory.nbytes) != 0:
            raise ValueError("--transport mooncake: the engine does not register its buffers")
        self.about = f"Mooncake {version(PACKAGE)} over TCP"

    def connect(self, store: Store, me: int) -> "MooncakeTransport":
        if me == 0:
            store.set("mooncake", self.session)
            return MooncakeTransport(self, "")
        store.wait(["mooncake"], TIMEOUT)
        return MooncakeTransport(self, store.get("mooncake").decode())


class MooncakeRead:
    """A read under way: its batches, of one piece each."""

    def __init__(self, x: Tensor, check: Callable[[int], int], batches: list[int], whole: bool) -> None:
        """`check`: the engine's question. `whole`: the engine has taken all pieces."""
        self.x, self.nbytes, self.began = x, x.nbytes, time.perf_counter()
        self._check, self._batches, self._whole = check, batches, whole

    def wait(self) -> None:
        states = []
        for batch in self._batches:  # all of them, also after an error: until then they may write
            while (state := self._check(batch)) in (RUNNING, TIMED_OUT):
                time.sleep(PAUSE_S)
            states.append(state)
        if not self._whole or any(state != DONE for state in states):
            raise RuntimeError("Mooncake: a read failed")


class MooncakeTransport(OneSided):
    def __init__(self, endpoint: MooncakeEndpoint, peer: str) -> None:
        """`peer`: the engine that this end reads from; "" at the prefill end."""
        super().__init__(endpoint.staging)
        self.endpoint, self.peer = endpoint, peer

    def greet(self) -> None:
        """Do nothing: the engine connects in the first read."""

    def _read(self, x: Tensor, runs: list[Run], device: int) -> Transfer:
        engine, batches = self.endpoint.engine, []
        for here, there, size in runs:
            for at in range(0, size, PIECE):
                batch = engine.batch_transfer_async_read(self.peer, [here + at], [there + at], [min(PIECE, size - at)])
                if batch in NO_BATCH:
                    return MooncakeRead(x, engine.transfer_check_status, batches, whole=False)
                batches.append(batch)
        return MooncakeRead(x, engine.transfer_check_status, batches, whole=True)
