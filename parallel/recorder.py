"""How many tokens each expert gets: counted on the device inside the forward, also in CUDA graphs, read in windows.

A recording is a safetensors file with `counts` [windows, layers, E] int64, summed over all ranks of a job: what
`parallel/eplb.py` balances.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class Recorder:
    def __init__(self, num_layers: int, num_slots: int, device: torch.device):
        self.counts = torch.zeros(num_layers, num_slots + 1, dtype=torch.int64, device=device)  # the last: padding's

    def add(self, layer: int, slots: Tensor) -> None:
        """slots [T, K], -1 = nowhere."""
        index = slots.remainder(self.counts.shape[1]).flatten()  # -1 becomes the last
        self.counts[layer].scatter_add_(0, index, torch.ones_like(index))

    def take(self, expert_of_slot: Tensor, num_experts: int) -> Tensor:
        """Tokens of each logical expert [layers, E] since the last time, an expert's replicas together."""
        by_slot = self.counts[:, :-1]
        counts = by_slot.new_zeros(len(by_slot), num_experts).scatter_add_(1, expert_of_slot, by_slot)
        self.counts.zero_()
        return counts


def save_recording(path: str | Path, windows: list[Tensor], layers: int, num_experts: int) -> None:
    """windows: counts [layers, E] each."""
    empty = torch.zeros(0, layers, num_experts, dtype=torch.int64)
    save_file({"counts": torch.stack(windows) if windows else empty}, str(path))


def load_recording(path: str | Path, layers: int, num_experts: int) -> Tensor:
    """counts [windows, layers, E]. ValueError if the file is no recording of a model of that shape."""
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--expert-map {path}: not a recording ({error})") from None
    counts = tensors.get("counts")
    if counts is None or counts.dim() != 3 or counts.shape[1:] != (layers, num_experts):
        found = "no tensor `counts`" if counts is None else f"counts {list(counts.shape)}"
        raise ValueError(f"--expert-map {path}: it has {found}, must be [windows, {layers}, {num_experts}]")
    if (counts < 0).any():
        raise ValueError(f"--expert-map {path}: counts must not be negative")
    return counts
