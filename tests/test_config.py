"""A configuration is read completely, or refused with the field, its value and the rule that it breaks."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from model.config import LEAST_NUMBER, LEAST_THETA, MOST_NUMBER, MOST_SIZE, ModelConfig, Rope
from model.layers import rope_table, softmax_scale
from model.model_types import SUPPORTED
from tests.hf import YARN

REQUIRED: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}
MAY_BE_NULL: dict[str, Any] = {"q_lora_rank": None, "n_shared_experts": 1}  # required, too
MINIMAL = {"model_type": "deepseek_v3", **REQUIRED, **MAY_BE_NULL}


def refused(raw: dict[str, Any], *words: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(raw, "somewhere/config.json")
    message = str(error.value)
    assert message.startswith("somewhere/config.json: ")
    assert all(word in message for word in words), message


def test_the_smallest_config_gets_the_documented_defaults() -> None:
    config = ModelConfig.from_dict(MINIMAL)
    for name, value in REQUIRED.items():
        assert getattr(config, name) == value, name
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert (config.q_lora_rank, config.n_shared_experts) == (None, 1)
    assert (config.norm_topk_prob, config.rms_norm_eps) == (True, 1e-6)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (4096, False)
    assert (config.num_nextn_predict_layers, config.eos_token_ids) == (0, ())
    assert config.rope == Rope(theta=10000.0, factor=1.0, original_max_position=4096, mscale=0.0, mscale_all_dim=0.0)


def test_every_optional_field_is_read() -> None:
    given = {
        "q_lora_rank": 24,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 777,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 1,
    }
    config = ModelConfig.from_dict(MINIMAL | given)
    for name, value in given.items():
        assert getattr(config, name) == value, name
    assert (config.qk_head_dim, config.kv_dim, config.num_moe_layers) == (24, 40, 2)


def test_null_means_the_default() -> None:
    raw = MINIMAL | {"max_position_embeddings": None, "rope_scaling": None, "eos_token_id": None}
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(MINIMAL)


def test_null_means_none_where_there_may_be_none() -> None:
    """As in transformers, for which a norm_topk_prob of null is false."""
    raw = MINIMAL | {"q_lora_rank": None, "n_shared_experts": None, "norm_topk_prob": None}
    config = ModelConfig.from_dict(raw)
    assert (config.q_lora_rank, config.n_shared_experts, config.norm_topk_prob) == (None, 0, False)


def test_unknown_fields_are_let_be() -> None:
    assert ModelConfig.from_dict(MINIMAL | {"architectures": ["x"], "rope": 7}) == ModelConfig.from_dict(MINIMAL)


@pytest.mark.parametrize(("given", "want"), [(None, ()), (1, (1,)), (0, (0,)), ([1, 5], (1, 5)), ([1, 5, 1], (1, 5))])
def test_end_of_sequence_is_one_id_or_several(given: Any, want: tuple[int, ...]) -> None:
    assert ModelConfig.from_dict(MINIMAL | {"eos_token_id": given}).eos_token_ids == want


def test_more_dense_layers_than_layers_leave_no_moe_layer() -> None:
    assert ModelConfig.from_dict(MINIMAL | {"first_k_dense_replace": 9}).num_moe_layers == 0


@pytest.mark.parametrize("name", REQUIRED)
def test_each_required_field_is_asked_for_by_name(name: str) -> None:
    refused({k: v for k, v in MINIMAL.items() if k != name}, "required", name)
    refused(MINIMAL | {name: None}, "required", name)


def test_all_missing_fields_are_named_at_once() -> None:
    refused({"model_type": "deepseek_v3"}, *REQUIRED)


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("name", MAY_BE_NULL)
def test_what_may_be_null_must_be_there(name: str, model_type: str) -> None:
    refused({k: v for k, v in MINIMAL.items() if k != name} | {"model_type": model_type}, "required", name)


ONLY = {
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "noaux_tc"),
    "mlp_bias": (True, False),
    "hidden_act": ("gelu", "silu"),
    "attention_bias": (True, False),
    "moe_layer_freq": (2, 1),
    "rope_interleave": (False, True),
}


@pytest.mark.parametrize("name", ONLY)
def test_what_has_one_supported_value(name: str) -> None:
    wrong, only = ONLY[name]
    refused(MINIMAL | {name: wrong}, name, repr(wrong), repr(only))
    assert ModelConfig.from_dict(MINIMAL | {name: only}) == ModelConfig.from_dict(MINIMAL)


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_routed_experts"]
)
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    refused(MINIMAL | {name: value}, name, str(value), "at least 1")


def test_groups_divide_the_experts() -> None:
    refused(MINIMAL | {"n_group": 3}, "n_routed_experts % n_group must be 0, not 16 % 3")


@pytest.mark.parametrize("value", [0, -1])
def test_there_is_at_least_one_group(value: int) -> None:
    refused(MINIMAL | {"n_group": value}, "n_group", str(value))


@pytest.mark.parametrize("value", [0, -1, "4", True, 2.0])
@pytest.mark.parametrize("name", ["topk_group", "num_experts_per_tok", "num_hidden_layers", "q_lora_rank"])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    refused(MINIMAL | {name: value}, name, repr(value), "an integer of at least 1")


@pytest.mark.parametrize("value", [5, 99])
def test_kept_groups_are_some_of_the_groups(value: int) -> None:
    refused(MINIMAL | {"n_group": 4, "topk_group": value}, "topk_group", str(value), "1..n_group (4)")


@pytest.mark.parametrize("value", [9, 17])
def test_a_token_asks_for_no_more_experts_than_it_can_reach(value: int) -> None:
    raw = MINIMAL | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": value}
    refused(raw, "num_experts_per_tok", str(value), "1..8", "topk_group 2 x 4 experts a group")
    assert ModelConfig.from_dict(raw | {"num_experts_per_tok": 8}).num_experts_per_tok == 8


def test_rope_turns_pairs() -> None:
    refused(MINIMAL | {"qk_rope_head_dim": 7}, "qk_rope_head_dim", "7", "even")


def test_an_unknown_rope_is_refused() -> None:
    refused(MINIMAL | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope type", "'linear'", "'yarn'")
    refused(MINIMAL | {"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "rope type", "'llama3'", "'yarn'")


def test_yarn_needs_its_factor() -> None:
    refused(MINIMAL | {"rope_scaling": {"type": "yarn"}}, "yarn", "'factor'")


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "rope_scaling, old type"])
def test_every_number_of_yarn_is_read_in_every_spelling(spelling: str) -> None:
    numbers = {k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")} | {
        "beta_fast": 20,
        "beta_slow": 2,
    }
    if spelling == "rope_parameters":
        raw: dict[str, Any] = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **numbers}}
    else:
        kind = "type" if "old" in spelling else "rope_type"
        raw = {"rope_theta": 500.0, "rope_scaling": {kind: "yarn", **numbers}}
    assert ModelConfig.from_dict(MINIMAL | raw).rope == Rope(500.0, 4.0, 64, 20, 2, 0.7, 1.0)


def test_yarn_without_an_original_context_takes_the_models() -> None:
    raw = MINIMAL | {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 2.0}}
    assert ModelConfig.from_dict(raw).rope == Rope(10000.0, 2.0, 512, 32.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "raw", [{"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}]
)
def test_plain_rope_in_both_spellings(raw: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(MINIMAL | raw).rope == Rope(theta=500.0)


def test_a_file_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    assert ModelConfig.from_pretrained(tmp_path) == ModelConfig.from_dict(MINIMAL)
    assert ModelConfig.from_pretrained(str(tmp_path)) == ModelConfig.from_dict(MINIMAL)


def test_rope_scaling_that_was_added_to_rope_parameters_counts() -> None:
    """As in transformers, whose rope parameters are the reference."""
    raw = MINIMAL | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 600.0}
    raw |= {"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    theirs = DeepseekV3Config(**{k: v for k, v in raw.items() if k != "model_type"}).rope_parameters
    ours = ModelConfig.from_dict(raw).rope
    assert (ours.theta, ours.factor) == (theirs["rope_theta"], theirs["factor"]) == (600.0, 4.0)


def test_the_tokens_that_end_a_text_are_also_in_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL | {"eos_token_id": 1}))
    for given, want in ((None, (1,)), (1, (1,)), ([7, 1, 9], (1, 7, 9))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "temperature": 0.6}))
        assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == want
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, VOCAB]}))
    with pytest.raises(ValueError, match=rf"generation_config.json: eos_token_id is \[1, {VOCAB}\]; it must be"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json: it must hold a JSON object, not list"):
        ModelConfig.from_pretrained(tmp_path)


VOCAB = MINIMAL["vocab_size"]
YARN_4 = {"rope_type": "yarn", "factor": 4.0}
WRONG = {
    "number as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number in 1e-15..1e+15"),
    "no scale": ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; it must be a number in 1e-15..1e+15"),
    "more than a float": ({"routed_scaling_factor": 10**400}, "routed_scaling_factor is 1000"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a number in 1e-15..1e+15"),
    "not finite": ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
    "truth as text": ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false'; it must be true or false"),
    "truth as number": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    "end as text": (
        {"eos_token_id": "1"},
        f"eos_token_id is '1'; it must be an integer in 0..{VOCAB - 1} (vocab_size - 1)",
    ),
    "an end that the model does not have": ({"eos_token_id": [1, VOCAB]}, f"eos_token_id is [1, {VOCAB}]; it must be"),
    "one end as text": ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']"),
    "theta": ({"rope_theta": -5}, "rope_theta is -5; it must be a number in 2..1e+15"),
    "factor": ({"rope_scaling": YARN_4 | {"factor": 0}}, "yarn's factor is 0; it must be a number in 1e-15..1e+15"),
    "factor as text": ({"rope_scaling": YARN_4 | {"factor": "4"}}, "yarn's factor is '4'"),
    "no factor": ({"rope_scaling": YARN_4 | {"factor": None}}, "yarn rope scaling has no 'factor'"),
    "mscale": ({"rope_scaling": YARN_4 | {"mscale": -1}}, "yarn's mscale is -1; it must be a number in 0..1e+15"),
    "context": (
        {"rope_scaling": YARN_4 | {"original_max_position_embeddings": 4.5}},
        "yarn's original_max_position_embeddings is 4.5; it must be an integer over 0",
    ),
    "factor beyond floats": (
        {"rope_scaling": YARN_4 | {"factor": 1e300}},
        "yarn's factor is 1e+300; it must be",
    ),
    "turns under floats": ({"rope_scaling": YARN_4 | {"beta_fast": 1e-300}}, "yarn's beta_fast is 1e-300; it must be"),
    "theta of 1": ({"rope_theta": 1}, "rope_theta is 1; it must be a number in 2..1e+15"),
    "context beyond ints": (
        {"rope_scaling": YARN_4 | {"original_max_position_embeddings": 10**12}},
        "yarn's original_max_position_embeddings is 1000000000000; it must be an integer over 0 and at most 2147483647",
    ),
    "size beyond ints": (
        {"num_hidden_layers": 10**30},
        "num_hidden_layers is 1000000000000000000000000000000; it must",
    ),
    "half a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is supported"),
    "half a head in rope": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope's partial_rotary_factor is 0.5; only 1 is supported",
    ),
    "quantisation": ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be an object"),
    "a number's block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
        "quantization_config's weight_block_size is 128; only [128, 128] is supported",
    ),
    "AWQ": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "the weights are quantised with AWQ (quant_method 'awq'); only bf16, fp16, float32 and fp8 in blocks of",
    ),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, "quantised with GPTQ (quant_method 'gptq')"),
    "compressed-tensors": (
        {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "quantised with compressed-tensors (int4, int8 or fp8 per channel)",
    ),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised with bitsandbytes"),
    "NVFP4": ({"quantization_config": {"quant_method": "modelopt"}}, "quantised with NVIDIA ModelOpt (NVFP4"),
    "MXFP4": ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised with MXFP4"),
    "an unknown quantisation": (
        {"quantization_config": {"quant_method": "new"}},
        "quantization_config's quant_method is 'new'; only 'fp8' is supported",
    ),
    "static activations": (
        {
            "quantization_config": {
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "activation_scheme": "static",
            }
        },
        "quantization_config's activation_scheme is 'static'; only 'dynamic' is supported",
    ),
    "another fp8": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}},
        "quantization_config's fmt is 'e5m2'; only 'e4m3' is supported",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_by_name(case: str) -> None:
    given, message = WRONG[case]
    refused(MINIMAL | given, message)


EXTREMES = {  # every number of YaRN at both ends of what is taken
    "theta": (LEAST_THETA, MOST_NUMBER),
    "factor": (LEAST_NUMBER, MOST_NUMBER),
    "beta_fast": (LEAST_NUMBER, MOST_NUMBER),
    "beta_slow": (LEAST_NUMBER, MOST_NUMBER),
    "mscale": (0, MOST_NUMBER),
    "mscale_all_dim": (0, MOST_NUMBER),
    "original_max_position": (1, MOST_SIZE),
}


@pytest.mark.parametrize("values", [*itertools.product(*EXTREMES.values())])
def test_whatever_rope_is_taken_its_tables_can_be_made(values: tuple[float, ...]) -> None:
    """No overflow, no division by zero, no NaN. (What such a model would say is another question.)"""
    rope = Rope(**dict(zip(EXTREMES, values, strict=True)))
    given = {name: getattr(rope, name) for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
    given |= {"type": "yarn", "original_max_position_embeddings": rope.original_max_position}
    config = ModelConfig.from_dict(MINIMAL | {"rope_theta": rope.theta, "rope_scaling": given})
    assert all(table.isfinite().all() for table in rope_table(config, 100, "cpu"))
    assert math.isfinite(torch.tensor(softmax_scale(config)))


@pytest.mark.parametrize("limit", [10**9, MOST_SIZE])
def test_rope_tables_are_not_made_beyond_a_bound(limit: int) -> None:
    config = ModelConfig.from_dict(MINIMAL | {"max_position_embeddings": limit})
    with pytest.raises(ValueError, match=rf"max_model_len \({limit}, .*\) x qk_rope_head_dim \(8\) x 4 bytes = "):
        rope_table(config, limit, "cpu")


@pytest.mark.parametrize("name", ["model_type", "topk_method", "eos_token_id", "rope_scaling", "quantization_config"])
def test_a_message_is_short_whatever_the_file_holds(name: str) -> None:
    for value in ("x" * 10**6, ["x" * 10**6] * 10**5):
        with pytest.raises(ValueError) as error:
            ModelConfig.from_dict(MINIMAL | {name: value})
        assert len(str(error.value)) < 400


BAD_FILES = {
    "empty": (b"", "not JSON"),
    "cut": (b"{", "not JSON"),
    "no JSON": (b"nonsense", "not JSON"),
    "deep": (b'{"a":' * 100_000, "not JSON that can be read: it is nested too deeply"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
    "latin-1": (b'{"a":"\xff"}', "not UTF-8"),
    "a list": (b"[]", "it must hold a JSON object, not list"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_json_is_named(case: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    data, message = BAD_FILES[case]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**11)  # it takes no room on the disk
    with pytest.raises(ValueError, match="config.json: it has 100,000,000,000 bytes; it must have at most 67,108,864"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_missing_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such folder"):
        ModelConfig.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="no config.json"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_quantizers_own_file_is_noticed(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    assert ModelConfig.from_pretrained(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}: the weights are quantised, but config.json does not say"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match="config.json: is a git-LFS pointer, not the file: git lfs pull"):
        ModelConfig.from_pretrained(tmp_path)
