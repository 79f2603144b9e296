"""Random models whose experts have the popularity that was asked for."""

from dataclasses import replace

import pytest
import torch

from kernels.ops import Ops
from model.moe import Gate
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.ranks.skew import MOST, fit, zipf


@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (256, 8)])
def test_shares_follow_the_law_up_to_what_an_expert_can_take(experts: int, top_k: int) -> None:
    for exponent in (0.0, 0.5, 1.0, 2.0):
        shares = zipf(experts, exponent, top_k)
        assert shares.sum().item() == pytest.approx(top_k, rel=1e-5) and shares.max() <= MOST * (1 + 1e-6)
        below = shares[shares < MOST * (1 - 1e-6)]
        first = experts - len(below) + 1  # its rank
        law = torch.arange(first, experts + 1).double() ** -exponent
        torch.testing.assert_close(below / below[-1], (law / law[-1]).float(), rtol=1e-4, atol=0)
    assert (zipf(experts, 0.0, top_k) == top_k / experts).all()


@pytest.mark.parametrize(("name", "groups"), [("tiny", None), ("tiny", (4, 2))])
def test_tokens_that_the_bias_was_not_fitted_on_choose_by_it(name: str, groups: tuple[int, int] | None) -> None:
    config = replace(SHAPES[name], hidden_size=8)
    if groups is not None:
        config = replace(config, n_group=groups[0], topk_group=groups[1])
    experts, tokens = config.n_routed_experts, 16384
    gate = Gate(config, Ops(), torch.float32, "cpu")
    shares = zipf(experts, 0.5, config.num_experts_per_tok)[torch.randperm(experts)]
    fit(gate, shares)
    chosen, _ = gate(torch.randn(tokens, experts), torch.arange(experts), torch.ones(tokens, dtype=torch.bool))
    got = torch.bincount(chosen.flatten(), minlength=experts) / tokens
    assert (got - shares).abs().sum() < 0.1 * shares.sum()
    assert torch.corrcoef(torch.stack((got, shares)))[0, 1] > 0.99
