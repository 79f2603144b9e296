"""RMSNorm, its fused residual addition, rope and the cache write in Triton against their twins."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import norm, ref
from kernels.addends import Addends, summed
from kernels.route import ep_gather
from tests.test_addends import make

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def agree(out: Tensor, want: Tensor, turned: Tensor | None = None) -> None:
    """The twin rounds at the same two places; only the order of the sum differs, by one step of the format at each.
    `turned`: by rope, as two products' difference, where each is rounded to half a step of float32 of its own size."""
    step = 2**-6 if out.dtype == torch.bfloat16 else 1e-5
    assert out.shape == want.shape and out.dtype == want.dtype and out.is_contiguous()
    products = 2**-23 * turned.float().abs().max().item() if turned is not None and turned.numel() else 0.0
    torch.testing.assert_close(out, want, rtol=step, atol=max(step * 1e-2, products))
    if out.dtype == torch.bfloat16 and out.numel() > 1000:
        assert (out != want).float().mean() < 0.01  # and rarely that


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize(
    "shape", [(0, 64), (1, 8192), (333, 7168), (5, 7, 1536), (1000, 512), (3, 100), (4097, 16), (9, 768)]
)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape, device=DEVICE, dtype=dtype) * 3
    weight = torch.randn(shape[-1], device=DEVICE, dtype=dtype)
    agree(norm.rms_norm(x, weight, 1e-6), ref.rms_norm(x, weight, 1e-6))
    before = residual.clone()
    normed, total = norm.add_rms_norm(x, residual, weight, 1e-6)
    want_normed, want_total = ref.add_rms_norm(x, residual, weight, 1e-6)
    agree(normed, want_normed)
    assert torch.equal(total, want_total) and torch.equal(residual, before)


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("kind", ["indexed, weighted", "indexed", "weighted", "rows"])
@pytest.mark.parametrize(
    ("tokens", "dim", "top_k"),
    [(0, 2048, 6), (1, 2048, 6), (33, 2048, 6), (1, 7168, 8), (130, 7168, 8), (9, 7168, 1), (37, 256, 6), (5, 128, 1)],
)
def test_the_norm_sums_addends_as_a_kernel_of_its_own_does(
    tokens: int, dim: int, top_k: int, kind: str, plus: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, quantised or not, bare or not."""
    given = make(tokens, top_k, dtype, "indexed" in kind, "weighted" in kind, plus, dim, DEVICE)
    x, weight = torch.randn(tokens, dim, device=DEVICE, dtype=dtype), torch.randn(dim, device=DEVICE, dtype=dtype)
    delta = summed(given, ep_gather)
    want, total = norm.add_rms_norm(x, delta, weight, 1e-6)
    assert total.isfinite().all() and torch.equal(total, x + delta)
    for got, wanted in zip(norm.add_rms_norm(x, given, weight, 1e-6), (want, total), strict=True):
        assert torch.equal(got, wanted)
    for bare in (True, False):
        out, wanted = (norm.add_rms_norm_quant(x, term, weight, 1e-6, bare) for term in (given, delta))
        assert (out[0] is not None) == (wanted[0] is not None) == bare
        for a, b in zip(out[1 - bare :], wanted[1 - bare :], strict=True):
            assert a.dtype == b.dtype and torch.equal(a.float(), b.float())
    twin = ref.add_rms_norm(x, given, weight, 1e-6)[1]
    step = 2**-6 if dtype == torch.bfloat16 else 1e-5  # the twin adds `plus` last
    torch.testing.assert_close(total, twin, rtol=step, atol=4 * step)


def test_addends_with_no_rows_are_zero_or_plus(dtype: torch.dtype) -> None:
    """As on a rank none of whose experts got a token."""
    x, plus = torch.randn(2, 5, 2048, device=DEVICE, dtype=dtype)
    nowhere, weights = torch.full((5, 6), -1, device=DEVICE), torch.rand(5, 6, device=DEVICE)
    weight = torch.ones(2048, device=DEVICE, dtype=dtype)
    for given, want in ((plus, x + plus), (None, x)):
        delta = Addends(x.new_empty(0, 2048), nowhere, weights, given)
        assert torch.equal(norm.add_rms_norm(x, delta, weight, 1e-6)[1], want)


def quantised(normed: Tensor, values: Tensor, scales: Tensor) -> None:
    """Values and scales of exactly what was returned as normed: the next fp8 step at most, and rarely that."""
    want_values, want_scales = ref.quantize_1x128(normed)
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert values.shape == normed.shape and values.is_contiguous()
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
    values, want = values.float(), want_values.float()
    assert ((values - want).abs() <= want.abs() / 7.9 + 2**-8).all()
    assert not values.numel() or (values == want).float().mean() > 0.999


@pytest.mark.parametrize(
    "shape", [(0, 128), (1, 8192), (333, 7168), (5, 7, 1536), (1000, 512), (4097, 128), (9, 384), (9, 768)]
)
def test_rms_norm_quant(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape, device=DEVICE, dtype=dtype) * 3
    x *= torch.rand(*shape[:-1], 1, device=DEVICE).mul(6).sub(3).exp().to(dtype)
    weight = torch.randn(shape[-1], device=DEVICE, dtype=dtype)
    x[-1:], residual[-1:] = 0, 0  # the smallest scale
    normed, values, scales = norm.rms_norm_quant(x, weight, 1e-6)
    agree(normed, ref.rms_norm(x, weight, 1e-6))
    quantised(normed, values, scales)
    before = residual.clone()
    normed, values, scales, total = norm.add_rms_norm_quant(x, residual, weight, 1e-6)
    agree(normed, ref.add_rms_norm(x, residual, weight, 1e-6)[0])
    quantised(normed, values, scales)
    assert torch.equal(total, x + residual) and torch.equal(residual, before)


def test_rms_norm_quant_of_a_slice(dtype: torch.dtype) -> None:
    wide = torch.full((77, 2112), float("nan"), device=DEVICE, dtype=dtype)
    wide[:, :1536] = torch.randn(77, 1536, device=DEVICE, dtype=dtype)
    weight = torch.randn(1536, device=DEVICE, dtype=dtype)
    normed, values, scales = norm.rms_norm_quant(wide[:, :1536], weight, 1e-6)
    agree(normed, ref.rms_norm(wide[:, :1536], weight, 1e-6))
    quantised(normed, values, scales)


def test_rms_norm_of_a_slice(dtype: torch.dtype) -> None:
    """The latent is a slice of kv_a_proj's output; what lies beside it is never read."""
    wide = torch.full((77, 576), float("nan"), device=DEVICE, dtype=dtype)
    wide[:, :512] = torch.randn(77, 512, device=DEVICE, dtype=dtype)
    weight = torch.randn(512, device=DEVICE, dtype=dtype)
    agree(norm.rms_norm(wide[:, :512], weight, 1e-6), ref.rms_norm(wide[:, :512], weight, 1e-6))


def tables(length: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(length, dim // 2, device=DEVICE) * 100
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("heads", [1, 3, 16, 20, 128])
@pytest.mark.parametrize(
    ("tokens", "dim", "beside"), [(0, 64, 128), (1, 64, 128), (333, 64, 128), (50, 16, 32), (9, 24, 5), (7, 64, 192)]
)
def test_rope(tokens: int, dim: int, beside: int, heads: int, dtype: torch.dtype) -> None:
    """The query is a slice of something wider; what lies beside the rotated columns is not touched."""
    wide = torch.randn(tokens + 2, heads, beside + dim + 8, device=DEVICE).to(dtype)
    q, positions = wide[1:-1, :, 8:], torch.randint(1000, (tokens,), device=DEVICE)
    args, before = (*tables(1000, dim), positions, dim), wide.clone()
    out, want = torch.full((tokens, heads, 512 + dim), float("nan"), device=DEVICE, dtype=dtype), q.clone()
    assert norm.rope_into(q, out, *args) is None
    ref.rope_query(want, *args)
    assert out[..., :512].isnan().all() and torch.equal(wide, before)
    agree(out[..., 512:].contiguous(), want[..., beside:].contiguous(), turned=want)
    assert norm.rope_query(q, *args) is None
    torch.testing.assert_close(q[..., beside:], out[..., 512:], rtol=2**-22, atol=2**-22)  # another compilation
    q[..., beside:] = before[1:-1, :, 8 + beside :]
    assert torch.equal(wide, before)


@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (64, 16), (100, 24)])
@pytest.mark.parametrize(("tokens", "padding"), [(0, 0), (1, 0), (333, 50), (5, 5)])
def test_norm_rope_write(tokens: int, padding: int, latent: int, rope: int, dtype: torch.dtype) -> None:
    """kv is a slice of something wider; padding goes to the null page; no other row of the pages is touched."""
    width = latent + rope
    wide = torch.full((tokens, width + 72), float("nan"), device=DEVICE, dtype=dtype)
    kv = wide[:, 8 : 8 + width]
    kv.copy_(torch.randn(tokens, width, device=DEVICE) * 3)
    weight = torch.randn(latent, device=DEVICE, dtype=dtype)
    positions = torch.randint(1000, (tokens,), device=DEVICE)
    rows = torch.randperm(8 * 64, device=DEVICE)[:tokens] + 64
    rows[torch.randperm(tokens, device=DEVICE)[:padding]] = 0
    out, want = torch.full((2, 9, 64, width), float("nan"), device=DEVICE, dtype=dtype)
    args = (kv, weight, 1e-6, *tables(1000, rope), positions, rows)
    assert norm.norm_rope_write(*args, out) is None
    ref.norm_rope_write(*args, want)
    written = out.flatten(0, 1).isfinite().all(-1)
    assert sorted({*rows.tolist()}) == written.nonzero().flatten().tolist()
    assert out.flatten(0, 1)[~written].isnan().all()
    agree(out[1:].nan_to_num(0.0), want[1:].nan_to_num(0.0), turned=kv)
