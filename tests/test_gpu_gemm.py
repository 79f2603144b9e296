"""GEMMs and quantizers of Triton and deep_gemm against torch on the same inputs. Memory not to be read is NaN."""

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import ref
from kernels.fp8 import quantize_128x128
from kernels.gemm import gemm_fp8
from kernels.grouped_gemm import (
    grouped_gemm_contiguous,
    grouped_gemm_contiguous_fp8,
    grouped_gemm_masked,
    grouped_gemm_masked_fp8,
    swiglu_masked,
)
from kernels.groups import Groups
from kernels.linear import ffn_beside, linear_float32
from kernels.quant import quantize_1x128, silu_mul, silu_mul_masked, silu_mul_quant, silu_mul_quant_masked

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float32]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, so that a scale applied to the wrong row shows."""
    x = torch.randn(*shape, device=DEVICE)
    return (x * torch.rand(*shape[:-1], 1, device=DEVICE).mul(6).sub(3).exp()).to(dtype)


def close(out: Tensor, want: Tensor, rel: float = 1e-2) -> None:
    assert out.shape == want.shape
    if want.numel():
        out, want = out.float(), want.float()
        error = ((out - want).norm() / want.norm()).item()
        assert error < rel, f"{error=}"
        row_size = want.square().mean(-1, keepdim=True).sqrt()
        assert ((out - want).abs() <= 2 * rel * (want.abs() + 2 * row_size)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "d"), [(0, 64, 256), (1, 64, 2048), (17, 256, 7168), (64, 100, 300), (65, 64, 512)])
def test_linear_float32(m: int, n: int, d: int, dtype: torch.dtype) -> None:
    """Rows of something wider; only the order of the sums may differ from float32's."""
    x, weight = normal(m, d + 8, dtype=dtype)[:, :d], normal(n, d, dtype=dtype)
    out = linear_float32(x, weight)
    assert out.dtype == torch.float32
    close(out, ref.linear_float32(x, weight), rel=1e-4)
    room = torch.full((m + 1, n), torch.nan, device=DEVICE)
    again = linear_float32(x, weight, out=room[:m])
    assert torch.equal(again, out) and torch.equal(room[:m], out) and room[m].isnan().all()


def grouped(counts: list[int], tail: int) -> tuple[Groups, Tensor]:
    """Groups of so many rows, aligned to 128, with `tail` rows of padding behind; and which rows are real."""
    ends, rows = [], 0
    for count in counts:
        ends.append(rows + count)
        rows += -(-count // 128) * 128
    groups = Groups(torch.tensor(ends, dtype=torch.int32, device=DEVICE), 128)
    return groups, groups.of_rows(rows + tail) >= 0


@pytest.mark.parametrize(
    ("m", "n", "d"),
    [(1, 128, 128), (17, 200, 272), (64, 576, 7168), (256, 2112, 7168), (300, 4096, 512), (0, 128, 128)],
)
def test_dense_fp8(m: int, n: int, d: int) -> None:
    (x, xs), (w, ws) = quantize_1x128(normal(m, d)), quantize_128x128(normal(n, d))
    close(gemm_fp8(x, xs, w, ws), ref.gemm_fp8(x, xs, w, ws))


CONTIGUOUS = [
    ([3, 0, 200, 128], 0, 192, 256),
    ([0, 0, 1], 256, 64, 128),
    ([300] * 9, 0, 512, 1024),
    ([0, 0], 0, 64, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "tail", "n", "d"), CONTIGUOUS)
def test_contiguous(counts: list[int], tail: int, n: int, d: int, dtype: torch.dtype) -> None:
    groups, real = grouped(counts, tail)
    x, weight = normal(len(real), d, dtype=dtype), normal(len(counts), n, d, dtype=dtype)
    x[~real] = float("nan")
    out = grouped_gemm_contiguous(x, weight, groups)
    assert out.dtype == dtype
    close(out[real], ref.grouped_gemm_contiguous(x.float(), weight.float(), groups)[real])


@pytest.mark.parametrize(("counts", "tail", "n", "d"), [*CONTIGUOUS, ([5, 130], 128, 200, 272)])
def test_contiguous_fp8(counts: list[int], tail: int, n: int, d: int) -> None:
    groups, real = grouped(counts, tail)
    (x, xs), (w, ws) = quantize_1x128(normal(len(real), d)), quantize_128x128(normal(len(counts), n, d))
    want = ref.grouped_gemm_contiguous_fp8(x, xs, w, ws, groups)
    x.view(torch.uint8)[~real] = 0x7F
    xs[~real] = float("nan")
    close(grouped_gemm_contiguous_fp8(x, xs, w, ws, groups)[real], want[real])


MASKED = [([0, 5, 130, 200], 200, 192, 256), ([64], 64, 64, 128), ([0, 0, 0], 128, 64, 64), ([512] * 4, 512, 1024, 512)]


def valid(counts: Tensor, room: int) -> Tensor:
    return torch.arange(room, device=DEVICE) < counts[:, None]  # [L, R]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "room", "n", "d"), [*MASKED, ([], 8, 64, 64), ([0], 0, 64, 64)])
def test_masked(sizes: list[int], room: int, n: int, d: int, dtype: torch.dtype) -> None:
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    x, weight = normal(len(sizes), room, d, dtype=dtype), normal(len(sizes), n, d, dtype=dtype)
    real = valid(counts, room)
    x[~real] = float("nan")
    out = grouped_gemm_masked(x, weight, counts)
    assert out.dtype == dtype
    close(out[real], ref.grouped_gemm_masked(x.float(), weight.float(), counts)[real])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "room", "width", "d"),
    [
        ([3, 0, 17, 64], 64, 1408, 2048),
        ([0, 128, 1, 16], 128, 200, 264),  # widths that no tile divides
        ([5, 7, 0], 7, 72, 72),  # a room that no tile divides: the next expert's rows are in the tile
        ([0, 0], 128, 64, 64),
        ([0, 130, 5], 200, 192, 256),  # large rooms
        ([], 8, 64, 64),
        ([0], 0, 64, 64),
    ],
)
def test_masked_swiglu(sizes: list[int], room: int, width: int, d: int, dtype: torch.dtype) -> None:
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    real = valid(counts, room)
    x, gate_up, down = (
        (normal(*shape) * size).to(dtype)  # small enough for float16
        for shape, size in (
            ((len(sizes), room, d), 1),
            ((len(sizes), 2 * width, d), d**-0.5 / 30),
            ((len(sizes), d, width), width**-0.5),
        )
    )
    x[~real] = float("nan")
    hidden = swiglu_masked(x, gate_up, counts)
    assert hidden.dtype == dtype
    close(hidden[real], ref.swiglu_masked(x.float(), gate_up.float(), counts)[real])
    hidden[~real] = float("nan")
    out = grouped_gemm_masked(hidden, down, counts)
    close(out[real], ref.grouped_gemm_masked(hidden.float(), down.float(), counts)[real])
    assert torch.equal(hidden[real], swiglu_masked(x, gate_up, counts)[real]), "other bits in another run"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 17, 32, 33, 100, 128, 129])
@pytest.mark.parametrize(("width", "d"), [(2816, 2048), (200, 264)])
def test_ffn_beside(tokens: int, width: int, d: int, dtype: torch.dtype) -> None:
    """Between NaN, which a row beyond the last must not touch."""
    around = torch.full((tokens + 80, d), torch.nan, device=DEVICE, dtype=dtype)
    x = around[40 : 40 + tokens].copy_(normal(tokens, d))
    gate_up, down = ((normal(*shape) * shape[1] ** -0.5).to(dtype) for shape in ((2 * width, d), (d, width)))
    out = ffn_beside(x, gate_up, down)
    assert out.dtype == dtype
    close(out, ref.ffn_beside(x.float(), gate_up.float(), down.float()), rel=2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(out, ffn_beside(x, gate_up, down)), "other bits in another run"


@pytest.mark.parametrize(("sizes", "room", "n", "d"), [*MASKED, ([3, 140], 144, 200, 272)])
def test_masked_fp8(sizes: list[int], room: int, n: int, d: int) -> None:
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    real = valid(counts, room)
    (x, xs), (w, ws) = quantize_1x128(normal(len(sizes), room, d)), quantize_128x128(normal(len(sizes), n, d))
    want = ref.grouped_gemm_masked_fp8(x, xs, w, ws, counts)
    x.view(torch.uint8)[~real] = 0x7F
    xs[~real] = float("nan")
    close(grouped_gemm_masked_fp8(x, xs, w, ws, counts)[real], want[real])


def test_masked_graph_follows_the_counts() -> None:
    """One captured graph, replayed with other counts, computes exactly the rows that are real now."""
    counts = torch.tensor([7, 0, 250], dtype=torch.int32, device=DEVICE)
    (x, xs), (w, ws) = quantize_1x128(normal(3, 256, 256)), quantize_128x128(normal(3, 256, 256))

    def step() -> Tensor:
        hidden, scales = silu_mul_quant_masked(grouped_gemm_masked_fp8(x, xs, w, ws, counts), counts)
        return grouped_gemm_masked_fp8(hidden, scales, w[..., :128].contiguous(), ws[..., :1].contiguous(), counts)

    step()  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for sizes in ([7, 0, 250], [256, 256, 256], [0, 0, 0], [0, 129, 1]):
        counts.copy_(torch.tensor(sizes, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        real = valid(counts, 256)
        assert torch.equal(out[real], step()[real])
        assert not out[real].isnan().any()
        for e, size in enumerate(sizes):  # whole blocks past the count stay untouched
            assert out[e, -(-size // 128) * 128 :].isnan().all()


def quantized(values: Tensor, scales: Tensor, want: tuple[Tensor, Tensor]) -> None:
    """Scales to float32 rounding; values on the next fp8 step at most, and nearly all the very same."""
    assert values.dtype == torch.float8_e4m3fn and values.shape == want[0].shape
    torch.testing.assert_close(scales, want[1], rtol=1e-5, atol=0)
    values, nearest = values.float(), want[0].float()
    assert ((values - nearest).abs() <= nearest.abs() / 7.9 + 2**-8).all()
    assert not values.numel() or (values == nearest).float().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 256), (3, 100, 7168), (33, 200), (0, 256), (2, 0, 128)])
def test_quantize_1x128(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    if x.numel():
        x.view(-1, shape[-1])[-1] = 0  # the smallest scale
    quantized(*quantize_1x128(x), ref.quantize_1x128(x))


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 128), (2, 200, 272)])
def test_quantize_128x128(shape: tuple[int, ...]) -> None:
    w = normal(*shape)
    values, scales = quantize_128x128(w)
    assert values.shape == w.shape and values.is_contiguous()
    assert scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    wide = scales.repeat_interleave(128, -2)[..., : shape[-2], :].repeat_interleave(128, -1)[..., : shape[-1]]
    assert ((ref.dequantize_128x128(values, scales) - w).abs() <= w.abs() / 15.9 + wide * 2**-9).all()
    last = w[..., -(shape[-2] % 128 or 128) :, -(shape[-1] % 128 or 128) :]
    torch.testing.assert_close(scales[..., -1, -1], last.abs().amax((-2, -1)) / 448)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (100, 4096), (3, 7, 400), (0, 256)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    close(silu_mul(x), ref.silu_mul(x.float()), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 2048, 200])
def test_silu_mul_skips_padding(width: int, dtype: torch.dtype) -> None:
    groups, real = grouped([3, 0, 129], 128)
    x = torch.randn(len(real), 2 * width, device=DEVICE).to(dtype)
    want = silu_mul(x)
    out = silu_mul(x.masked_fill(~real[:, None], float("nan")), groups)
    assert out.dtype == dtype and out.shape == want.shape and torch.equal(out[real], want[real])
    assert silu_mul(x[:0], groups).shape == (0, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 2048, 200])
@pytest.mark.parametrize(("sizes", "room"), [([0, 5, 700], 700), ([1], 1), ([0], 0), ([], 4), ([600, 33], 600)])
def test_silu_mul_masked(sizes: list[int], room: int, width: int, dtype: torch.dtype) -> None:
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    real = valid(counts, room)
    x = torch.randn(len(sizes), room, 2 * width, device=DEVICE).to(dtype)
    want = silu_mul(x)
    x[~real] = float("nan")
    out = silu_mul_masked(x, counts)
    assert out.dtype == dtype and out.shape == want.shape and torch.equal(out[real], want[real])
    close(out[real], ref.silu_mul(x[real].float()), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("width", [128, 2048, 200])
def test_silu_mul_quant(width: int) -> None:
    groups, real = grouped([3, 0, 129], 128)
    x = torch.randn(len(real), 2 * width, device=DEVICE).bfloat16()
    quantized(*silu_mul_quant(x), ref.silu_mul_quant(x))
    values, scales = silu_mul_quant(x.masked_fill(~real[:, None], float("nan")), groups)
    quantized(values[real], scales[real], ref.silu_mul_quant(x[real]))
    assert silu_mul_quant(x[:0])[0].shape == (0, width)


@pytest.mark.parametrize("width", [128, 2048, 200])
@pytest.mark.parametrize(("sizes", "room"), [([0, 5, 700], 700), ([1], 1), ([0], 0), ([], 4)])
def test_silu_mul_quant_masked(sizes: list[int], room: int, width: int) -> None:
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    real = valid(counts, room)
    x = torch.randn(len(sizes), room, 2 * width, device=DEVICE).bfloat16()
    x[~real] = float("nan")
    values, scales = silu_mul_quant_masked(x, counts)
    quantized(values[real], scales[real], ref.silu_mul_quant(x[real]))


@pytest.fixture(scope="module")
def vendor() -> ModuleType:
    """deep_gemm behind our contracts."""
    pytest.importorskip("deep_gemm")
    return importlib.import_module("kernels.deep_gemm_ops")


@pytest.mark.parametrize("m", [0, 1, 17, 256, 300])
@pytest.mark.parametrize(("n", "d"), [(128, 128), (576, 512), (2112, 7168), (1024, 256)])
def test_deep_gemm_dense_fp8(vendor: ModuleType, m: int, n: int, d: int) -> None:
    (x, xs), (w, ws) = quantize_1x128(normal(m, d)), quantize_128x128(normal(n, d))
    out = vendor.gemm_fp8(x, xs, w, ws)
    assert out.dtype == torch.bfloat16
    close(out, ref.gemm_fp8(x, xs, w, ws))


@pytest.mark.parametrize(
    ("counts", "tail", "n", "d"),
    [([3, 0, 200, 128], 0, 192, 256), ([0, 0, 1], 256, 512, 128), ([300] * 9, 0, 512, 1024), ([0, 0], 0, 256, 256)],
)
def test_deep_gemm_contiguous_fp8(vendor: ModuleType, counts: list[int], tail: int, n: int, d: int) -> None:
    groups, real = grouped(counts, tail)
    (x, xs), (w, ws) = quantize_1x128(normal(len(real), d)), quantize_128x128(normal(len(counts), n, d))
    want = ref.grouped_gemm_contiguous_fp8(x, xs, w, ws, groups)
    x.view(torch.uint8)[~real] = 0x7F
    xs[~real] = float("nan")
    close(vendor.grouped_gemm_contiguous_fp8(x, xs, w, ws, groups)[real], want[real])


@pytest.mark.parametrize(
    ("sizes", "room", "n", "d"),
    [
        ([0, 5, 130, 200], 256, 192, 256),
        ([64], 128, 256, 128),
        ([0, 0, 0], 128, 256, 256),
        ([512] * 4, 512, 1024, 512),
        ([1, 128, 3, 70] * 8, 128, 512, 512),
        ([0], 0, 128, 128),
    ],
)
def test_deep_gemm_masked(vendor: ModuleType, sizes: list[int], room: int, n: int, d: int) -> None:
    """fp8 and bf16: every real row, also next to an expert whose last block is not full."""
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    real = valid(counts, room)
    x, w = normal(len(sizes), room, d, dtype=torch.bfloat16), normal(len(sizes), n, d, dtype=torch.bfloat16)
    want = ref.grouped_gemm_masked(x.float(), w.float(), counts)
    close(vendor.grouped_gemm_masked(x, w, counts)[real], want[real])
    (x, xs), (w, ws) = quantize_1x128(x), quantize_128x128(w)
    want = ref.grouped_gemm_masked_fp8(x, xs, w, ws, counts)
    x.view(torch.uint8)[~real] = 0x7F
    xs[~real] = float("nan")
    close(vendor.grouped_gemm_masked_fp8(x, xs, w, ws, counts)[real], want[real])


def test_deep_gemm_masked_needs_whole_blocks(vendor: ModuleType) -> None:
    x, counts = torch.zeros(2, 144, 128, device=DEVICE).bfloat16(), torch.ones(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="an expert's room must be a multiple of 128 rows: 144 % 128 = 16"):
        vendor.grouped_gemm_masked(x, x[:, :128], counts)
