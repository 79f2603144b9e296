"""Models by shape alone, with random weights: what the engine benchmarks run."""

import torch

from kernels.backend import choose
from model.config import ModelConfig
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh
from parallel.placement import Placement

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
    # DeepSeek-V2-Lite's dimensions; its gate (softmax) is not V3's, which is what runs here.
    "v2-lite": ModelConfig(vocab_size=102400, intermediate_size=10944, **_LITE),
    "tiny": ModelConfig.from_pretrained("model/tiny"),
}


def random_model(
    config: ModelConfig, mesh: Mesh, max_model_len: int, backend: list[str], dtype: torch.dtype = torch.bfloat16
) -> Transformer:
    """Random weights under which routing spreads as a trained model's does: the gate's logits have deviation 1."""
    ops, _ = choose(op_shape(config), dtype, mesh.device, backend)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size, mesh.device)
    model = Transformer(config, mesh, placement, ops, dtype, max_model_len)
    randomize(model)
    return model


def randomize(model: Transformer) -> None:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1)
        elif weight.dim() == 1:
            weight.zero_()
        else:
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
