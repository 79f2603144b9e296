"""Counts of tokens per expert, taken on the device inside the forward (in CUDA graphs too), and read in windows.

A recording is a safetensors file with `counts` [windows, layers, E] int64, summed over all ranks of a job. A job that
drafts has the draft layer's in it as well, apart: `draft_counts` [windows, 1, E]. `parallel/eplb.py` balances them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.placement import Placement

COUNTS, DRAFT_COUNTS = "counts", "draft_counts"  # tensors of a recording


class LoadCounter:
    """Counts tokens by slot, as the gate names them, and sums them by expert before the map changes."""

    def __init__(self, placement: Placement, num_experts: int) -> None:
        layers, slots = placement.expert_of_slot.shape
        self.placement, device = placement, placement.expert_of_slot.device
        self.by_slot = torch.zeros(layers, slots + 1, dtype=torch.int64, device=device)  # last: padding
        self.by_expert = torch.zeros(layers, num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, slots: Tensor) -> None:
        """Count slots [T, K] of an MoE layer, -1 = nowhere."""
        index = slots.remainder(self.by_slot.shape[1]).flatten()  # -1 becomes the last
        self.by_slot[layer].scatter_add_(0, index, torch.ones_like(index))

    def fold(self) -> None:
        """Add the counts by slot to those by expert, under the present map. Call it before the map changes."""
        self.by_expert.scatter_add_(1, self.placement.expert_of_slot, self.by_slot[:, :-1])
        self.by_slot.zero_()

    def total(self) -> Tensor:
        """Return the tokens per logical expert [layers, E] so far, summed over its replicas.

        The difference of two totals is a window's count.
        """
        self.fold()
        return self.by_expert.clone()

    def forget(self) -> None:
        """Reset the counts: warm-up tokens belong to no request."""
        self.by_slot.zero_()
        self.by_expert.zero_()


def total_of(counters: Sequence[LoadCounter]) -> Tensor:
    """Return the totals [all layers, E] of counters, one below the other."""
    return torch.cat([counter.total() for counter in counters])


def save_recording(path: str | Path, windows: list[Tensor], layers: int, num_experts: int) -> None:
    """Write a recording. Each window is counts [layers, E]; of a job that drafts the draft layer's row follows.

    Raises ValueError if the file cannot be written.
    """
    counts = torch.stack(windows) if windows else torch.zeros(0, layers, num_experts, dtype=torch.int64)
    parts = {COUNTS: counts[:, :layers], DRAFT_COUNTS: counts[:, layers:]}
    try:
        save_file({name: part.clone() for name, part in parts.items() if part.shape[1]}, str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: the recording cannot be written ({error})") from None


def load_recording(path: str | Path, layers: int | None = None, num_experts: int | None = None) -> Tensor:
    """Read a recording's counts [windows, layers, E] int64.

    Raises ValueError if the file is not a recording, is empty or has another shape (`layers`, `num_experts` None: any).
    """
    return _checked(path, _read(path), COUNTS, layers, num_experts)


def load_draft_recording(path: str | Path, num_experts: int) -> Tensor | None:
    """Read the draft layer's counts [windows, 1, E] int64 of a recording. None: its job made no draft.

    Raises ValueError as `load_recording`.
    """
    tensors = _read(path)
    if DRAFT_COUNTS not in tensors or not tensors[DRAFT_COUNTS].any():
        return None
    return _checked(path, tensors, DRAFT_COUNTS, 1, num_experts)


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a recording ({error})") from None


def _checked(
    path: str | Path, tensors: dict[str, Tensor], name: str, layers: int | None, num_experts: int | None
) -> Tensor:
    counts, wanted = tensors.get(name), (layers, num_experts)
    if (
        counts is None
        or counts.dim() != 3
        or any(w not in (None, n) for w, n in zip(wanted, counts.shape[1:], strict=True))
    ):
        found = f"no tensor `{name}`" if counts is None else f"{name} {list(counts.shape)}"
        wanted_layers, wanted_experts = ("any" if size is None else size for size in wanted)
        raise ValueError(f"{path}: it has {found}, must be [windows, {wanted_layers}, {wanted_experts}]")
    if counts.dtype != torch.int64 or (counts < 0).any() or counts.double().sum() >= 2**63:
        raise ValueError(f"{path}: {name} must be int64, not negative, and less than 2^63 together")
    if not counts.any():
        raise ValueError(f"{path}: no tokens were recorded")
    return counts
