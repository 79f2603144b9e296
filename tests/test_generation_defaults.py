"""A checkpoint's generation_config.json gives the defaults of sampling, as transformers' `generate` takes them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from disagg.front.generation_defaults import read_defaults
from disagg.front.parse import Served, parse_request
from disagg.front.tokenizer import PromptEncoder

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def write(folder: Path, **raw: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(raw))
    return folder


def transformers_takes(raw: dict) -> dict[str, float]:
    """The settings with which transformers would sample."""
    config = GenerationConfig.from_dict(raw)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    assert config.do_sample
    return {name: NEUTRAL[name] if getattr(config, name) is None else getattr(config, name) for name in NEUTRAL}


@pytest.mark.parametrize(
    "raw",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95},  # DeepSeek-R1
        {"do_sample": True, "temperature": 0.3, "top_p": 0.95, "top_k": 20},
        {"do_sample": True, "top_k": 0, "temperature": None, "eos_token_id": 1},
    ],
)
def test_they_are_those_of_transformers(raw: dict, tmp_path: Path) -> None:
    ours, theirs = NEUTRAL | read_defaults(write(tmp_path, **raw)), transformers_takes(raw)
    assert {name: ours[name] for name in NEUTRAL} == {name: theirs[name] for name in NEUTRAL}


@pytest.mark.parametrize("raw", [None, {}, {"temperature": 0.6}, {"do_sample": False, "temperature": 0.6}])
def test_without_do_sample_it_is_greedy(raw: dict | None, tmp_path: Path) -> None:
    assert read_defaults(tmp_path if raw is None else write(tmp_path, **raw)) == {}


def test_a_request_may_say_otherwise() -> None:
    served = Served(PromptEncoder(None, None), 10, 8, {"temperature": 0.6, "top_k": 5})
    assert parse_request({"prompt_token_ids": [1]}, 0, served).request.temperature == 0.6
    request = parse_request({"prompt_token_ids": [1], "temperature": 0}, 0, served).request
    assert (request.temperature, request.top_k, request.max_tokens) == (0, 5, 7)


@pytest.mark.parametrize(
    "raw, problem",
    [
        ({"do_sample": True, "temperature": "warm"}, "temperature is 'warm'; it must be a number in 0..1000"),
        ({"do_sample": True, "top_p": 2}, r"top_p is 2; it must be a number in \(0, 1\]"),
    ],
)
def test_a_bad_default_names_its_file(raw: dict, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"generation_config.json: {problem}"):
        read_defaults(write(tmp_path, **raw))
