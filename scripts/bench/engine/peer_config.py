"""Write a shape of ours as the config.json that a peer reads."""

import json
from dataclasses import asdict
from pathlib import Path

from model.config import ModelConfig

OURS = ("rope", "fp8", "dtype", "eos_token_ids")  # fields with other names in config.json


def write_config(config: ModelConfig, folder: str) -> None:
    """Write config.json for a model in bf16 with plain rope. (YaRN's rope costs the same.)"""
    raw = {name: value for name, value in asdict(config).items() if name not in OURS} | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "rope_theta": config.rope.theta,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "attention_bias": False,
        "eos_token_id": 1,
    }
    Path(folder, "config.json").write_text(json.dumps(raw))
