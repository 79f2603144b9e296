"""How many tokens each expert gets: counted on the device inside the forward, also in CUDA graphs, read in windows.

A recording is a safetensors file with `counts` [windows, layers, E] int64, summed over all ranks of a job: what
`parallel/eplb.py` balances.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.placement import Placement


class LoadCounter:
    """Counts by slot, which is what the gate gives, and sums them up by expert before the map changes."""

    def __init__(self, placement: Placement, num_experts: int):
        layers, slots = placement.expert_of_slot.shape
        self.placement, device = placement, placement.expert_of_slot.device
        self.by_slot = torch.zeros(layers, slots + 1, dtype=torch.int64, device=device)  # the last: padding's
        self.by_expert = torch.zeros(layers, num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, slots: Tensor) -> None:
        """slots [T, K], -1 = nowhere."""
        index = slots.remainder(self.by_slot.shape[1]).flatten()  # -1 becomes the last
        self.by_slot[layer].scatter_add_(0, index, torch.ones_like(index))

    def fold(self) -> None:
        """What was counted by slot so far is of the map as it is now: call this before it changes."""
        self.by_expert.scatter_add_(1, self.placement.expert_of_slot, self.by_slot[:, :-1])
        self.by_slot.zero_()

    def total(self) -> Tensor:
        """Tokens of each logical expert [layers, E] so far, an expert's replicas together. Whoever wants windows takes
        differences."""
        self.fold()
        return self.by_expert.clone()

    def forget(self) -> None:
        """What was counted so far was no request's."""
        self.by_slot.zero_()
        self.by_expert.zero_()


def save_recording(path: str | Path, windows: list[Tensor], layers: int, num_experts: int) -> None:
    """windows: counts [layers, E] each. ValueError if the file cannot be written."""
    empty = torch.zeros(0, layers, num_experts, dtype=torch.int64)
    try:
        save_file({"counts": torch.stack(windows) if windows else empty}, str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: the recording cannot be written ({error})") from None


def load_recording(path: str | Path, layers: int | None = None, num_experts: int | None = None) -> Tensor:
    """counts [windows, layers, E] int64. ValueError if the file is none, is of another shape (None: any) or empty."""
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a recording ({error})") from None
    counts, wanted = tensors.get("counts"), (layers, num_experts)
    if (
        counts is None
        or counts.dim() != 3
        or any(w not in (None, n) for w, n in zip(wanted, counts.shape[1:], strict=True))
    ):
        found = "no tensor `counts`" if counts is None else f"counts {list(counts.shape)}"
        layers, experts = ("any" if size is None else size for size in wanted)
        raise ValueError(f"{path}: it has {found}, must be [windows, {layers}, {experts}]")
    if counts.dtype != torch.int64 or (counts < 0).any() or counts.double().sum() >= 2**63:
        raise ValueError(f"{path}: counts must be int64, not negative, and less than 2^63 together")
    if not counts.any():
        raise ValueError(f"{path}: no tokens were recorded")
    return counts
