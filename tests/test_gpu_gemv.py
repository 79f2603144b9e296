"""The products for few tokens against their twins in float32. Unchosen experts are NaN."""

import pytest
import torch

pytest.importorskip("triton")

from kernels import ref
from kernels.gemv import gemm_of_copies, linear_of_few, swiglu_of_copies
from kernels.linear import linear_float32
from kernels.route import ep_gather
from tests.test_gpu_gemm import DEVICE, DTYPES, close, normal

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "width"),
    [
        (1, 6, 64, 2048, 1408),
        (4, 8, 16, 7168, 2048),
        (3, 1, 2, 72, 40),
        (0, 4, 4, 64, 64),
        (5, 3, 9, 1000, 24),
        (2, 4, 64, 2048, 1536),
    ],  # GLM-4.7-Flash
)
def test_copies(tokens: int, top_k: int, experts: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    slots = torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :top_k]
    slots = slots.where(torch.rand(slots.shape, device=DEVICE) < 0.8, -1)
    x, gate_up, down = (
        normal(*s, dtype=dtype) for s in ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
    )
    weights, plus = torch.rand(tokens, top_k, device=DEVICE), normal(tokens, hidden, dtype=dtype)
    for expert in set(range(experts)) - set(slots.flatten().tolist()):
        gate_up[expert], down[expert] = float("nan"), float("nan")

    h = swiglu_of_copies(x, gate_up, slots)
    assert h.dtype == dtype and (h[slots.flatten() < 0] == 0).all()
    close(h, ref.swiglu_of_copies(x.float(), gate_up.float().nan_to_num(), slots))
    y = gemm_of_copies(h, down, slots)
    close(y, ref.gemm_of_copies(h.float(), down.float().nan_to_num(), slots))
    close(ep_gather(y, None, weights, plus), ref.ep_gather(y.float(), None, weights, plus.float()))
    assert torch.equal(y, gemm_of_copies(h, down, slots)), "other bits in another run"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "width"), [(1, 3648, 2048), (1, 1344, 2048), (2, 64, 2048), (3, 33, 1000), (4, 256, 7168)]
)
def test_linear_of_few(tokens: int, outputs: int, width: int, dtype: torch.dtype) -> None:
    x, weight = normal(tokens, width + 8, dtype=dtype)[:, :width], normal(outputs, width, dtype=dtype)
    close(linear_of_few(x, weight), ref.linear_float32(x, weight))
    out = linear_of_few(x, weight, torch.float32)
    assert out.dtype == torch.float32
    close(out, ref.linear_float32(x, weight), rel=1e-4)
    close(linear_float32(x, weight), ref.linear_float32(x, weight), rel=1e-4)
    room = torch.full((tokens + 1, outputs), torch.nan, device=x.device)
    linear_float32(x, weight, room[:tokens])
    assert torch.equal(room[:tokens], out if dtype == torch.bfloat16 else linear_float32(x, weight))
    assert room[tokens].isnan().all()
