"""The Triton page copies equal their twins bit for bit, and touch no other page."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import ref
from kernels.pages import pack_pages, unpack_pages

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    """Any bytes, NaNs and infinities among them."""
    return torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), device=DEVICE, dtype=torch.uint8).view(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("layers", "num_pages", "width", "count"),
    [(1, 2, 576, 1), (5, 300, 576, 299), (61, 9, 576, 4), (3, 40, 80, 17), (2, 9, 33, 8), (3, 9, 80, 0)],
)
def test_pack_and_unpack(layers: int, num_pages: int, width: int, count: int, dtype: torch.dtype) -> None:
    pool = noise(layers, num_pages, 64, width, dtype=dtype)
    mine, theirs = (torch.randperm(num_pages, device=DEVICE)[:count] for _ in range(2))
    before = bits(pool).clone()
    packed = noise(layers, count, 64, width, dtype=dtype)
    want = bits(packed).clone()
    ref.pack_pages(pool.view(torch.uint8), mine, want)
    assert pack_pages(pool, mine, packed) is None
    assert torch.equal(bits(packed), want) and torch.equal(bits(pool), before)
    out = noise(layers, num_pages, 64, width, dtype=dtype)
    expected = bits(out).clone()
    ref.unpack_pages(want, expected, theirs)
    assert unpack_pages(packed, out, theirs) is None
    assert torch.equal(bits(out), expected)
