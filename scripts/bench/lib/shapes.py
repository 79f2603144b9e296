"""Shapes of models: configurations without weights."""

import torch

from model.config import ModelConfig, Rope

_LITE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 8192,
}
SHAPES = {
    "moonlight": ModelConfig(vocab_size=163840, intermediate_size=11264, routed_scaling_factor=2.446, **_LITE),
    # DeepSeek-V2-Lite's dimensions, with V3's gate instead of its own (softmax).
    "v2-lite": ModelConfig(vocab_size=102400, intermediate_size=10944, **_LITE),
    # DeepSeek-V3 itself: for the roofline, and with --layers on GPUs that hold only some of its layers.
    "v3": ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        max_position_embeddings=163840,
        num_nextn_predict_layers=1,
        fp8=True,
        eos_token_ids=(1,),
        rope=Rope(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "tiny": ModelConfig.from_pretrained("model/tiny"),
}


def check_size(shape: str, device: torch.device) -> None:
    """Raise ValueError for a shape that is too large for a CPU."""
    if device.type == "cpu" and shape != "tiny":
        raise ValueError(f"--shape {shape}: too large for a CPU, and no GPU is used here; --shape tiny runs")
