"""Time the Triton GEMMs against deep_gemm at DeepSeek-V3's shapes, and the memory-bound kernels around the experts.

Times are medians of CUDA graph replays, so they contain no host time. A graph calls a GEMM on several sets of weights
in turn, which together are larger than L2. Both sides get operands in their best layout (deep_gemm column-major
scales), and the two results are compared.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from kernels.gate import gate_topk
from kernels.gemm import gemm_fp8
from kernels.grouped_gemm import grouped_gemm_contiguous_fp8, grouped_gemm_masked_fp8
from kernels.groups import Groups
from kernels.quant import quantize_1x128, silu_mul_quant, silu_mul_quant_masked
from kernels.route import ep_gather, ep_scatter, ep_scatter_masked
from scripts.bench.kernels.table import report

try:
    import deep_gemm
except ImportError:
    deep_gemm = None

DENSE = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)]
EXPERT = [(4096, 7168), (7168, 2048)]  # gate and up, down


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weights(*shape: int) -> tuple[Tensor, Tensor]:
    """Return random fp8 values and block scales. Not quantised from real values, because this is faster."""
    values = torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return values, torch.rand(blocks, device="cuda") * 0.02 + 0.01


def median_us(calls: list[Callable[[], object]]) -> float:
    """Return the median microseconds per call, over graph replays of all calls in turn.

    A graph repeats short calls until it has ten or more.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    if time.perf_counter() - start < 1e-3 * len(calls):
        calls = calls * max(1, 10 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(16)]
    for mark in marks:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    graph.reset()
    return median(times) / len(calls) * 1e3


def sets(nbytes: int) -> range:
    """Count the sets of `nbytes` bytes that exceed 200 MB together, four times the L2."""
    return range(1 + 200_000_000 // nbytes)


def compare(out: Tensor, vendor: Tensor, real: Tensor | slice = slice(None)) -> None:
    error = ((out[real].float() - vendor[real].float()).norm() / vendor[real].float().norm()).item()
    assert error < 5e-3, f"{error=}"


def column_major(scale: Tensor) -> Tensor:
    return deep_gemm.get_mn_major_tma_aligned_tensor(scale)


def dense(m: int, n: int, d: int) -> None:
    (x, xs), ws = quantize_1x128(randn(m, d)), [weights(n, d) for _ in sets(n * d)]
    vendor = None
    if deep_gemm:
        out, a = x.new_empty(m, n, dtype=torch.bfloat16), (x, column_major(xs))
        call = partial(deep_gemm.fp8_gemm_nt, d=out, disable_ue8m0_cast=True)
        vendor = median_us([partial(call, a, w) for w in ws])
        compare(gemm_fp8(x, xs, *ws[-1]), out)
    ours = median_us([partial(gemm_fp8, x, xs, *w) for w in ws])
    report("gemm_fp8", f"m={m} {n} x {d}", ours, vendor, 2 * m * n * d, "TFLOP/s", "deep_gemm")


def masked(experts: int, room: int, count: int, n: int, d: int) -> None:
    (x, xs), ws = quantize_1x128(randn(experts, room, d)), [weights(experts, n, d) for _ in sets(experts * n * d)]
    counts = torch.full((experts,), count, dtype=torch.int32, device="cuda")
    vendor = None
    if deep_gemm:
        out, a = x.new_empty(experts, room, n, dtype=torch.bfloat16), (x, column_major(xs))
        call = partial(deep_gemm.m_grouped_fp8_gemm_nt_masked, disable_ue8m0_cast=True)
        vendor = median_us([partial(call, a, w, out, counts, count) for w in ws])
        compare(grouped_gemm_masked_fp8(x, xs, *ws[-1], counts)[:, :count], out[:, :count])
    ours = median_us([partial(grouped_gemm_masked_fp8, x, xs, *w, counts) for w in ws])
    report(
        "masked_fp8",
        f"{experts} x {count} {n} x {d}",
        ours,
        vendor,
        2 * experts * count * n * d,
        "TFLOP/s",
        "deep_gemm",
    )


def contiguous(experts: int, count: int, n: int, d: int) -> None:
    each = -(-count // 128) * 128
    rows = experts * each
    groups = Groups(torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * each, 128)
    (x, xs), w = quantize_1x128(randn(rows, d)), weights(experts, n, d)
    vendor = None
    if deep_gemm:
        out, a = x.new_empty(rows, n, dtype=torch.bfloat16), (x, column_major(xs))
        call = partial(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, disable_ue8m0_cast=True, use_psum_layout=True)
        vendor = median_us([partial(call, a, w, out, groups.ends)])
        compare(grouped_gemm_contiguous_fp8(x, xs, *w, groups), out, slice(0, 20_000))
    ours = median_us([partial(grouped_gemm_contiguous_fp8, x, xs, *w, groups)])
    shape = f"{experts} x {count} {n} x {d}"
    report("contiguous_fp8", shape, ours, vendor, 2 * rows * n * d, "TFLOP/s", "deep_gemm")


def memory_bound(tokens: int, experts: int, d: int, width: int) -> None:
    """Time the memory-bound kernels. Bytes count once as they are read and once as they are written."""
    x, h = randn(tokens, d), randn(tokens, 2 * width)
    report("quantize_1x128", f"{tokens} x {d}", median_us([lambda: quantize_1x128(x)]), None, x.numel() * 3, "TB/s")
    report(
        "silu_mul_quant", f"{tokens} x {width}", median_us([lambda: silu_mul_quant(h)]), None, h.numel() * 2.5, "TB/s"
    )
    room = h.view(4, -1, 2 * width)
    counts = torch.full((4,), room.shape[1], dtype=torch.int32, device="cuda")
    ours = median_us([lambda: silu_mul_quant_masked(room, counts)])
    report("silu_mul_quant_masked", f"{tokens} x {width}", ours, None, h.numel() * 2.5, "TB/s")
    logits, bias = torch.randn(tokens, 256, device="cuda"), torch.randn(256, device="cuda")
    ours = median_us([lambda: gate_topk(logits, bias, 8, 4, 8, True, 2.5)])
    report("gate_topk", f"{tokens} x 256", ours, None, logits.numel() * 4, "TB/s")
    ids = torch.rand(tokens, 32, device="cuda").argsort(1)[:, :8]
    ids = ids.where(ids < experts, -1)
    sizes = torch.bincount(ids[ids >= 0], minlength=experts).tolist()
    rows, _, index = ep_scatter(x, ids, experts, 128, sizes)
    moved = (tokens + sum(sizes)) * d * 2
    ours = median_us([lambda: ep_scatter(x, ids, experts, 128, sizes)])
    report("ep_scatter", f"{tokens} x 8, {experts} experts", ours, None, moved, "TB/s")
    ours = median_us([lambda: ep_gather(rows, index, torch.ones(index.shape, device="cuda"))])
    report("ep_gather", f"{tokens} x 8, {experts} experts", ours, None, moved, "TB/s")
    if tokens <= 4096:
        ours = median_us([lambda: ep_scatter_masked(x, ids, experts)])
        report("ep_scatter_masked", f"{tokens} x 8, {experts} experts", ours, None, moved, "TB/s")


def products() -> None:
    for n, d in EXPERT:
        masked(4, 1024, 512, n, d)
    for n, d in DENSE:
        dense(256, n, d)
    for n, d in EXPERT:
        contiguous(9, 14_600, n, d)
    dense(4096, 7168, 2048)


def moves() -> None:
    for tokens in (256, 16_384):
        memory_bound(tokens, 9, 7168, 2048)
