"""Rebalancing: experts move while the job serves, and no step waits for them. It works in chunks of a few layers:

    1  the checkpoint is always available: on disk, and in the page cache that a node's ranks share
    2  experts that the new map adds to a rank are staged in spare slots: file -> pinned buffer -> GPU, in a thread, on
       its own stream, while steps run
    3  flip: when EVERY rank has staged its part, all ranks copy the spare slots into place and overwrite the map's rows
       between the same two steps, in place, because CUDA graphs have captured the addresses

No weights travel between ranks. The ranks coordinate by one number each, a vote, in the step's agreement:

    look (count, sum over ranks) -> decide (thread) -> [ stage (thread) -> agreed -> flip ] for each chunk -> wait

Every rank votes in every step, BUSY until it is ready. The job enters the next stage only when no rank is BUSY and all
votes are equal. If any rank votes FAILED, or the votes differ, all stop. Layers that have flipped keep their new
experts, the others keep the old ones, and the next look starts over.
"""

import sys
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from disagg.experts import balance_stats
from model.batch import to_host
from model.moe import MoE
from model.slots import IDENTITY, Slots
from model.transformer import Transformer
from model.weights import ExpertReader
from parallel.eplb import balance, balancedness
from parallel.load_counter import total_of
from parallel.mesh import Mesh
from parallel.placement import Placement, keep_in_place

BUFFERS = 2  # pinned, one expert each: one is filled while the other is copied
SWITCH_S = 5e-4  # how long a thread may keep the interpreter from another; Python's default of 5 ms is a decode step
BUSY, FAILED, READY = 0, -1, 1  # votes; a vote for a map is its fingerprint, which is larger
DIFFER = "the ranks want different maps"

Vote = Callable[[], int]
Move = tuple[int, int, int]  # MoE layer, slot of this rank, spare slot


@contextmanager
def short_switches() -> Iterator[None]:
    """Let a step get the interpreter back from the rebalancer's thread within SWITCH_S. For the whole process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Rebalancer:
    """Moves the experts of one rank. Every rank of the job has one.

    In each turn of the step loop, call `vote`, exchange the votes, and call `advance`. Call `step` after each step.
    Steps should run within `short_switches`.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        reader: ExpertReader,
        interval: int,
        threshold: float = 1.0,
        layers_per_step: int = 1,
    ) -> None:
        """Collective. `model` has its weights and its load_counters.

        `interval`: steps between looks. `threshold`: a layer moves only if its balancedness is at most this, and only
        if the average over all layers is, too. The draft layer, whose row is the last of the maps here, is not in the
        average and moves by its own balancedness. `layers_per_step`: layers per chunk.
        """
        self.mesh, self.reader, self.counters, self.placement = mesh, reader, model.load_counters, model.placement
        self.places = [(c.placement, row) for c in self.counters for row in range(len(c.by_expert))]  # by layer
        self.own = len(self.counters[0].by_expert)  # layers of the model itself
        self.interval, self.threshold, self.chunk = interval, threshold, layers_per_step
        self.groups = model.config.n_group
        self.map = self._expert_of_slot().cpu()  # [layers, P], a copy of the maps on the device
        local = self.placement.slots_per_rank
        self.mine = slice(mesh.ep.rank * local, (mesh.ep.rank + 1) * local)
        self.identity = self._expert_of_slot()[:, self.mine].clone()  # [layers, L]: experts in this rank's slots
        blocks = [*model.layers, *([model.mtp.block] if model.mtp is not None else [])]
        experts = [block.mlp.experts for block in blocks if isinstance(block.mlp, MoE)]
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
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS  # after the latest copy out of each buffer
        self._free = self._record()  # after this the weights are complete and the spare slots may be overwritten
        self._stream = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None
        self._thread = ThreadPoolExecutor(1, "rebalance")
        self._checks: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._counted = torch.zeros_like(total_of(self.counters))  # [layers, E]: the counts at the last look
        self._steps = 0  # since the last look
        self._requested: Tensor | None = None
        self._reason = ""  # of the last failure that was printed
        self.stats: defaultdict[str, float] = defaultdict(
            int, rebalances_total=0, rebalance_failures=0, rebalance_seconds=0.0, rebalance_looks=0
        )
        self._looked_at: float | None = None  # time.perf_counter() at the end of the latest complete look
        self._moved_at: float | None = None  # and of the latest complete move
        self._rounds = self._run()
        self._waits_for: Vote = next(self._rounds)

    def vote(self) -> int:
        """Return this rank's vote on entering the next stage."""
        return self._waits_for()

    @property
    def idle(self) -> bool:
        """Is no move in progress?"""
        return self._waits_for == self._due

    @property
    def why(self) -> str:
        """A line for the log."""
        size = self.spare.slot_bytes
        return (
            f"looks every {self.interval} steps, moves up to balancedness {self.threshold:g}; layers at once: "
            f"{self.chunk}; an expert is {size / 1e6:.3f} MB"
        )

    def ages(self) -> dict[str, float]:
        """Return the seconds since the latest complete look and the latest complete move, as far as there was one."""
        now, times = time.perf_counter(), {"look_age_seconds": self._looked_at, "move_age_seconds": self._moved_at}
        return {name: now - then for name, then in times.items() if then is not None}

    def step(self) -> None:
        """Count a launched step."""
        self._steps += 1

    def request(self, expert_of_slot: Tensor) -> None:
        """Move to this map [layers, P] next, whatever the load. An expert that stays on its rank keeps its slot.

        Every rank must call it, between the same two turns. Raises ValueError if a layer lacks an expert.
        """
        experts = self._counted.shape[1]
        if expert_of_slot.shape != self.map.shape:
            raise ValueError(f"the map is {list(expert_of_slot.shape)}, must be {list(self.map.shape)}")
        for layer, row in enumerate(expert_of_slot.tolist()):
            if set(row) != set(range(experts)):
                raise ValueError(f"layer {layer} of the map must hold every expert of {experts}, and no other")
        self._requested = expert_of_slot.cpu()

    def advance(self, votes: tuple[int, ...]) -> None:
        """Enter the next stage if no rank is BUSY. `votes`: those of all ranks in this turn.

        Call it before the turn's step is launched. Raises RuntimeError if an expert is not where the map says.
        """
        self._check()
        if all(votes):
            problem = "a rank failed" if FAILED in votes else DIFFER if len(set(votes)) > 1 else ""
            self._waits_for = self._rounds.send(problem)

    def _run(self) -> Generator[Vote, str, None]:
        """Run look after look. Each yield waits for the ranks: it yields the function that votes.

        All ranks resume it in the same turn, with the problem of any rank, or "".
        """
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
            self._looked_at = time.perf_counter()
            self.stats["rebalance_looks"] += 1
            if wanted is None:
                continue
            if (yield from self._move(wanted)):
                self.stats["rebalances_total"] += 1
                self._moved_at = time.perf_counter()
                self.stats["rebalance_seconds"] += self._moved_at - began

    def _due(self) -> int:
        if self._requested is not None:
            return _fingerprint(self._requested)
        return READY if self._steps >= self.interval else BUSY

    def _count(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return the job's tokens per expert since the last look, [layers, E]: on the host, valid after the event."""
        total = total_of(self.counters)
        window, self._counted = total - self._counted, total
        return to_host(self.mesh.ep.all_reduce(window)), self._record()

    def _decide(self, loads: Tensor, counted: torch.cuda.Event | None) -> Tensor | None:
        """Return the map for these loads, changed only in layers where that helps, or None if nothing should move.

        Runs in the thread. Its inputs are equal on all ranks, so the result is too.
        """
        if counted is not None:
            counted.synchronize()
        counts, ranks = loads.numpy(), self.placement.ep_size
        now = balancedness(counts, self.map.numpy(), ranks)
        self.stats |= balance_stats(now, self.own)
        may_move = now <= self.threshold
        may_move[: self.own] &= now[: self.own].mean() <= self.threshold
        if not may_move.any():
            return None
        wanted = balance(counts, self.map.shape[1], ranks, self.groups, self.mesh.nodes)
        better = torch.from_numpy(may_move & (balancedness(counts, wanted, ranks) > now))
        return self._settle(torch.from_numpy(wanted).where(better[:, None], self.map)) if better.any() else None

    def _settle(self, wanted: Tensor) -> Tensor:
        return keep_in_place(self.map, wanted, self.placement.ep_size)

    def _move(self, wanted: Tensor) -> Generator[Vote, str, bool]:
        """Stage and flip chunk after chunk. Returns False if a chunk failed."""
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
        """Fill spare slots with the new experts of these layers, and spare rows with their maps. Runs in the thread.

        No step reads the spare slots. An expert that a slot of this rank already holds is copied from there. One that
        several slots get is staged once.
        """
        moves, used = [], 0
        with torch.cuda.stream(self._stream):
            if self._stream is not None and self._free is not None:  # both or neither
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
                wanted[layers],
                self._counted.shape[1],
                self.placement.ep_size,
                self.mesh.ep.rank,
                self.placement.ep_size // self.mesh.nodes,
                self.mesh.device,
            )
            for row in range(len(layers)):
                self.spare_rows.replace(row, rows, row)
            if self._stream is not None:
                self._stream.synchronize()
        return moves

    def _fetch(self, layer: int, expert: int, spare: int) -> None:
        """Copy an expert from the checkpoint to a spare slot."""
        buffer = int(self.stats["experts_staged"]) % BUFFERS
        copied = self._copied[buffer]
        if copied is not None:
            copied.synchronize()
        self.reader.read(layer, expert, self.buffers, buffer)
        self.spare.put(spare, self.buffers, buffer)
        self._copied[buffer] = self._record()
        self.stats["experts_staged"] += 1

    def _flip(self, layers: list[int], wanted: Tensor, moves: list[Move]) -> None:
        """Put the staged experts and maps into place, on the steps' stream.

        So every step launched before sees only the old map, and every later one only the new map.
        """
        for counter in self.counters:
            counter.fold()
        for layer, slot, spare in moves:
            self.layers[layer].put(slot, self.spare, spare)
        for row, layer in enumerate(layers):
            placement, own_row = self.places[layer]
            placement.replace(own_row, self.spare_rows, row)
        self.map[layers] = wanted[layers]
        both = torch.stack((self.identity, self._expert_of_slot()[:, self.mine]))
        self._checks.append((to_host(both), self._record()))
        self._free = self._record()

    def _expert_of_slot(self) -> Tensor:
        """Return the maps on the device, one below the other [layers, P]. The draft layer's is the last."""
        return torch.cat([counter.placement.expert_of_slot for counter in self.counters])

    def _check(self, wait: bool = False) -> None:
        """Compare slots and map after each flip that the device has completed. `wait`: after all flips.

        Raises RuntimeError if a slot does not hold the expert that the map says.
        """
        while self._checks:
            both, done = self._checks[0]  # [2, layers, L]: experts in the slots, and by the map
            if done is not None and not wait and not done.query():
                return
            if done is not None:
                done.synchronize()
            self._checks.popleft()
            for layer, slot in (both[0] != both[1]).nonzero().tolist():
                found, expected = both[:, layer, slot].tolist()
                raise RuntimeError(
                    f"rank {self.mesh.rank}: MoE layer {layer}, slot {self.mine.start + slot} holds expert {found}; "
                    f"the map says expert {expected}"
                )

    def _record(self) -> torch.cuda.Event | None:
        """Record an event on the current stream. Returns None on a CPU, where all work is synchronous."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _fail(self, problem: str, future: Future | None = None) -> None:
        """Count a failure, on every rank. The rank where it happened prints it, unless it printed the same before.

        `future`: this rank's part, which may have raised. If the votes differ, rank 0 prints that.
        """
        self.stats["rebalance_failures"] += 1
        error = future.exception() if future is not None else None
        if error is not None:
            problem = f"{type(error).__name__}: {error}"
        elif problem != DIFFER or self.mesh.rank > 0:
            return
        if problem != self._reason:
            self._reason = problem
            text = f"rebalance: failed, the layers that have not moved serve on ({problem})"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wait for the thread to end, and check the last flips."""
        self._thread.shutdown()
        self._check(wait=True)
        self.reader.close()


def _vote(future: Future) -> int:
    """Vote on a result of the thread. The vote for a map is its fingerprint: the ranks must have computed the same."""
    if not future.done():
        return BUSY
    if future.exception() is not None:
        return FAILED
    result = future.result()
    return _fingerprint(result) if isinstance(result, Tensor) else READY


def _fingerprint(map: Tensor) -> int:
    return READY + 1 + zlib.crc32(map.contiguous().numpy().tobytes())
