"""Samples follow the filtered softmax. A row's token depends only on its own logits, parameters, seed and position."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from model.sampling import NO_TOKEN, SamplingRows, gumbel, keep_top, likeliest, logprob_pairs, sample, top_logprobs

Row = tuple[float, float, int, int, int]  # temperature, top_p, top_k, seed, position


def draw(logits: Tensor, rows: list[Row]) -> list[int]:
    return sample(logits, SamplingRows.build(rows, "cpu")).tolist()


def draws(logits: Tensor, count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """`count` tokens of one distribution, each with another seed and another position."""
    rows = [(temperature, top_p, top_k, 1000 + i, i % 7) for i in range(count)]
    return sample(logits.expand(count, -1), SamplingRows.build(rows, "cpu"))


def test_temperature_zero_is_greedy_whatever_else_is_asked() -> None:
    logits = torch.randn(6, 50) * 3
    best = logits.argmax(-1).tolist()
    assert draw(logits, [(0.0, 1.0, 0, i, i) for i in range(6)]) == best
    assert draw(logits, [(0.0, 0.3, 5, i, i) for i in range(6)]) == best


def test_a_row_that_is_not_finite_has_no_likeliest_token() -> None:
    """A banned token's -inf is no fault, but a row of nothing else has none to choose."""
    nan, inf = float("nan"), float("inf")
    rows = [[1, 2, 0], [1, nan, 9], [nan] * 3, [0, inf, 1], [-inf] * 3, [nan, inf, -inf], [-inf, -5, -inf]]
    tokens = likeliest(torch.tensor(rows, dtype=torch.float32)).tolist()
    assert tokens == [1, NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]
    assert likeliest(torch.zeros(0, 5)).tolist() == []


def test_greedy_rows_stay_greedy_beside_sampled_rows() -> None:
    logits = torch.randn(40, 50)
    rows = [(2.0 * (i % 2), 1.0, 0, i, 0) for i in range(40)]
    tokens, best = draw(logits, rows), logits.argmax(-1).tolist()
    assert tokens[::2] == best[::2]
    assert tokens[1::2] != best[1::2]


@pytest.mark.parametrize("limits", [(1.0, 1), (1e-6, 0)], ids=["top_k 1", "tiny top_p"])
def test_the_narrowest_limits_equal_greedy(limits: tuple[float, int]) -> None:
    logits = torch.randn(200, 50)
    tokens = draw(logits, [(1.5, *limits, i, i) for i in range(200)])
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1.01e-5, 1e-4])
def test_tiny_temperatures_are_greedy_and_finite(temperature: float) -> None:
    logits = torch.randn(100, 50) * 100
    logits[0], logits[1] = 3e38 * torch.linspace(-1, 1, 50), 0.0
    logits[1, 7] = 1.0
    tokens = draw(logits, [(temperature, 0.9, 20, i, i) for i in range(100)])
    assert tokens[1:] == logits[1:].argmax(-1).tolist()
    if temperature < 1e-5:
        assert tokens[0] == 49


def slow_support(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """top-k, then the smallest set of the likeliest that reaches top_p of what top-k left, in exact arithmetic."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: top_k or len(order)]
    weights = [Fraction(math.exp(logits[token])) for token in order]
    kept, mass = set(), Fraction(0)
    for token, weight in zip(order, weights, strict=True):
        if kept and mass >= Fraction(top_p) * sum(weights):
            break
        kept.add(token)
        mass += weight
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 2, 10, 40, 1000])
@pytest.mark.parametrize("top_p", [1e-4, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_k_and_top_p_keep_the_right_tokens(top_k: int, top_p: float) -> None:
    logits = torch.randn(30, 40) * 2
    kept = keep_top(logits, torch.full((30,), top_k), torch.full((30,), top_p)).isfinite()
    for row, mask in zip(logits.tolist(), kept, strict=True):
        assert set(mask.nonzero().flatten().tolist()) == slow_support(row, top_k, top_p)


def test_limits_are_per_row_and_leave_kept_logits_alone() -> None:
    logits = torch.randn(1, 40).repeat(3, 1)
    kept = keep_top(logits, torch.tensor([0, 3, 7]), torch.tensor([1.0, 1.0, 0.5]))
    assert torch.equal(kept[0], logits[0])
    assert torch.equal(kept[1][kept[1].isfinite()], logits[1][kept[1].isfinite()])
    assert [set(row.isfinite().nonzero().flatten().tolist()) for row in kept[1:]] == [
        slow_support(logits[0].tolist(), 3, 1.0),
        slow_support(logits[0].tolist(), 7, 0.5),
    ]


def test_samples_stay_inside_the_support_and_reach_all_of_it() -> None:
    logits = torch.randn(30) * 2
    tokens = draws(logits, 20_000, top_p=0.8, top_k=12)
    assert set(tokens.tolist()) == slow_support(logits.tolist(), 12, 0.8)


def chi_square(tokens: Tensor, probability: Tensor) -> float:
    """The statistic in standard deviations from its mean: about N(0, 1) if the samples follow `probability`."""
    expected = probability.double() * len(tokens)
    assert expected.min() >= 5, "too few samples for a chi-square test"
    statistic = ((torch.bincount(tokens, minlength=len(expected)) - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_20k_samples_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(64).clamp(-1.5, 1.5)
    tokens = draws(logits, 20_000, temperature)
    assert abs(chi_square(tokens, (logits / temperature).softmax(-1))) < 4
    assert chi_square(tokens, (logits / temperature * 1.3).softmax(-1)) > 4, "this test cannot see a wrong temperature"


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_seeds_alone_and_positions_alone_sample_the_softmax(axis: str) -> None:
    """One text is one seed at many positions; many answers to one prompt are many seeds at one position."""
    logits, many = torch.randn(64), range(20_000)
    rows = [(1.0, 1.0, 0, i, 12) if axis == "seed" else (1.0, 1.0, 0, 12, i) for i in many]
    tokens = torch.tensor(draw(logits.expand(20_000, -1), rows))
    assert abs(chi_square(tokens, logits.softmax(-1))) < 4
    pairs = tokens[0::2] * 64 + tokens[1::2]  # neighbours are independent
    coarse = (pairs // 64 // 8) * 8 + pairs % 64 // 8
    each = logits.softmax(-1).view(8, 8).sum(-1)
    assert abs(chi_square(coarse, torch.outer(each, each).flatten())) < 4


def test_a_token_does_not_depend_on_the_batch_around_it() -> None:
    logits = torch.randn(8, 300)
    rows = [
        (1.0, 1.0, 0, 3, 9),
        (0.7, 0.9, 0, 3, 9),
        (2.0, 1.0, 5, 4, 1),
        (0.0, 1.0, 0, 5, 2),
        (1.3, 0.5, 40, 2**40 + 3, 9),
        (1.0, 1.0, 0, 2**63 - 1, 2000),
        (5.0, 1.0, 0, 0, 0),
        (5.0, 0.99, 100, 0, 1),
    ]
    together = draw(logits, rows)
    alone = [draw(logits[i : i + 1], [rows[i]])[0] for i in range(8)]
    backwards = draw(logits.flip(0), rows[::-1])[::-1]
    assert together == alone == backwards


def test_seed_and_position_each_change_the_choice() -> None:
    logits = torch.zeros(1, 10_000)
    base = (1.0, 1.0, 0, 7, 5)
    others = [(1.0, 1.0, 0, 8, 5), (1.0, 1.0, 0, 7, 6), (1.0, 1.0, 0, 5, 7), (1.0, 1.0, 0, 7 + 2**40, 5)]
    assert draw(logits, [base]) == draw(logits, [base])
    assert len({draw(logits, [row])[0] for row in [base, *others]}) == 5


def test_noise_is_finite_in_every_column() -> None:
    """Infinite noise would choose its token whatever the logits say. Seeds 512..1023 at position 7 hold the draw whose
    uniform number is nearest to 1 (seed 587, column 117)."""
    noise = gumbel(torch.arange(512, 1024), torch.full((512,), 7), 8192)
    assert noise.isfinite().all(), f"not finite at {(~noise.isfinite()).nonzero().tolist()}"


def test_hopeless_tokens_are_never_sampled() -> None:
    logits = torch.full((512, 8192), -100.0)
    logits[:, 0] = 100.0
    for top_p, top_k in ((1.0, 0), (0.5, 1)):
        rows = [(1.0, top_p, top_k, seed, 7) for seed in range(512, 1024)]
        assert set(draw(logits, rows)) == {0}


def test_no_rows() -> None:
    assert draw(torch.empty(0, 10), []) == []


@pytest.mark.parametrize("count", [1, 3, 10, 99])
def test_top_logprobs_are_the_models_own_in_order_with_the_chosen_token(count: int) -> None:
    logits = torch.randn(20, 10) * 3
    tokens = torch.randint(10, (20,))
    ids, values = top_logprobs(logits, tokens, max(count, 4))  # another row of the step may want more
    for i, (row, token) in enumerate(zip(logits.tolist(), tokens.tolist(), strict=True)):
        pairs = logprob_pairs(ids[i].tolist(), values[i].tolist(), count)
        total = math.log(sum(math.exp(x) for x in row))
        order = sorted(range(10), key=lambda t: -row[t])[:count]
        want = order if token in order else [*order, token]
        assert [t for t, _ in pairs] == want
        assert [p for _, p in pairs] == pytest.approx([row[t] - total for t in want], abs=1e-5)
