"""Model types: what `model_type` in config.json decides, for the models that run, and what the others would need.

All types share one transformer. They differ in the gate, and in the defaults of fields that config.json may lack. The
defaults are those of transformers' configuration classes (5.23). A default of theirs that is one published model's own
size is none here: the field is required. The gate is that of DeepSeek's published code (`Gate` in `model/moe.py`).
"""

from dataclasses import dataclass
from typing import Any

# Required in config.json: if they are missing, transformers silently takes one published model's own values.
ASKED_FOR = (
    "n_shared_experts",
    "q_lora_rank",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "first_k_dense_replace",
)
# The meaning of null, where it is not "the default".
NULL_MEANS: dict[str, Any] = {"n_shared_experts": 0, "q_lora_rank": None, "norm_topk_prob": False}


@dataclass(frozen=True)
class ModelType:
    """The rules for the config.json of one `model_type`."""

    scoring_func: str  # the only value
    topk_methods: tuple[str, ...]  # the supported values; a missing topk_method means the first
    defaults: dict[str, Any]  # values of fields that config.json may lack
    asked_for: tuple[str, ...] = ASKED_FOR
    layer_types: bool = False  # mlp_layer_types, if it is there, says which layers have experts


# DeepSeek-V2, V2-Lite, V2.5, Coder-V2
V2 = ModelType(
    scoring_func="softmax",
    topk_methods=("greedy", "group_limited_greedy"),
    defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
)
# DeepSeek-V3, V3-0324, R1, V3.1, Moonlight; Kimi-K2 under a name of its own
V3 = ModelType(
    scoring_func="sigmoid",
    topk_methods=("noaux_tc",),
    defaults={"norm_topk_prob": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
)
# GLM-4.7-Flash
GLM = ModelType(
    scoring_func="sigmoid",
    topk_methods=("noaux_tc",),
    defaults={"norm_topk_prob": True, "rms_norm_eps": 1e-5},
    asked_for=(*ASKED_FOR, "max_position_embeddings"),
    layer_types=True,
)
SUPPORTED = {"deepseek_v2": V2, "deepseek_v3": V3, "glm4_moe_lite": GLM, "kimi_k2": V3}

SPARSE, IMAGES = "sparse attention (DeepSeek Sparse Attention)", "an image encoder"
LINEAR, NO_LATENT = "linear attention (Kimi Delta Attention)", "attention without a KV latent"
MISSING = {  # model_type -> the feature that is missing here
    "deepseek": NO_LATENT,
    "deepseek_ocr": IMAGES,
    "deepseek_ocr2": IMAGES,
    "deepseek_v32": SPARSE,
    "deepseek_v4": "compressed sparse attention and hyper-connections",
    "deepseek_vl_v2": IMAGES,
    "glm4_moe": NO_LATENT,
    "glm_moe_dsa": SPARSE,
    "kimi_k25": IMAGES,
    "kimi_linear": LINEAR,
    "kimi_vl": IMAGES,
    "longcat_flash": "zero-computation experts and two attentions per layer",
}
MISSING_FIELDS = {  # the same for fields that a supported type cannot have
    "index_head_dim": SPARSE,
    "index_n_heads": SPARSE,
    "index_topk": SPARSE,
    "linear_attn_config": LINEAR,
    "vision_config": IMAGES,
}
ONLY_VALUES = {  # fields with one supported value, whatever the type
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "partial_rotary_factor": 1,
}
