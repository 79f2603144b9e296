"""Whether a block-fp8 checkpoint's projections stay in fp8, or the whole model runs dequantised. Decided once."""

from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.divisibility import fp8_misfit


def dtype_on(device: torch.device, name: str) -> torch.dtype:
    """Return the dtype of this name. `auto` is bfloat16 on CUDA, and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


class Precision(NamedTuple):
    fp8: bool
    why: str  # for the start-up line


def decide(config: ModelConfig, attn_tp: int, dtype: torch.dtype, device: torch.device) -> Precision:
    """Decide. fp8 stays on Hopper and newer with bf16 activations, if every share is whole blocks (`fp8_misfit`)."""
    if not config.fp8:
        return Precision(False, "the checkpoint has none")
    obstacle = _no_hardware(device) or fp8_misfit(config, attn_tp, dtype_name(dtype))
    if obstacle is None:
        return Precision(True, "kept, 1x128 activations")
    return Precision(False, f"dequantised to {dtype_name(dtype)} ({obstacle})")


def _no_hardware(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"compute capability must be at least 9.0, not {capability[0]}.{capability[1]}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
