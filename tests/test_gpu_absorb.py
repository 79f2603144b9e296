"""The products around absorbed attention against their twins in float32, and on strided inputs."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import ref
from kernels.absorb import absorb_query, project_values, write_and_absorb
from kernels.linear import linear
from kernels.mla_decode import decode_plan, mla_decode
from kernels.norm import norm_rope_write
from tests.test_gpu_gemm import DEVICE, DTYPES, close, normal, quantized
from tests.test_gpu_norm import tables

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "nope", "latent", "rope", "v"),
    [(0, 4, 128, 512, 64, 128), (1, 16, 128, 512, 64, 128), (2, 128, 128, 512, 64, 128), (2, 3, 24, 100, 16, 40),
     (5, 8, 32, 64, 16, 32), (3, 16, 128, 512, 64, 128), (77, 6, 128, 512, 64, 128), (256, 16, 128, 512, 64, 128),
     (33, 16, 128, 512, 64, 128), (64, 128, 128, 512, 64, 128), (65, 128, 128, 512, 64, 128),
     (300, 72, 128, 512, 64, 128), (513, 16, 128, 512, 64, 128),
     *((batch, 20, 192, 512, 64, 256) for batch in (1, 4, 200, 500))],  # GLM-4.7-Flash
)  # fmt: skip
def test_absorb(batch: int, heads: int, nope: int, latent: int, rope: int, v: int, dtype: torch.dtype) -> None:
    """The query is a slice of a wider projection, and both weights are parts of kv_b_proj's."""
    q = normal(batch, heads, nope + rope + 8, dtype=dtype)[..., 8:]
    w_uk, w_uv = normal(heads, nope + v, latent, dtype=dtype).split((nope, v), 1)
    positions, before = torch.randint(1000, (batch,), device=DEVICE), q.clone()
    cos_sin = tables(1000, rope)
    out = absorb_query(q, w_uk, *cos_sin, positions)
    assert out.dtype == dtype and out.is_contiguous() and torch.equal(q, before)
    want = ref.absorb_query(q.float(), w_uk.float(), *cos_sin, positions)
    close(out[..., :latent], want[..., :latent])
    close(out[..., latent:], want[..., latent:])
    attended = normal(batch, heads, latent, dtype=dtype)
    values = project_values(attended, w_uv)
    close(values, ref.project_values(attended.float(), w_uv.float()))
    quantized(*project_values(attended, w_uv, quantize=True), ref.quantize_1x128(values.flatten(1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads"), [(1, 16), (2, 16), (5, 16), (33, 16), (128, 16), (64, 128), (65, 128)])
def test_the_cache_is_written_beside_the_query_in_a_graph(batch: int, heads: int, dtype: torch.dtype) -> None:
    """The product before it, and what reads both results behind it, are of the same graph, replayed on other inputs."""
    width, latent, rope = heads * 192, 512, 64
    x, weight = normal(batch, 256, dtype=dtype), normal(width + latent + rope, 256, dtype=dtype) / 16
    w_uk, norm_weight = normal(heads, 128, latent, dtype=dtype), normal(latent, dtype=dtype)
    rows = torch.randperm(10 * 64, device=DEVICE)[:batch]
    positions, cos_sin = torch.randint(1000, (batch,), device=DEVICE), tables(1000, rope)
    pages = torch.zeros(10, 64, latent + rope, device=DEVICE, dtype=dtype)

    def step() -> tuple[Tensor, Tensor]:
        q, kv = linear(x, weight).split((width, latent + rope), 1)
        q = q.view(batch, heads, 192)
        out = write_and_absorb(q, w_uk, kv, norm_weight, 1e-6, *cos_sin, positions, rows, pages)
        return out + 0, pages + 0

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(50):
        x.normal_()
        pages.zero_()
        graph.replay()
        out, written = (t.clone() for t in replayed)
        pages.zero_()
        q, kv = linear(x, weight).split((width, latent + rope), 1)
        torch.cuda.synchronize()
        want = absorb_query(q.view(batch, heads, 192), w_uk, *cos_sin, positions)
        torch.cuda.synchronize()
        norm_rope_write(kv, norm_weight, 1e-6, *cos_sin, positions, rows, pages)
        assert torch.equal(out, want) and torch.equal(written, pages) and written.any()


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("lens", [[700], [1, 64], [65, 128, 3000, 1, 640], [1088] * 40, [5, 4100] * 60])
def test_attention_may_start_before_the_query_is_there(lens: list[int], beside: bool) -> None:
    """With the step's plan it reads old pages early. Each replay has another query, and another key in the last row."""
    heads, latent, rope = 16, 512, 64
    batch, width, dtype = len(lens), -(-max(lens) // 64), torch.bfloat16
    x, weight = normal(batch, 256, dtype=dtype), normal(heads * 192 + latent + rope, 256, dtype=dtype) / 16
    w_uk, norm_weight = normal(heads, 128, latent, dtype=dtype), normal(latent, dtype=dtype)
    pages = torch.randn(batch * width, 64, latent + rope, device=DEVICE).to(dtype)
    table = torch.randperm(batch * width, device=DEVICE).int().view(batch, width)
    kv_lens = torch.tensor(lens, device=DEVICE).int()
    positions = kv_lens.long() - 1
    rows = table.gather(1, positions[:, None] // 64)[:, 0].long() * 64 + positions % 64
    rotation, plan = (*tables(5000, rope), positions), decode_plan(kv_lens, 1, heads)

    def projected() -> tuple[Tensor, Tensor]:
        q, kv = linear(x, weight).split((heads * 192, latent + rope), 1)
        return q.view(batch, heads, 192), kv

    def step() -> Tensor:
        q, kv = projected()
        if beside:
            q = write_and_absorb(q, w_uk, kv, norm_weight, 1e-6, *rotation, rows, pages, plan)
        else:
            norm_rope_write(kv, norm_weight, 1e-6, *rotation, rows, pages)
            q = absorb_query(q, w_uk, *rotation, plan)
        return mla_decode(q, pages, table, kv_lens, 0.05, latent, plan)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(30):
        x.normal_()
        graph.replay()
        out = replayed.clone()
        q, kv = projected()
        norm_rope_write(kv, norm_weight, 1e-6, *rotation, rows, pages)
        torch.cuda.synchronize()
        q = absorb_query(q, w_uk, *rotation)
        torch.cuda.synchronize()
        assert torch.equal(out, mla_decode(q, pages, table, kv_lens, 0.05, latent)) and out.isfinite().all()
