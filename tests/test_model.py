"""Greedy tokens and log probabilities equal transformers', however tokens are cut into steps, pages and batches."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model.transformer import Transformer
from tests import hf

NEW_TOKENS = 36
LENGTHS = (1, 5, 63, 64, 65, 30)  # the page boundary, and prompts that cross it while decoding
STYLES = {  # chunk size, arrivals
    "one prompt token a step": (1, None),
    "whole prompts": (1000, None),
    "chunks of 7 beside decodes": (7, (0, 2, 5, 14, 20, 27)),
}


@dataclass(frozen=True)
class Case:
    model: Transformer
    prompts: list[list[int]]
    theirs: hf.Answer


@pytest.fixture(scope="module", params=[*hf.SHAPES, "shipped"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "shipped":
        folder = request.getfixturevalue("tiny")
    else:
        folder = hf.save(tmp_path_factory.mktemp(request.param), request.param)
    model = hf.load(folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    return Case(model, prompts, hf.their_answer(folder, prompts, NEW_TOKENS))


@pytest.mark.parametrize("style", STYLES)
def test_greedy_tokens_and_logprobs_equal_transformers(case: Case, style: str) -> None:
    chunk, arrivals = STYLES[style]
    ours = hf.our_answer(case.model, case.prompts, NEW_TOKENS, chunk, arrivals)
    assert ours.tokens == case.theirs.tokens
    for length, mine, theirs in zip(LENGTHS, ours.logprobs, case.theirs.logprobs, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 1e-4, f"{length=}"
    if arrivals:
        assert any(decodes and prefill for decodes, prefill in ours.steps), "no step mixed prefill and decode"


def test_the_answers_are_worth_comparing(case: Case) -> None:
    """Texts that repeat one token, or logits that are all alike, would hide mistakes."""
    assert len({tuple(tokens) for tokens in case.theirs.tokens}) == len(LENGTHS)
    assert len(set(sum(case.theirs.tokens, []))) >= 20
    assert all(logprobs.std(-1).min() > 0.5 for logprobs in case.theirs.logprobs)


@pytest.mark.parametrize("rope", [hf.YARN, {"rope_type": "default", "rope_theta": 500.0}], ids=["yarn", "default"])
def test_both_spellings_of_rope_give_the_same_logits(rope: dict, tmp_path: Path) -> None:
    new = hf.save(tmp_path / "new", "one_dense", rope_parameters=rope)
    old = shutil.copytree(new, tmp_path / "old")
    raw = json.loads((old / "config.json").read_text())
    scaling = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = scaling.pop("rope_theta")
    is_yarn = scaling.pop("rope_type") == "yarn"
    raw["rope_scaling"] = {"type": "yarn", **scaling} if is_yarn else None
    (old / "config.json").write_text(json.dumps(raw))
    plain = hf.save(tmp_path / "plain", "one_dense", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})

    def logprobs(folder: Path) -> torch.Tensor:
        return hf.our_answer(hf.load(folder), [list(range(3, 90))], 8, 1000).logprobs[0]

    assert torch.equal(logprobs(old), logprobs(new))
    assert not torch.allclose(logprobs(old), logprobs(plain), atol=0.1), "this model does not feel its rope"
