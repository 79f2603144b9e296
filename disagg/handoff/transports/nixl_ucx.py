"""A transport over NIXL with its UCX backend: RDMA, NVLink, shared memory or TCP, as UCX finds them.

A process has one agent. Its registered memory and its connections serve all links. The agent is not safe for threads,
so a lock guards it. UCX copies between processes of one machine inside the call that posts a read, without Python's
lock. Over TCP it serves a read in the sender's process. On a CPU nothing makes progress by itself there, so the
movers ask the agent for notifications while they wait, which does.

In host memory, pages are read from pool to pool. On a GPU they are packed, because one large piece is faster there than
many small ones.

NIXL has no way to cancel. A read whose peer has died ends with an error. One whose peer is frozen may last as long as
that. Its pages or its buffer, and its credit, stay taken until then: at most one link's share for each frozen peer.
"""

import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - as in disagg/handoff/connect.py

from disagg.handoff.transport import TIMEOUT, Transfer
from disagg.handoff.transports.one_sided import PAUSE_S, OneSided, Run, Staging

BACKEND = "UCX"
IDLE_S = 0.01  # between two calls that make progress while no link waits


def load(device: torch.device) -> Any:
    """Import the library. Raises ValueError, which says what is missing."""
    try:
        from nixl_cu13 import _api  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"--transport nixl needs the package nixl-cu13 (scripts/setup nixl): {error}") from None
    logger = logging.getLogger("nixl")  # it writes to stdout otherwise
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.WARNING)
    return _api


class NixlEndpoint:
    def __init__(self, pool: Tensor) -> None:
        """Raises ValueError if the library cannot be used."""
        api = load(pool.device)
        self.lock = threading.Lock()  # guards the agent, and what follows from `_peers` on
        on_gpu = pool.is_cuda
        self.kind = "VRAM" if on_gpu else "DRAM"
        # With a thread of its own, the agent would take a whole core of a CPU.
        config = api.nixl_agent_config(backends=[BACKEND], enable_prog_thread=on_gpu)
        self.agent = api.nixl_agent(uuid.uuid4().hex, config)
        if BACKEND not in self.agent.backends:
            raise ValueError(f"--transport nixl: this nixl-cu13 has no {BACKEND} backend")
        self.staging = Staging(pool) if on_gpu else None
        self.agent.register_memory(pool if self.staging is None else self.staging.memory, backends=[BACKEND])
        self.metadata = self.agent.get_agent_metadata()
        self._peers: dict[bytes, str] = {}  # metadata -> agent; a connection serves all links between two processes
        self._reading: Counter[str] = Counter()  # by agent: reads that go on
        self._failed: set[str] = set()  # agents whose connection is to be made anew
        if not on_gpu:
            threading.Thread(target=self._keep_going, name="nixl", daemon=True).start()
        ways = f" with UCX_TLS={os.environ['UCX_TLS']}" if "UCX_TLS" in os.environ else ""
        self.about = f"NIXL {version('nixl-cu13')} over {BACKEND}{ways}, {self.kind}"

    def connect(self, store: Store, me: int) -> "NixlTransport":
        if me == 0:
            store.set("nixl", self.metadata)
            return NixlTransport(self, "")
        store.wait(["nixl"], TIMEOUT)
        return NixlTransport(self, self._meet(store.get("nixl")))

    def _meet(self, metadata: bytes) -> str:
        """Return the agent that has this metadata. A connection is kept, because closing one leaves a file open."""
        with self.lock:
            peer = self._peers.get(metadata)
            if peer in self._failed:
                if self._reading[peer]:
                    raise RuntimeError("NIXL: reads over the failed connection still go on")
                self._failed.remove(peer)
                del self._peers[metadata]
                with suppress(Exception):  # after an error the agent may have forgotten it
                    self.agent.remove_remote_agent(peer)
            if metadata not in self._peers:
                name = self.agent.add_remote_agent(metadata)
                self._peers[metadata] = name.decode() if isinstance(name, bytes) else name
            return self._peers[metadata]

    def read(self, runs: list[Run], here: int, there: int, peer: str) -> tuple[Any, str]:
        """Post a read from the peer's device `there` to the device `here`.

        Returns its handle and its state, as `state` does. Raises RuntimeError if nothing was posted.
        """
        mine, theirs = [(at, size, here) for at, _, size in runs], [(at, size, there) for _, at, size in runs]
        with self.lock:
            try:
                local, remote = (self.agent.get_xfer_descs(places, mem_type=self.kind) for places in (mine, theirs))
                handle = self.agent.initialize_xfer("READ", local, remote, peer)
            except Exception as error:  # the library's own types
                self._failed.add(peer)
                raise RuntimeError(f"NIXL: {error}") from None
            self._reading[peer] += 1
            return handle, self._settle(handle, peer, self.agent.transfer)

    def state(self, handle: Any, peer: str) -> str:
        """Return PROC while a read goes on, DONE, or why it failed. Unless it goes on, its handle is released."""
        with self.lock:
            return self._settle(handle, peer, self.agent.check_xfer_state)

    def _settle(self, handle: Any, peer: str, ask: Callable[[Any], str]) -> str:
        try:
            state = ask(handle)
        except Exception as error:
            state = f"{type(error).__name__}: {error}"
        if state != "PROC":
            self._reading[peer] -= 1
            if state != "DONE":
                self._failed.add(peer)
            with suppress(Exception):  # after an error the agent may have released it
                self.agent.release_xfer_handle(handle)
        return state

    def _keep_going(self) -> None:
        """Serve peers that still read though their link here went down: their buffers are taken until they have."""
        while True:
            time.sleep(IDLE_S)
            with suppress(Exception):  # a link that it concerns hears of it in its own questions
                self.progress()

    def progress(self) -> None:
        with self.lock:
            self.agent.get_new_notifs()


class NixlRead:
    """A read under way, or one that has completed in the call that posted it."""

    def __init__(self, x: Tensor, nbytes: int, began: float, state: str, ask: Callable[[], str]) -> None:
        """`nbytes`: of x, so many. `state`: as it was posted. `ask`: return the state now."""
        self.x, self.nbytes, self.began, self._state, self._ask = x, nbytes, began, state, ask

    def wait(self) -> None:
        while self._state == "PROC":
            time.sleep(PAUSE_S)
            self._state = self._ask()
        if self._state != "DONE":
            raise RuntimeError(f"NIXL: a read failed: {self._state}")


class NixlTransport(OneSided):
    def __init__(self, endpoint: NixlEndpoint, peer: str) -> None:
        """`peer`: the agent that this end reads from; "" at the prefill end."""
        self.in_place = endpoint.staging is None
        super().__init__(endpoint.staging, endpoint.progress if self.in_place else None)
        self.endpoint, self.peer = endpoint, peer

    def _read(self, x: Tensor, runs: list[Run], device: int) -> Transfer:
        endpoint, peer, began = self.endpoint, self.peer, time.perf_counter()
        handle, state = endpoint.read(runs, x.device.index or 0, device, peer)
        nbytes = sum(size for _, _, size in runs)
        return NixlRead(x, nbytes, began, state, lambda: endpoint.state(handle, peer))

    def greet(self) -> None:
        """Do nothing: UCX connects in the first read."""
