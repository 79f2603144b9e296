"""Both ends of the handoff's links in bare processes, without scheduler and router: parts wire, pages and steps.

    rank r < N   the prefill end of pair r        rank N + r   the decode end

Each rank has a GPU of its own if there are enough. The links are those of real jobs (`disagg/handoff/link.py`), with
pages of DeepSeek-V3's KV. Times compare the clocks of two processes. That works because processes of one machine share
time.perf_counter.
"""

import math
import os
import queue
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from disagg.control.messages import Member
from disagg.handoff.connect import Door, dial, link_key, listen
from disagg.handoff.credits import Credits
from disagg.handoff.endpoints import Handoff
from disagg.handoff.link import Link
from disagg.handoff.receive_link import ReceiveLink
from disagg.handoff.send_link import SendLink
from disagg.handoff.transport import TIMEOUT
from kernels.backend import choose
from kernels.ops import Ops
from model.kv_cache import make_pool
from model.pages import pages_for
from model.transformer import op_shape
from parallel.mesh import Group, pick_device
from scripts.bench.handoff.library import read_scattered
from scripts.bench.handoff.traffic import AHEAD, Sink, Source
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.one_rank.rank import Rank

HOST = "127.0.0.1"
COPIES = 8  # copies of the large tensor per measurement
WARM = 2 * AHEAD  # prompts before a measurement: the first transfers allocate their buffers
MEASURED = tuple[dict[str, dict[int, float] | float], dict[int, float]]  # of one end: received, put_at
STREAM = 10  # prompts in a row per --repeat, because a few alone would take only 10 ms


def run_ends(args: Namespace, parts: list[str], limit_s: float, tell: Callable[[str, Any], None]) -> None:
    """Run the parts, and call `tell(part, result)` when each ends.

    Raises RuntimeError after `limit_s` seconds, or the error of a rank.
    """
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    found = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(_rank, (args, parts, store.port, found), nprocs=2 * args.pairs, join=False)
    deadline = time.monotonic() + limit_s
    try:
        while not ranks.join(timeout=0.5):
            while not found.empty():
                tell(*found.get())
            if time.monotonic() > deadline:
                raise RuntimeError(f"the links' ranks were still busy after {limit_s:.0f} s")
    finally:
        for process in ranks.processes:
            process.kill()
        while not found.empty():
            tell(*found.get())


def _rank(rank: int, args: Namespace, parts: list[str], port: int, found: Any) -> None:
    device = pick_device(args.device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = 2 * args.pairs
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.TCPStore(HOST, port, is_master=False), rank=rank, world_size=size, timeout=2 * TIMEOUT,
    )  # fmt: skip
    end = End(args, rank, Group(size, rank, dist.group.WORLD), device)

    def tell(part: str, value: Any) -> None:
        if rank == 0:
            found.put((part, value))

    if "wire" in parts:
        copy = copy_bandwidth(args) if rank == 0 else None
        tell("wire", (copy, wire_bandwidth(end)))
        if args.transport != "torch":
            tell("library", read_scattered(args.transport, end.world, args.pairs, args.wire_bytes, args.repeat))
    if "steps" in parts:
        with torch.inference_mode():
            step = make_step(end)  # before the links: their threads might disturb a capture
    if "pages" in parts or "steps" in parts:
        end.connect()
    for tokens in args.prompts if "pages" in parts else ():
        tell("pages", (tokens, pages_bandwidth(end, tokens)))
    if "steps" in parts:
        tell("steps", steps_beside_transfers(end, step))
    end.meet()
    os._exit(0)  # without unwinding, because a link's thread may still wait for its peer


@dataclass
class End:
    """One rank's state: its link, and the pool from which or to which the link copies."""

    args: Namespace
    rank: int
    world: Group
    device: torch.device
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    @property
    def sends(self) -> bool:
        return self.rank < self.args.pairs

    @property
    def peer(self) -> int:
        return (self.rank + self.args.pairs) % self.world.size

    def meet(self) -> None:
        """Wait for all ranks, and for the work of their GPUs."""
        self.sync()
        self.world.barrier()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def connect(self) -> None:
        config = replace(SHAPES["v3"], num_hidden_layers=self.args.kv_layers)
        ops, _ = choose(op_shape(config), torch.bfloat16, self.device)
        pages = 1 + AHEAD * pages_for(max(self.args.prompts))
        self.pool = make_pool(config, pages, torch.bfloat16, self.device)
        self.page_bytes = self.pool[:, 0].nbytes
        self.door = door = Door(HOST)  # the decode ends' stays shut; a door's store ends with it
        me = Member(f"rank{self.rank}", HOST, door.port, door.store.port)
        members = self.world.exchange(me, Member)
        self.link = self._link(me, members[self.peer], door, ops)
        self.worker = Source(self.link, self.events) if self.sends else Sink(self.link, self.events, me)
        self.meet()  # the sources' pools are full

    def _link(self, me: Member, peer: Member, door: Door, ops: Ops) -> Link:
        own = self.pool, self.events, Credits()
        endpoint = Handoff(self.args.transport).make_endpoint(HOST, self.pool)
        if self.sends:
            (knock,) = door.poll(1000 * int(TIMEOUT.total_seconds()))
            connect = listen(door.store.port, HOST, endpoint)
            return SendLink(link_key(me, knock.decode), connect, *own, pack_pages=ops.pack_pages)
        connect = dial(peer, me, endpoint)
        return ReceiveLink(link_key(peer, me), connect, *own, unpack_pages=ops.unpack_pages)


# ---- the wire


def copy_bandwidth(args: Namespace) -> list[float]:
    """Measure plain copies from each prefill GPU to its decode GPU, all in this process and at once. Bytes/s."""
    devices = [pick_device(args.device, rank) for rank in range(2 * args.pairs)]
    buffers = [torch.zeros(args.wire_bytes, dtype=torch.uint8, device=device) for device in devices]
    pairs = list(zip(buffers[: args.pairs], buffers[args.pairs :], strict=True))

    def sync() -> None:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    rates = []
    for _ in range(args.repeat + 1):
        sync()
        start = time.perf_counter()
        for _ in range(COPIES):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        sync()
        rates.append(COPIES * args.pairs * args.wire_bytes / (time.perf_counter() - start))
    return rates[1:]


def wire_bandwidth(end: End) -> list[float]:
    """Measure torch.distributed sending one large tensor between processes, all pairs at once. Bytes/s."""
    x = torch.zeros(end.args.wire_bytes, dtype=torch.uint8, device=end.device)
    seconds = []
    for _ in range(end.args.repeat + 1):
        end.meet()
        start = time.perf_counter()
        for _ in range(COPIES):
            if end.sends:
                dist.send(x, end.peer)
            else:
                dist.recv(x, end.peer)
        end.sync()
        seconds.append(time.perf_counter() - start)
    slowest = [max(ranks) for ranks in zip(*end.world.exchange(seconds, list[float]), strict=True)]
    return [COPIES * end.args.pairs * end.args.wire_bytes / one for one in slowest[1:]]


# ---- the handoff's own path


def pages_bandwidth(end: End, tokens: int) -> dict[str, float]:
    """Measure the handoff of prompts of `tokens` tokens.

    Returns a dictionary. "alone": seconds of one prompt alone. "stream": bytes/s of many prompts. "receiving": bytes/s
    while data is received. "bytes": the size of a prompt's KV.
    """
    repeat, received = end.args.repeat, {}
    end.meet()
    if not end.sends:
        end.worker.take(tokens, 1, lambda rooms: rooms >= WARM)
        alone = end.worker.take(tokens, 1, lambda rooms: rooms >= repeat)
        moved, seconds = end.link.bytes_moved, end.link.seconds_moving
        end.meet()
        stream = end.worker.take(tokens, AHEAD, lambda rooms: rooms >= WARM + STREAM * repeat)[WARM - 1 :]
        full_at = end.worker.full_at
        bytes_each = pages_for(tokens) * end.page_bytes
        received = {
            "alone": {uid: full_at[uid] for uid in alone},
            "stream": bytes_each * (len(stream) - 1) / (full_at[stream[-1]] - full_at[stream[0]]),
            "receiving": (end.link.bytes_moved - moved) / (end.link.seconds_moving - seconds),
        }
        end.worker.check()
    else:
        end.meet()
    end.meet()
    shared = end.world.exchange((received, end.worker.put_at if end.sends else {}), MEASURED)
    n = end.args.pairs
    pairs = [(shared[n + i][0], shared[i][1]) for i in range(n)]
    return {
        "alone": median(full - put_at[uid] for got, put_at in pairs for uid, full in got["alone"].items()),
        "stream": sum(got["stream"] for got, _ in pairs),
        "receiving": sum(got["receiving"] for got, _ in pairs),
        "bytes": pages_for(tokens) * end.page_bytes,
    }


# ---- steps beside transfers


def make_step(end: End) -> Callable[[], object]:
    """Return this rank's prefill step, or its captured decode step."""
    args = end.args
    how = Namespace(ep=args.ep, redundant=0, skew=1.0, backend=None)
    config = replace(SHAPES[args.shape], num_hidden_layers=args.layers)
    sequences = args.tokens // args.kv if end.sends else args.batch
    rank = Rank(how, config, end.device, args.kv, sequences * pages_for(args.kv))
    return (rank.prefill(args.tokens, args.kv) if end.sends else rank.decode(args.batch, args.kv)).run


def steps_beside_transfers(end: End, step: Callable[[], object]) -> dict[str, float]:
    """Measure a prefill step and a captured decode step: mean milliseconds, from the slowest pair.

    "idle": without transfers; "paced": the prompts of each prefill step are handed over when it ends; "flooded":
    prompts are handed over without a pause. The other keys are the transfers' rates. A prompt has args.kv tokens.
    """
    with torch.inference_mode():
        if not end.sends:
            end.worker.take(end.args.kv, AHEAD, lambda rooms: rooms >= WARM)
        mean_ms(end, step, 2)
        idle = end.world.exchange(mean_ms(end, step, end.args.repeat), float)
        n = end.args.pairs
        prefill, decode = max(idle[:n]), max(idle[n:])
        repeat = end.args.repeat if end.sends else math.ceil(end.args.repeat * prefill / decode)  # for the same time
        idle = mean_ms(end, step, repeat)
        paced, paced_rate = with_transfers(end, step, repeat, True)
        flooded, flooded_rate = with_transfers(end, step, repeat, False)
    rows = end.world.exchange((idle, paced, flooded, paced_rate, flooded_rate), tuple[float, ...])
    found = {"paced GB/s": sum(row[3] for row in rows) / 1e9, "flooded GB/s": sum(row[4] for row in rows) / 1e9}
    for phase, of_phase in (("prefill", rows[:n]), ("decode", rows[n:])):
        for i, name in enumerate(("idle", "paced", "flooded")):
            found[f"{phase} {name}"] = max(row[i] for row in of_phase)
    return found


def mean_ms(
    end: End, step: Callable[[], object], count: int, after: Callable[[Any], None] = lambda event: None
) -> float:
    """Return the mean milliseconds of `count` steps in a row, which all ranks start at the same moment.

    `after` is called when a step has been launched, with its event (None on a CPU). As in the step loop, only one step
    is launched while another runs: the links' work must not wait behind a queue of steps.
    """
    on_gpu = end.device.type == "cuda"
    end.meet()
    start, before = time.perf_counter(), None
    for _ in range(count):
        step()
        launched = torch.cuda.current_stream().record_event() if on_gpu else None
        after(launched)
        if before is not None:
            before.synchronize()
        before = launched
    end.sync()
    return 1e3 * (time.perf_counter() - start) / count


def with_transfers(end: End, step: Callable[[], object], count: int, paced: bool) -> tuple[float, float]:
    """Return `mean_ms` with transfers throughout, and their bytes/s, counted at the receiving end."""
    args, stop = end.args, threading.Event()
    if end.sends:
        source = end.worker
        source.paced = paced

        def computed(event: Any) -> None:
            """Let the prompts of a step go when the step ends."""
            for _ in range(args.tokens // args.kv if paced else 0):
                source.computed.put(event)

        end.meet()
        took = mean_ms(end, step, count, computed)
        end.world.barrier()  # until the slower end has finished its steps
        end.meet()  # no new prompts are requested any more
        source.paced = False
        for _ in range(AHEAD):
            source.computed.put(None)
        end.meet()
        while not source.computed.empty():
            source.computed.get()
        return took, 0.0
    end.meet()
    taking = ThreadPoolExecutor(1).submit(end.worker.take, args.kv, AHEAD, lambda _: stop.is_set())
    before, start = end.link.bytes_moved, time.perf_counter()
    took = mean_ms(end, step, count)
    rate = (end.link.bytes_moved - before) / (time.perf_counter() - start)
    end.world.barrier()
    stop.set()
    end.meet()
    taking.result()
    end.worker.check()
    end.meet()
    return took, rate
