"""Addends: what the next norm sums equals a sum of its own followed by that norm, bit for bit."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels import ref
from kernels.addends import Addends, summed
from model.block import Residual

WIDTH = 256
# What is there of index, weights and plus. The rows of a token lie anywhere, side by side, or are one.
KINDS = list(product((True, False), repeat=3))
kinds = pytest.mark.parametrize(("indexed", "weighted", "with_plus"), KINDS)
sizes = pytest.mark.parametrize(("tokens", "top_k"), [(0, 6), (1, 1), (1, 6), (13, 8)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make(
    tokens: int,
    top_k: int,
    dtype: torch.dtype,
    indexed: bool,
    weighted: bool,
    with_plus: bool,
    width: int = WIDTH,
    device: str = "cpu",
) -> Addends:
    """Rows that nothing points to are NaN, and so are weights of copies that are nowhere. One of many has no copies."""
    top_k, on = top_k if indexed or weighted else 1, {"device": device}
    copies, index = tokens * top_k, None
    rows, weights = torch.randn(copies, width, **on), torch.rand(tokens, top_k, **on) if weighted else None
    if indexed:
        index = torch.randperm(2 * copies, **on)[:copies].view(tokens, top_k)
        index[torch.rand(index.shape, **on) < 0.3] = -1
        if tokens > 1:
            index[0] = -1
        used = index[index >= 0]
        rows = torch.full((2 * copies, width), float("nan"), **on)
        rows[used] = torch.randn(len(used), width, **on)
        weights = None if weights is None else weights.where(index >= 0, float("nan"))
    plus = (torch.randn(tokens, width, **on) * 2).to(dtype) if with_plus else None
    return Addends(rows.to(dtype), index, weights, plus)


def by_hand(addends: Addends, tokens: int) -> Tensor:
    """The sum [T, D] in float64, copy by copy."""
    rows, index, weights, plus = addends
    total = torch.zeros(tokens, WIDTH, dtype=torch.float64) if plus is None else plus.double()
    for token in range(tokens):
        for k in range(addends.top_k):
            row = token * addends.top_k + k if index is None else int(index[token, k])
            if row >= 0:
                total[token] += rows[row].double() * (1.0 if weights is None else float(weights[token, k]))
    return total


@dtypes
@sizes
@kinds
def test_the_sum_is_that_of_the_copies_that_are_somewhere(
    indexed: bool, weighted: bool, with_plus: bool, tokens: int, top_k: int, dtype: torch.dtype
) -> None:
    addends = make(tokens, top_k, dtype, indexed, weighted, with_plus)
    got = summed(addends, ref.ep_gather)
    assert got.dtype == dtype and got.shape == (tokens, WIDTH)
    step = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), by_hand(addends, tokens), rtol=step, atol=1e-5)
    assert summed(got, ref.ep_gather) is got


@dtypes
@sizes
@kinds
def test_a_norm_of_addends_is_that_of_their_rounded_sum(
    indexed: bool, weighted: bool, with_plus: bool, tokens: int, top_k: int, dtype: torch.dtype
) -> None:
    addends = make(tokens, top_k, dtype, indexed, weighted, with_plus)
    x, weight = torch.randn(tokens, WIDTH).to(dtype), torch.rand(WIDTH).to(dtype) + 0.5
    delta = summed(addends, ref.ep_gather)
    for norm in (ref.add_rms_norm, ref.add_rms_norm_quant):
        got = norm(x, addends, weight, 1e-6)
        for mine, want in zip(got, norm(x, delta, weight, 1e-6), strict=True):
            assert mine.dtype == want.dtype and torch.equal(mine.float(), want.float())
        total, step = got[-1], 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(total.double(), x.double() + by_hand(addends, tokens), rtol=step, atol=step)


@sizes
@kinds
def test_a_residual_sums_its_addends(indexed: bool, weighted: bool, with_plus: bool, tokens: int, top_k: int) -> None:
    addends, x = make(tokens, top_k, torch.float32, indexed, weighted, with_plus), torch.randn(tokens, WIDTH)
    total = Residual(x, addends).sum(ref.ep_gather)
    torch.testing.assert_close(total.double(), x.double() + by_hand(addends, tokens), rtol=1e-5, atol=1e-5)
