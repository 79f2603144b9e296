"""The products around absorbed attention against their twins in float32, and on strided inputs."""

import pytest
import torch

pytest.importorskip("triton")

from kernels import ref
from kernels.absorb import absorb_query, project_values
from tests.test_gpu_gemm import DEVICE, DTYPES, close, normal, quantized
from tests.test_gpu_norm import tables

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "nope", "latent", "rope", "v"),
    [(0, 4, 128, 512, 64, 128), (1, 16, 128, 512, 64, 128), (2, 128, 128, 512, 64, 128), (2, 3, 24, 100, 16, 40),
     (5, 8, 32, 64, 16, 32), (3, 16, 128, 512, 64, 128), (77, 6, 128, 512, 64, 128), (256, 16, 128, 512, 64, 128),
     (1, 20, 192, 512, 64, 256), (4, 20, 192, 512, 64, 256), (200, 20, 192, 512, 64, 256)],  # GLM-4.7-Flash
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
