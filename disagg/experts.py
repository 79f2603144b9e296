"""Which experts the ranks of a job hold, and the recording of tokens per expert."""

import zlib
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.divisibility import check_slots
from parallel.eplb import balance, balancedness
from parallel.load_counter import LoadCounter, load_recording, save_recording
from parallel.mesh import Mesh
from parallel.placement import Placement

WINDOW = 100  # steps


def make_placement(config: ModelConfig, mesh: Mesh, redundant: int, recording: str | None) -> Placement:
    """Collective. Decide which expert each slot of the job holds: balanced for a recording, or for equal loads.

    Raises ValueError if the slots cannot be shared evenly, or the recording cannot be used.
    """
    placement = _choose_placement(config, mesh, redundant, recording)
    maps = set(mesh.ep.exchange(zlib.crc32(placement.expert_of_slot.cpu().numpy().tobytes()), int))
    if len(maps) > 1:  # tokens would go to ranks that do not have their experts
        raise ValueError(
            f"--expert-map: the ranks have {len(maps)} different maps; all must read the same one (here: {recording})"
        )
    return placement


def _choose_placement(config: ModelConfig, mesh: Mesh, redundant: int, recording: str | None) -> Placement:
    layers, experts, extra = config.num_moe_layers, config.n_routed_experts, redundant
    if not extra and recording is None:
        return Placement.identity(layers, experts, mesh.ep.size, mesh.device)
    check_slots(experts, extra, mesh.ep.size)
    loads = torch.ones(layers, experts)
    if recording is not None:
        try:
            loads = load_recording(recording, layers, experts).sum(0)
        except ValueError as error:
            raise ValueError(f"--expert-map {error}") from None
    return balanced(loads, experts + extra, config.n_group, mesh)


def balanced(loads: Tensor, num_slots: int, groups: int, mesh: Mesh) -> Placement:
    """Return a placement balanced for `loads` [layers, E], which are on the CPU and equal on all ranks."""
    of_slot = torch.from_numpy(balance(loads.numpy(), num_slots, mesh.ep.size, groups, mesh.nodes))
    return Placement.of_map(of_slot, loads.shape[1], mesh.ep.size, mesh.ep.rank, mesh.ranks_per_node, mesh.device)


def balance_stats(by_layer: NDArray) -> dict[str, float]:
    """Return the metrics: `balancedness`, averaged over the layers with experts, and one per such layer, from 0."""
    if not len(by_layer):
        return {}
    return {"balancedness": float(by_layer.mean())} | {
        f"balancedness_{layer}": float(one) for layer, one in enumerate(by_layer)
    }


class Recording:
    """Records tokens per expert, in windows of WINDOW steps, and saves them to a file.

    Every rank calls `step` in every step of the job, so all ranks end a window (a collective) in the same step.
    """

    def __init__(self, load_counter: LoadCounter, mesh: Mesh, path: str | Path) -> None:
        self.load_counter, self.mesh, self.path = load_counter, mesh, path
        self.steps = 0
        self.before = torch.zeros_like(load_counter.by_expert)
        self.windows: list[Tensor] = []

    def step(self) -> None:
        self.steps += 1
        if self.steps % WINDOW == 0:
            self._end_window()

    def _end_window(self) -> None:
        total = self.load_counter.total()
        self.windows.append(self.mesh.ep.all_reduce(total - self.before).cpu())
        self.before = total

    def stats(self) -> dict[str, float]:
        """Collective. Return the balancedness of the ranks' load, from all counts so far and the current map."""
        counts, of_slot = self.mesh.ep.all_reduce(self.load_counter.total()), self.load_counter.placement.expert_of_slot
        return balance_stats(balancedness(counts.cpu().numpy(), of_slot.cpu().numpy(), self.mesh.ep.size))

    def save(self) -> None:
        """Collective. Rank 0 writes the file."""
        if self.steps % WINDOW:
            self._end_window()
        if self.mesh.rank == 0:
            save_recording(self.path, self.windows, *self.before.shape)
