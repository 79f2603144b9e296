"""What Loopback lets arrive: the promised rows for each expert, in both layouts, that the experts can work on."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import ref
from kernels.backend import Ops
from kernels.fp8 import quantize_128x128
from model.config import ModelConfig
from model.moe import Experts
from parallel.dispatch import Contiguous, Masked
from parallel.loopback import Arrivals, LoopbackContiguous, LoopbackMasked, share_of_tokens

CPU, D, K = torch.device("cpu"), 256, 8
CONFIG = ModelConfig(
    vocab_size=8, hidden_size=D, intermediate_size=8, moe_intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=1, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8,
    num_experts_per_tok=K,
)  # fmt: skip


def test_the_deployments_rows() -> None:
    """EP72 decode: 256 tokens a rank, 288 slots: 512 rows for each of 4. EP32 prefill: 16,384 tokens, 9 slots."""
    assert Arrivals.even(256, 72, 8, 288) == Arrivals((512,) * 4, 512)
    skewed = Arrivals.even(256, 72, 8, 288, skew=1.3)
    assert skewed.counts == (666, 563, 461, 358)
    prefill = Arrivals.even(16384, 32, 8, 288, distinct=share_of_tokens(256, 32, 8, 8, 4))
    assert sum(prefill.counts) == 16384 * 8 and max(prefill.counts) - min(prefill.counts) <= 1
    assert prefill.tokens / 16384 == pytest.approx(6.6, abs=0.01)  # ranks that a token goes to, of 32


def test_the_share_of_tokens_is_what_sampling_gives() -> None:
    generator, tokens = torch.Generator().manual_seed(0), 40_000
    groups = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :4]  # 8 groups of 32, 4 chosen
    places = torch.rand(tokens, 128, generator=generator).argsort(1)[:, :8]
    chosen = groups.gather(1, places // 32) * 32 + places % 32
    here = (chosen < 8).any(1).float().mean().item()
    assert share_of_tokens(256, 32, 8, 8, 4) == pytest.approx(here, abs=0.01)
    assert share_of_tokens(8, 1, 8) == 1


@pytest.mark.parametrize(("skew", "counts"), [(1.0, (10, 10, 10)), (1.5, (15, 10, 5)), (2.0, (20, 10, 0))])
def test_skew_keeps_the_mean(skew: float, counts: tuple[int, ...]) -> None:
    assert Arrivals.even(15, 4, 2, 12, skew).counts == counts


def test_a_recordings_shares() -> None:
    arrivals = Arrivals.recorded([0.1, 0.0, 0.0333, 0.2], tokens=100, top_k=8, distinct=0.5)
    assert arrivals.counts == (80, 0, 27, 160) and arrivals.tokens == 160


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="slots % ranks must be 0, not 10 % 4 = 2"):
        Arrivals.even(1, 4, 1, 10)
    with pytest.raises(ValueError, match=r"skew is 2.5; it must be in \[1, 2\]"):
        Arrivals.even(1, 4, 1, 12, skew=2.5)
    with pytest.raises(ValueError, match="rows of an expert <= capacity must hold, not 20 <= 16"):
        LoopbackMasked(Arrivals((20, 1), 20), 16, D, Ops(), CPU)


def sent(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, D), torch.zeros(tokens, K, dtype=torch.int64), torch.ones(tokens, K)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("arrivals", [Arrivals((5, 0, 9), 9), Arrivals((40, 40, 40), 15), Arrivals((3,), 3)])
def test_contiguous(arrivals: Arrivals, alignment: int, fp8: bool) -> None:
    local, ops = len(arrivals.counts), replace(Ops(), alignment=alignment)
    if max(arrivals.counts) > arrivals.tokens:  # more copies of an expert than tokens: no such arrival is made
        arrivals = replace(arrivals, tokens=max(arrivals.counts))
    like = ref.quantize_1x128(torch.zeros(1, D)) if fp8 else torch.zeros(1, D)
    loopback = LoopbackContiguous(arrivals, D, K, ops, like)
    ids = loopback.experts
    assert ids.shape == (arrivals.tokens, K) and (ids >= 0).any(1).all()
    assert tuple((ids == e).sum().item() for e in range(local)) == arrivals.counts
    for row in ids.tolist():
        here = [e for e in row if e >= 0]
        assert len(set(here)) == len(here), "an expert twice"
    x, slots, weights = sent(7)
    arrived = loopback.dispatch(x, slots, weights).wait()
    match arrived:
        case Contiguous(rows, row_expert, scale=scale):
            assert len(rows) % alignment == 0 and (scale is not None) == fp8
            assert tuple((row_expert == e).sum().item() for e in range(local)) == arrivals.counts
    dtype = torch.float8_e4m3fn if fp8 else torch.float32
    y = run(Experts(CONFIG, local, ops, dtype, CPU), arrived)
    assert y[row_expert >= 0].isfinite().all()
    plus = torch.randn(7, D)
    back = loopback.combine(y, arrived, plus).wait()
    assert back.shape == (7, D) and back.isfinite().all()
    torch.testing.assert_close(back - loopback.combine(y, arrived).wait(), plus, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fp8", [False, True])
def test_masked(fp8: bool) -> None:
    loopback = LoopbackMasked(Arrivals((5, 0, 128), 128), 256, D, Ops(), CPU, fp8)
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
    assert loopback.combine(y, arrived, torch.zeros(3, D)).wait().shape == (3, D)


def run(experts: Experts, arrived: Contiguous | Masked) -> Tensor:
    for name, weight in experts.named_parameters():
        if weight.dtype == torch.float8_e4m3fn:
            values, scale = quantize_128x128(torch.randn(weight.shape) * 0.05)
            weight.copy_(values)
            experts.get_parameter(f"{name}_scale_inv").copy_(scale)
        elif "scale" not in name:
            weight.copy_(torch.randn(weight.shape) * 0.05)
    return experts(arrived)
