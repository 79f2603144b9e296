"""What must divide so that a model can be shared by ranks, or run in fp8."""

from kernels.fp8_format import BLOCK
from model.config import ModelConfig


def check_split(config: ModelConfig, attn_tp: int) -> None:
    """Raise ValueError, with the equation, for a size that does not divide over the attention group."""
    dense = config.intermediate_size if config.first_k_dense_replace else attn_tp
    for name, value in (
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", dense),
        ("vocab_size", config.vocab_size),
    ):
        if rest := value % attn_tp:
            raise ValueError(f"--attn-tp {attn_tp}: {name} % attn-tp must be 0, not {value} % {attn_tp} = {rest}")


def check_slots(experts: int, redundant: int, ranks: int) -> None:
    """Raise ValueError, with the equation, if the job's slots cannot be shared evenly, or are too many."""
    if left := (experts + redundant) % ranks:
        equation = f"({experts} + {redundant}) % {ranks} = {left}"
        raise ValueError(f"(n_routed_experts + --redundant-experts) % ranks must be 0, not {equation}")
    if redundant > experts * ranks:
        raise ValueError(
            f"--redundant-experts is {redundant}; it must be at most one more of every expert on every rank: "
            f"{experts} x {ranks} = {experts * ranks}"
        )


def fp8_misfit(config: ModelConfig, attn_tp: int, dtype: str) -> str | None:
    """Return why this model cannot run in fp8 on any hardware, as an equation, or None if it can.

    `dtype`: the name of the activations' dtype.
    """
    if dtype != "bfloat16":
        return f"activations must be bfloat16, not {dtype}"
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
