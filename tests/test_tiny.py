"""The shipped checkpoint is what its model card says: small, trained, complete, and routed by domain."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from disagg.front.tokenizer import load_tokenizer
from model.config import ModelConfig


def test_it_is_small_and_in_hugging_faces_layout(tiny: Path) -> None:
    names = {path.name for path in tiny.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in tiny.rglob("*")) <= 10_000_000


def test_it_has_every_feature_of_the_architecture(tiny: Path) -> None:
    config = ModelConfig.from_pretrained(tiny)
    assert config.vocab_size == 4096 and config.q_lora_rank and config.n_shared_experts == 1
    assert config.num_hidden_layers >= 5 and config.first_k_dense_replace == 1
    assert (config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok) == (32, 4, 2, 4)
    assert config.rope.factor > 1 and config.max_position_embeddings >= 2048
    assert config.num_nextn_predict_layers == 1


def test_the_mtp_layer_has_deepseeks_names(tiny: Path) -> None:
    config = ModelConfig.from_pretrained(tiny)
    prefix = f"model.layers.{config.num_hidden_layers}."
    with safe_open(tiny / "model.safetensors", "pt") as file:
        names = {name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= names
        assert {"shared_head.head.weight", "embed_tokens.weight", "mlp.gate.e_score_correction_bias"} <= names
        assert file.get_tensor(prefix + "eh_proj.weight").shape == (config.hidden_size, 2 * config.hidden_size)
        bias = file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.dtype == torch.float32 and bias.std() > 0  # it was moved during training
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_the_tokenizer_and_its_template(tiny: Path) -> None:
    encoder = load_tokenizer(tiny)
    config = ModelConfig.from_pretrained(tiny)
    for text in ("In the beginning", "def f(x):\n    return x", "naïve — 神は光あれ"):
        ids = encoder.text(text)
        assert ids[0] == encoder.tokenizer.token_to_id("<｜begin▁of▁sentence｜>") and max(ids) < config.vocab_size
        assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = encoder.chat([{"role": "user", "content": "river"}])
    words = [encoder.tokenizer.id_to_token(i) for i in chat]
    assert words[0] == "<｜begin▁of▁sentence｜>" and words[1] == "<｜User｜>" and words[-1] == "<｜Assistant｜>"
    assert words.count("<｜begin▁of▁sentence｜>") == 1


def test_the_card_has_losses_and_samples(tiny: Path) -> None:
    card = (tiny / "README.md").read_text()
    for word in ("King James", "WordNet", "Python", "public domain", "PSF", "scripts.tools.train_tiny", "H100"):
        assert word in card
    json.loads((tiny / "training.json").read_text())
