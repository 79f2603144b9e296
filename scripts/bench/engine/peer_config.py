"""Write a shape of ours as the config.json that a peer reads."""

import json
from dataclasses import asdict
from pathlib import Path

from model.config import ModelConfig

OURS = ("rope", "fp8", "dtype", "drafts", "eos_token_ids")  # fields with other names in config.json


def write_config(config: ModelConfig, folder: str) -> None:
    """Write config.json for a model in bf16 or block fp8, with plain rope. (YaRN's rope costs the same.)

    The gate decides between V2 and V3. As DeepSeek-V3 with the same numbers, Kimi-K2 and GLM-4.7-Flash cost the same. A
    config that drafts gets one multi-token-prediction layer.
    """
    version = 2 if config.scoring_func == "softmax" else 3
    raw = {name: value for name, value in asdict(config).items() if name not in OURS} | {
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "model_type": f"deepseek_v{version}",
        "torch_dtype": "bfloat16",
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": int(config.drafts),
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "attention_bias": False,
        "eos_token_id": 1,
    }
    if config.fp8:
        raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    Path(folder, "config.json").write_text(json.dumps(raw))
