"""Experts move while the job serves, and no step waits for them. Three stages, chunk by chunk of a few layers:

    1  the checkpoint is there all the time: on disk, and in the page cache that a node's ranks share
    2  what a rank lacks of the new map goes to spare slots: file -> pinned buffer -> GPU, in a thread, on a stream of
       its own, while steps run
    3  once EVERY rank has staged its part: between the same two steps on all ranks, the spare slots are copied into
       place and the map's rows are overwritten, at addresses that CUDA graphs know

No weights travel between ranks. What the ranks must know of each other is one number in the step's agreement anyway:

    look (count, sum over ranks) -> decide (thread) -> [ stage (thread) -> agreed -> flip ] for each chunk -> wait

An arrow is passed when all ranks have voted, and voted the same. If one has failed, all stop there: layers that have
flipped stay so, the others serve as before, and the next look starts anew.
"""

import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from disagg.experts import balance_stats
from model.batch import to_host
from model.slots import IDENTITY, Slots
from model.transformer import Transformer
from model.weights import ExpertReader
from parallel.eplb import balance, balancedness
from parallel.mesh import Mesh
from parallel.placement import Placement, keep_in_place

BUFFERS = 2  # pinned, of an expert each: one is read into while the other is copied
SWITCH_S = 5e-4  # how long the thread may keep the interpreter when a step wants it; Python's 5 ms are a decode step
BUSY, FAILED, READY = 0, -1, 1  # votes; a map's is its fingerprint, above these
DIFFER = "the ranks want different maps"

Vote = Callable[[], int]
Move = tuple[int, int, int]  # MoE layer, slot of this rank, spare slot


class Rebalancer:
    """All ranks of the job make one, call `vote` and `act` once a turn of the step loop, and `step` once a step."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        reader: ExpertReader,
        interval: int,
        threshold: float = 1.0,
        layers_per_step: int = 1,
    ):
        """interval: steps between looks. threshold: nothing moves while the balancedness is above it, neither of a
        layer nor, on average, of all. layers_per_step: of a chunk. The model has its weights and its load_counter. All
        ranks of the job together."""
        self.mesh, self.reader, self.load_counter, self.placement = mesh, reader, model.load_counter, model.placement
        self.interval, self.threshold, self.chunk = interval, threshold, layers_per_step
        self.groups, self.nodes = model.config.n_group, mesh.nodes()
        self.map = self.placement.expert_of_slot.cpu()  # [layers, P] as it is on the device
        local = self.placement.slots_per_rank
        self.mine = slice(mesh.ep.rank * local, (mesh.ep.rank + 1) * local)
        self.identity = self.placement.expert_of_slot[:, self.mine].clone()  # [layers, L]: what is in my slots
        experts = [layer.mlp.experts for layer in model.layers if layer.is_moe]
        self.layers = [
            Slots(dict(e.named_parameters()) | {IDENTITY: row}) for e, row in zip(experts, self.identity, strict=True)
        ]
        device, self.on_gpu = mesh.device, mesh.device.type == "cuda"
        self.spare = self.layers[0].like(layers_per_step * local, device)
        self.spare_rows = Placement(
            torch.empty_like(self.placement.slot_of_expert[:layers_per_step]),
            torch.empty_like(self.placement.expert_of_slot[:layers_per_step]),
            self.placement.ep_size,
        )
        self.buffers = self.layers[0].like(BUFFERS, torch.device("cpu"), pinned=self.on_gpu)
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS  # out of each buffer
        self._free = self._record()  # from here on the spare slots are, and the weights are there
        self._stream = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None
        self._thread = ThreadPoolExecutor(1, "rebalance")
        sys.setswitchinterval(SWITCH_S)
        self._checks: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._counted = torch.zeros_like(self.load_counter.by_expert)
        self._steps, self._requested, self._reason = 0, None, ""
        self.stats: Counter = Counter(rebalances_total=0, rebalance_failures=0, rebalance_seconds=0.0)
        self._rounds = self._run()
        self.vote: Vote = next(self._rounds)  # what this rank has to say now

    @property
    def idle(self) -> bool:
        return self.vote == self._due

    @property
    def why(self) -> str:
        """A line for the log."""
        size = self.spare.slot_bytes
        return (
            f"looks every {self.interval} steps, moves up to balancedness {self.threshold:g}; layers at once: "
            f"{self.chunk}; an expert is {size / 1e6:.3f} MB"
        )

    def step(self) -> None:
        """A step was launched."""
        self._steps += 1

    def request(self, expert_of_slot: Tensor) -> None:
        """Move to this map [layers, P] next, whatever the load; an expert that stays on its rank stays in its slot. All
        ranks together, between the same two turns. ValueError if a layer lacks an expert."""
        experts = self.load_counter.by_expert.shape[1]
        if expert_of_slot.shape != self.map.shape:
            raise ValueError(f"the map is {list(expert_of_slot.shape)}, must be {list(self.map.shape)}")
        for layer, row in enumerate(expert_of_slot.tolist()):
            if set(row) != set(range(experts)):
                raise ValueError(f"layer {layer} of the map must hold every expert of {experts}, and no other")
        self._requested = expert_of_slot.cpu()

    def act(self, votes: tuple[int, ...]) -> None:
        """`votes`: every rank's, in this turn. Before the turn's step is launched; RuntimeError if an expert is not
        where the map says."""
        self._check()
        if all(votes):
            self.vote = self._rounds.send("a rank failed" if FAILED in votes else DIFFER if len(set(votes)) > 1 else "")

    def _run(self) -> Generator[Vote, str, None]:
        """Yields what to wait for, as a vote; is sent what went wrong on any rank, in the same turn on each."""
        while True:
            problem = yield self._due
            began, wanted = time.perf_counter(), self._requested
            self._requested, self._steps = None, 0
            if problem:
                self._fail(problem)
                continue
            work = partial(self._decide, *self._count()) if wanted is None else partial(self._settle, wanted)
            deciding = self._thread.submit(work)
            if problem := (yield partial(_vote, deciding)):
                self._fail(problem, deciding)
                continue
            wanted = deciding.result()
            if wanted is None:
                continue
            if (yield from self._move(wanted)):
                self.stats["rebalances_total"] += 1
                self.stats["rebalance_seconds"] += time.perf_counter() - began

    def _due(self) -> int:
        if self._requested is not None:
            return _fingerprint(self._requested)
        return READY if self._steps >= self.interval else BUSY

    def _count(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The job's tokens of each expert [layers, E] since the last look: on the host once the event is done."""
        total = self.load_counter.total()
        window, self._counted = total - self._counted, total
        return to_host(self.mesh.ep.all_reduce(window)), self._record()

    def _decide(self, loads: Tensor, counted: torch.cuda.Event | None) -> Tensor | None:
        """The map for these loads, in the layers that it makes better; None if nothing should move. In the thread; a
        function of what all ranks have alike."""
        if counted is not None:
            counted.synchronize()
        loads, ranks = loads.numpy(), self.placement.ep_size
        now = balancedness(loads, self.map.numpy(), ranks)
        for name, value in balance_stats(now).items():  # a Counter's `update` would add them up
            self.stats[name] = value
        if now.mean() > self.threshold:
            return None
        wanted = balance(loads, self.map.shape[1], ranks, self.groups, self.nodes)
        better = torch.from_numpy((now <= self.threshold) & (balancedness(loads, wanted, ranks) > now))
        return self._settle(torch.from_numpy(wanted).where(better[:, None], self.map)) if better.any() else None

    def _settle(self, wanted: Tensor) -> Tensor:
        return keep_in_place(self.map, wanted, self.placement.ep_size)

    def _move(self, wanted: Tensor) -> Generator[Vote, str, bool]:
        changed = (wanted != self.map).any(1).nonzero()[:, 0].tolist()
        for first in range(0, len(changed), self.chunk):
            layers = changed[first : first + self.chunk]
            staging = self._thread.submit(self._stage, layers, wanted)
            if problem := (yield partial(_vote, staging)):
                self._fail(problem, staging)
                return False
            self._flip(layers, wanted, staging.result())
        return True

    @torch.inference_mode()
    def _stage(self, layers: list[int], wanted: Tensor) -> list[Move]:
        """Fill spare slots and spare rows with what these layers will have. In the thread; nothing serves from there.

        An expert that a slot of this rank holds already is copied from it; one that several slots want is staged once.
        """
        moves, used = [], 0
        with torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(self._free)
            for layer in layers:
                before, after = self.map[layer, self.mine].tolist(), wanted[layer, self.mine].tolist()
                staged: dict[int, int] = {}  # expert -> spare slot
                for slot, expert in enumerate(after):
                    if expert == before[slot]:
                        continue
                    if expert not in staged:
                        if expert in before:
                            self.spare.put(used, self.layers[layer], before.index(expert))
                        else:
                            self._fetch(layer, expert, used)
                        staged[expert], used = used, used + 1
                    moves.append((layer, slot, staged[expert]))
            rows = Placement.of_map(
                wanted[layers], self._counted.shape[1], self.placement.ep_size, self.mesh.ep.rank,
                self.placement.ep_size // self.nodes, self.mesh.device,
            )  # fmt: skip
            for row in range(len(layers)):
                self.spare_rows.replace(row, rows, row)
            if self._stream is not None:
                self._stream.synchronize()
        return moves

    def _fetch(self, layer: int, expert: int, spare: int) -> None:
        buffer = self.stats["experts_staged"] % BUFFERS
        if self._copied[buffer] is not None:
            self._copied[buffer].synchronize()
        self.reader.read(layer, expert, self.buffers, buffer)
        self.spare.put(spare, self.buffers, buffer)
        self._copied[buffer] = self._record()
        self.stats["experts_staged"] += 1

    def _flip(self, layers: list[int], wanted: Tensor, moves: list[Move]) -> None:
        """On the stream of the steps: those launched so far see the old map, whole, those after them the new one."""
        self.load_counter.fold()
        for layer, slot, spare in moves:
            self.layers[layer].put(slot, self.spare, spare)
        for row, layer in enumerate(layers):
            self.placement.replace(layer, self.spare_rows, row)
        self.map[layers] = wanted[layers]
        held = torch.stack((self.identity, self.placement.expert_of_slot[:, self.mine]))
        self._checks.append((to_host(held), self._record()))
        self._free = self._record()

    def _check(self, wait: bool = False) -> None:
        """What the slots held after the flips that the device has done: what its map said they hold."""
        while self._checks:
            held, done = self._checks[0]
            if done is not None and not wait and not done.query():
                return
            if done is not None:
                done.synchronize()
            self._checks.popleft()
            for layer, slot in (held[0] != held[1]).nonzero().tolist():
                found, expected = held[:, layer, slot].tolist()
                raise RuntimeError(
                    f"rank {self.mesh.rank}: MoE layer {layer}, slot {self.mine.start + slot} holds expert {found}; "
                    f"the map says expert {expected}"
                )

    def _record(self) -> torch.cuda.Event | None:
        """On the current stream; None on a CPU, where everything is done at once."""
        return torch.cuda.current_stream().record_event() if self.on_gpu else None

    def _fail(self, problem: str, mine: Future | None = None) -> None:
        """Counted on every rank; said by the one where it happened, and again only if the reason is another."""
        self.stats["rebalance_failures"] += 1
        error = mine.exception() if mine is not None else None
        if error is not None:
            problem = f"{type(error).__name__}: {error}"
        elif problem != DIFFER or self.mesh.rank > 0:
            return
        if problem != self._reason:
            self._reason = problem
            text = f"rank {self.mesh.rank}: rebalancing failed, the layers that have not moved serve on ({problem})"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wait for what the thread is at, and check the last flips."""
        self._thread.shutdown()
        self._check(wait=True)
        self.reader.close()


def _vote(future: Future) -> int:
    if not future.done():
        return BUSY
    if future.exception() is not None:
        return FAILED
    result = future.result()
    return _fingerprint(result) if isinstance(result, Tensor) else READY


def _fingerprint(map: Tensor) -> int:
    return READY + 1 + zlib.crc32(map.contiguous().numpy())
