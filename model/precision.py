"""Whether a block-fp8 checkpoint's projections stay in fp8, or the whole model runs dequantised. Decided once."""

from typing import NamedTuple

import torch

from kernels.fp8 import BLOCK
from model.config import ModelConfig


class Precision(NamedTuple):
    fp8: bool
    why: str  # for the start-up line


def decide(config: ModelConfig, attn_tp: int, dtype: torch.dtype, device: torch.device) -> Precision:
    """Decide. fp8 stays on Hopper and newer with bf16 activations, if every share is whole blocks (`misfit`)."""
    if not config.fp8:
        return Precision(False, "the checkpoint has none")
    obstacle = _no_hardware(device) or misfit(config, attn_tp, dtype)
    if obstacle is None:
        return Precision(True, "kept, 1x128 activations")
    return Precision(False, f"dequantised to {_name(dtype)} ({obstacle})")


def misfit(config: ModelConfig, attn_tp: int, dtype: torch.dtype) -> str | None:
    """Return why this model cannot run in fp8 on any hardware, as an equation, or None if it can."""
    if dtype != torch.bfloat16:
        return f"activations must be bfloat16, not {_name(dtype)}"
    heads = config.num_attention_heads
    widths = {"hidden_size": config.hidden_size}
    if config.q_lora_rank is not None:
        widths["q_lora_rank"] = config.q_lora_rank
    widths["num_attention_heads * qk_head_dim / attn-tp"] = heads * config.qk_head_dim // attn_tp
    widths["num_attention_heads * v_head_dim / attn-tp"] = heads * config.v_head_dim // attn_tp
    if config.first_k_dense_replace:
        widths["intermediate_size / attn-tp"] = config.intermediate_size // attn_tp
    if config.num_moe_layers:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    steps = {name: (width, BLOCK) for name, width in widths.items()}
    steps["kv_lora_rank + qk_rope_head_dim"] = (config.kv_dim, 64)  # only an output, never split: whole tiles suffice
    for name, (width, step) in steps.items():
        if width % step:
            return f"{name} % {step} must be 0, not {width} % {step} = {width % step}"
    return None


def _no_hardware(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"compute capability must be at least 9.0, not {capability[0]}.{capability[1]}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
