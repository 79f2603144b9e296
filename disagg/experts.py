"""Which experts the ranks of a job hold, and the recording of tokens per expert."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.divisibility import check_slots
from parallel.eplb import balance, balancedness
from parallel.load_counter import LoadCounter, load_draft_recording, load_recording, save_recording, total_of
from parallel.mesh import Mesh
from parallel.placement import Placement

WINDOW = 100  # steps


def make_placement(config: ModelConfig, mesh: Mesh, redundant: int, recording: str | None) -> Placement:
    """Collective. Decide which expert each slot of the job holds: balanced for a recording, or for equal loads.

    Raises ValueError if the slots cannot be shared evenly, or the recording cannot be used.
    """
    try:
        counts = load_recording(recording, config.num_moe_layers, config.n_routed_experts) if recording else None
    except ValueError as error:
        raise ValueError(f"--expert-map {error}") from None
    return _agreed(config, mesh, config.num_moe_layers, redundant, counts, recording)


def make_draft_placement(
    config: ModelConfig, mesh: Mesh, redundant: int, recording: str | None, say: Callable[[str], None]
) -> Placement | None:
    """Collective. Decide the same for the draft layer, by its own loads. None: the model does not draft.

    A recording of a job that made no draft has none. `say` is told so, and the loads count as equal. Raises ValueError.
    """
    if not config.drafts:
        return None
    try:
        counts = load_draft_recording(recording, config.n_routed_experts) if recording else None
    except ValueError as error:
        raise ValueError(f"--expert-map {error}") from None
    if recording and counts is None:
        say(f"--expert-map {recording}: no loads of the draft layer were recorded; its experts are placed as if equal")
    return _agreed(config, mesh, 1, redundant, counts, recording)


def _agreed(
    config: ModelConfig, mesh: Mesh, layers: int, redundant: int, counts: Tensor | None, recording: str | None
) -> Placement:
    """Collective. Return the placement for counts [windows, layers, E], the same on all ranks."""
    placement = _choose_placement(config, mesh, layers, redundant, counts)
    maps = set(mesh.ep.exchange(zlib.crc32(placement.expert_of_slot.cpu().numpy().tobytes()), int))
    if len(maps) > 1:  # tokens would go to ranks that do not have their experts
        raise ValueError(
            f"--expert-map: the ranks have {len(maps)} different maps; all must read the same one (here: {recording})"
        )
    return placement


def _choose_placement(config: ModelConfig, mesh: Mesh, layers: int, redundant: int, counts: Tensor | None) -> Placement:
    experts, extra = config.n_routed_experts, redundant
    if not extra and counts is None:
        return Placement.identity(layers, experts, mesh.ep.size, mesh.device)
    check_slots(experts, extra, mesh.ep.size)
    loads = counts.sum(0) if counts is not None else torch.ones(layers, experts)
    return balanced(loads, experts + extra, config.n_group, mesh)


def balanced(loads: Tensor, num_slots: int, groups: int, mesh: Mesh) -> Placement:
    """Return a placement balanced for `loads` [layers, E], which are on the CPU and equal on all ranks."""
    of_slot = torch.from_numpy(balance(loads.numpy(), num_slots, mesh.ep.size, groups, mesh.nodes))
    return Placement.of_map(of_slot, loads.shape[1], mesh.ep.size, mesh.ep.rank, mesh.ranks_per_node, mesh.device)


def balance_stats(by_layer: NDArray, layers: int) -> dict[str, float]:
    """Return the metrics: `balancedness`, averaged over the layers with experts, and one per such layer, from 0.

    `by_layer`: of `layers` layers, and then of the draft layer if there is one: `draft_balancedness`.
    """
    if not len(by_layer):
        return {}
    stats = {"balancedness": float(by_layer[:layers].mean())}
    stats |= {f"balancedness_{layer}": float(one) for layer, one in enumerate(by_layer[:layers])}
    return stats | ({"draft_balancedness": float(by_layer[layers])} if len(by_layer) > layers else {})


class Recording:
    """Records tokens per expert, in windows of WINDOW steps, and saves them to a file.

    Every rank calls `step` in every step of the job, so all ranks end a window (a collective) in the same step.
    """

    def __init__(self, counters: Sequence[LoadCounter], mesh: Mesh, path: str | Path) -> None:
        """`counters`: `Transformer.load_counters`."""
        self.counters, self.mesh, self.path = counters, mesh, path
        self.layers = len(counters[0].by_expert)  # the draft layer's counts are behind theirs
        self.steps = 0
        self.before = torch.zeros_like(total_of(counters))
        self.windows: list[Tensor] = []

    def step(self) -> None:
        self.steps += 1
        if self.steps % WINDOW == 0:
            self._end_window()

    def _end_window(self) -> None:
        total = total_of(self.counters)
        self.windows.append(self.mesh.ep.all_reduce(total - self.before).cpu())
        self.before = total

    def stats(self) -> dict[str, float]:
        """Collective. Return the balancedness of the ranks' load, from all counts so far and the current map."""
        counts = self.mesh.ep.all_reduce(total_of(self.counters)).cpu().numpy()
        of_slot = torch.cat([counter.placement.expert_of_slot for counter in self.counters]).cpu().numpy()
        return balance_stats(balancedness(counts, of_slot, self.mesh.ep.size), self.layers)

    def save(self) -> None:
        """Collective. Rank 0 writes the file."""
        if self.steps % WINDOW:
            self._end_window()
        if self.mesh.rank == 0:
            save_recording(self.path, self.windows, self.layers, self.before.shape[1])
