"""Loopback's simulated arrivals: each expert gets its promised rows, in both layouts, and can compute them.

With a simulated link, they arrive at the modelled time.
"""

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import ref
from kernels.fp8 import quantize_128x128
from kernels.ops import Ops
from model.config import ModelConfig
from model.moe import Experts
from parallel.dispatch import Contiguous, Masked
from scripts.bench.one_rank.delay import Delay
from scripts.bench.one_rank.loopback import LoopbackContiguous, LoopbackMasked
from scripts.bench.one_rank.simulated_link import SimulatedLink
from scripts.bench.one_rank.simulated_load import SimulatedLoad, share_of_tokens

CPU, D, K = torch.device("cpu"), 256, 8
CONFIG = ModelConfig(
    vocab_size=8, hidden_size=D, intermediate_size=8, moe_intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=1, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8,
    num_experts_per_tok=K,
)  # fmt: skip


def test_the_deployments_rows() -> None:
    """EP72 decode: 256 tokens a rank, 288 slots: 512 rows for each of 4. EP32 prefill: 16,384 tokens, 9 slots."""
    assert SimulatedLoad.even(256, 72, 8, 288) == SimulatedLoad((512,) * 4, 512)
    skewed = SimulatedLoad.even(256, 72, 8, 288, skew=1.3)
    assert skewed.counts == (666, 563, 461, 358)
    prefill = SimulatedLoad.even(16384, 32, 8, 288, distinct=share_of_tokens(256, 32, 8, 8, 4))
    assert sum(prefill.counts) == 16384 * 8 and max(prefill.counts) - min(prefill.counts) <= 1
    assert prefill.tokens / 16384 == pytest.approx(6.6, abs=0.01)  # ranks that a token goes to, of 32


def test_the_share_of_tokens_is_what_sampling_gives() -> None:
    generator, tokens = torch.Generator().manual_seed(0), 40_000
    groups = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :4]  # 8 groups of 32, 4 chosen
    places = torch.rand(tokens, 128, generator=generator).argsort(1)[:, :8]
    chosen = groups.gather(1, places // 32) * 32 + places % 32
    for places in (32, 8, 4, 2):  # a quarter of a group, one, two, four
        here = (chosen < 256 // places).any(1).float().mean().item()
        assert share_of_tokens(256, places, 8, 8, 4) == pytest.approx(here, abs=0.01)
    assert share_of_tokens(8, 1, 8) == 1


@pytest.mark.parametrize(("skew", "counts"), [(1.0, (10, 10, 10)), (1.5, (15, 10, 5)), (2.0, (20, 10, 0))])
def test_skew_keeps_the_mean(skew: float, counts: tuple[int, ...]) -> None:
    assert SimulatedLoad.even(15, 4, 2, 12, skew).counts == counts


def test_shares_of_the_choices() -> None:
    """16 tokens of 4 ranks choose 2 slots each: 128 choices, a quarter and an eighth of them here. Of all tokens half
    want the one and a quarter the other: 1 - 1/2 x 3/4 want any."""
    assert SimulatedLoad.of_shares((0.25, 0.125), 16, 4, 2) == SimulatedLoad((32, 16), 40)
    assert SimulatedLoad.of_shares((0.5,), 16, 4, 2) == SimulatedLoad((64,), 64)
    with pytest.raises(ValueError, match=r"shares \* top_k must be at most 1, not 0.6000 \* 2"):
        SimulatedLoad.of_shares((0.6, 0.1), 16, 4, 2)


def counted(arrived: Contiguous | Masked) -> tuple[int, ...]:
    """Return the rows of each expert."""
    if isinstance(arrived, Masked):
        return tuple(arrived.counts.tolist())
    return tuple(end - start for start, end in arrived.groups.ranges())


@pytest.mark.parametrize("layout", [0, 1])
def test_arrivals_come_in_turn(layout: int) -> None:
    two, like = (SimulatedLoad((5, 0), 5), SimulatedLoad((2, 7), 7)), torch.zeros(1, D)
    contiguous = LoopbackContiguous(lambda tokens: two, 4, D, K, Ops(), like)
    loopback = (contiguous, LoopbackMasked(lambda tokens: two, 4, 8, D, Ops(), CPU))[layout]
    seen = []
    for _ in range(3):
        arrived = loopback.dispatch(*sent(4)).wait()
        seen.append(counted(arrived))
    assert seen == [(5, 0), (2, 7), (5, 0)]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="slots % ranks must be 0, not 10 % 4 = 2"):
        SimulatedLoad.even(1, 4, 1, 10)
    with pytest.raises(ValueError, match=r"skew is 2.5; it must be in \[1, 2\]"):
        SimulatedLoad.even(1, 4, 1, 12, skew=2.5)
    with pytest.raises(ValueError, match="rows of an expert <= capacity must hold, not 20 <= 16"):
        LoopbackMasked(lambda tokens: (SimulatedLoad((20, 1), 20),), 1, 16, D, Ops(), CPU)


def sent(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, D), torch.zeros(tokens, K, dtype=torch.int64), torch.ones(tokens, K)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize(
    "arrivals", [SimulatedLoad((5, 0, 9), 9), SimulatedLoad((40, 40, 40), 15), SimulatedLoad((3,), 3)]
)
def test_contiguous(arrivals: SimulatedLoad, alignment: int, fp8: bool) -> None:
    local, ops = len(arrivals.counts), replace(Ops(), alignment=alignment)
    if max(arrivals.counts) > arrivals.tokens:  # more copies of an expert than tokens: no such arrival is made
        arrivals = replace(arrivals, tokens=max(arrivals.counts))
    like = ref.quantize_1x128(torch.zeros(1, D)) if fp8 else torch.zeros(1, D)
    loopback = LoopbackContiguous(lambda tokens: (arrivals,), 7, D, K, ops, like)
    x, slots, weights = sent(7)
    arrived = loopback.dispatch(x, slots, weights).wait()
    ids, _, counts = next(loopback.turns[7])
    assert counts == arrivals.counts
    assert ids.shape == (arrivals.tokens, K) and (ids >= 0).any(1).all()
    assert tuple((ids == e).sum().item() for e in range(local)) == arrivals.counts
    for row in ids.tolist():
        here = [e for e in row if e >= 0]
        assert len(set(here)) == len(here), "an expert twice"
    match arrived:
        case Contiguous(rows, groups, scale=scale):
            assert len(rows) % alignment == 0 and (scale is not None) == fp8
            assert counted(arrived) == arrivals.counts
    dtype = torch.float8_e4m3fn if fp8 else torch.float32
    y = run(Experts(CONFIG, local, ops, dtype, CPU), arrived)
    assert y[groups.of_rows(len(y)) >= 0].isfinite().all()
    plus = torch.randn(7, D)
    back = loopback.combine(y, arrived.way_back, plus).wait()
    assert back.rows.shape == (7, D) and back.rows.is_contiguous() and back.rows.isfinite().all()
    assert back.plus is plus and loopback.combine(y, arrived.way_back).wait().plus is None


@pytest.mark.parametrize("fp8", [False, True])
def test_masked(fp8: bool) -> None:
    loopback = LoopbackMasked(lambda tokens: (SimulatedLoad((5, 0, 128), 128),), 3, 256, D, Ops(), CPU, fp8)
    arrived = loopback.dispatch(*sent(3)).wait()
    match arrived:
        case Masked(rows, counts, scale=scale):
            assert rows.shape == (3, 256, D) and counts.tolist() == [5, 0, 128]
            assert (scale is not None) == fp8 and (scale is None or scale.shape == (3, 256, 2))
            if fp8:
                assert scale.stride(1) == 1
                rows = ref.dequantize_1x128(rows, scale)
            assert rows[0, :5].float().std() == pytest.approx(1, abs=0.2) and rows.isfinite().all()
    y = run(Experts(CONFIG, 3, Ops(), torch.float8_e4m3fn if fp8 else torch.bfloat16, CPU), arrived)
    back = loopback.combine(y, arrived.way_back, torch.zeros(3, D)).wait()
    assert back.rows.shape == back.plus.shape == (3, D) and back.rows.is_contiguous()


def run(experts: Experts, arrived: Contiguous | Masked) -> Tensor:
    for name, weight in experts.named_parameters():
        if weight.dtype == torch.float8_e4m3fn:
            values, scale = quantize_128x128(torch.randn(weight.shape) * 0.05)
            weight.copy_(values)
            experts.get_parameter(f"{name}_scale_inv").copy_(scale)
        elif "scale" not in name:
            weight.copy_(torch.randn(weight.shape) * 0.05)
    return experts(lambda: arrived)[0]


def arriving(tokens: int) -> tuple[SimulatedLoad]:
    return (SimulatedLoad.even(tokens, 4, K, 12),)


def both_layouts(most: int, link: SimulatedLink | None = None) -> tuple[LoopbackContiguous, LoopbackMasked]:
    like = torch.zeros(1, D, dtype=torch.bfloat16)
    contiguous = LoopbackContiguous(arriving, most, D, K, Ops(), like, link)
    return contiguous, LoopbackMasked(arriving, most, 4 * most, D, Ops(), CPU, link=link)


def test_half_the_tokens_bring_half_the_rows() -> None:
    contiguous, masked = both_layouts(12)
    for tokens in (12, 6):
        arrived = contiguous.dispatch(*sent(tokens)).wait()
        assert counted(arrived) == counted(masked.dispatch(*sent(tokens)).wait()) == (tokens * 8 // 3,) * 3


@pytest.mark.parametrize("layout", [0, 1])
def test_a_link_changes_nothing_but_the_time(layout: int) -> None:
    """Each transfer is done no sooner than the model says, by its name and tokens, after the one before it."""
    asked = []

    def model(what: str, tokens: int) -> Delay:
        asked.append((what, tokens))
        return Delay({"dispatch": 0.02, "combine": 0.03}[what], 0.004, 0.006)

    link = SimulatedLink(model, CPU, num_sms=20)
    plain, slow = both_layouts(6)[layout], both_layouts(6, link)[layout]
    assert (plain.num_sms, slow.num_sms) == ((0, 20), (0, 0))[layout]
    tokens, out = sent(6), []
    for loopback in (plain, slow):
        start = time.perf_counter()
        arrived = loopback.dispatch(*tokens).wait()
        dispatched = time.perf_counter() - start
        y = arrived.x * 2
        back = loopback.combine(y, arrived.way_back, tokens[0]).wait()
        out.append((arrived.x, back.rows, back.plus))
        combined = time.perf_counter() - start
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))
    assert asked == [("dispatch", 6), ("combine", 6)]
    assert dispatched >= 0.03 and combined >= 0.03 + 0.04

    start = time.perf_counter()
    first, second = (slow.dispatch(*sent(count)) for count in (6, 3))
    started = time.perf_counter() - start
    first.wait()
    second.wait()
    assert started < 0.03 and time.perf_counter() - start >= 0.06, "two at once"
    assert Delay(0.02, 0.004, 0.006).busy == 0.01 and Delay(0.02, 0.004, 0.006).total == pytest.approx(0.03)
