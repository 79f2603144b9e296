"""Shapes of models: configurations without weights.

A comment names the published config.json. The files were out of reach, so the sizes were not compared with them. The
numbers of parameters are the published ones (docs/models.md).
"""

from model.config import ModelConfig, Rope

MOST_CPU_BYTES = 2**32  # of weights in bf16
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}  # DeepSeek's
_LITE = {
    **_MLA,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_LARGE = {
    **_MLA,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
}
SHAPES = {
    # config.json of moonshotai/Moonlight-16B-A3B.
    "moonlight": ModelConfig(
        vocab_size=163840,
        intermediate_size=11264,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=Rope(theta=50000.0),
        **_LITE,
    ),
    # config.json of deepseek-ai/DeepSeek-V2-Lite.
    "v2_lite": ModelConfig(
        vocab_size=102400,
        intermediate_size=10944,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        max_position_embeddings=163840,
        rope=Rope(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
        **_LITE,
    ),
    # config.json of deepseek-ai/DeepSeek-V2 (V2.5 and Coder-V2 have the same sizes).
    "v2": ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        q_lora_rank=1536,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_shared_experts=2,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        first_k_dense_replace=1,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        max_position_embeddings=163840,
        rope=Rope(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
        **_MLA,
    ),
    # config.json of zai-org/GLM-4.7-Flash.
    "glm_4_7_flash": ModelConfig(
        vocab_size=154880,
        hidden_size=2048,
        intermediate_size=10240,
        moe_intermediate_size=1536,
        num_hidden_layers=47,
        num_attention_heads=20,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        n_routed_experts=64,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.8,
        rms_norm_eps=1e-5,
        max_position_embeddings=202752,
        num_nextn_predict_layers=1,
        rope=Rope(theta=1e6),
    ),
    # DeepSeek-V3 itself: for the roofline, and with --layers on GPUs that hold only some of its layers.
    "v3": ModelConfig(
        vocab_size=129280,
        num_attention_heads=128,
        n_routed_experts=256,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        max_position_embeddings=163840,
        num_nextn_predict_layers=1,
        fp8=True,
        eos_token_ids=(1,),
        rope=Rope(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
        **_LARGE,
    ),
    # config.json of moonshotai/Kimi-K2-Instruct.
    "kimi_k2": ModelConfig(
        vocab_size=163840,
        num_attention_heads=64,
        n_routed_experts=384,
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        max_position_embeddings=131072,
        fp8=True,
        rope=Rope(theta=50000.0, factor=32.0, mscale=1.0, mscale_all_dim=1.0),
        **_LARGE,
    ),
    "tiny": ModelConfig.from_pretrained("model/tiny"),
}


def check_size(shape: str, config: ModelConfig, device_type: str) -> None:
    """Raise ValueError for a model that is too large for a CPU. `config`: the shape, perhaps with fewer layers."""
    if device_type == "cpu" and (size := 2 * config.num_parameters) > MOST_CPU_BYTES:
        raise ValueError(
            f"--shape {shape}: too large for a CPU, and no GPU is used here; --shape tiny runs. Others must have at "
            f"most {MOST_CPU_BYTES:,} bytes of weights (--layers), not {size:,}"
        )
