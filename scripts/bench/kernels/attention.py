"""Time attention, norms and rope at DeepSeek-V3's shapes (part of scripts.bench.kernels).

Times are medians of `triton.testing.do_bench`, which clears L2 before every call. Decode and the norms run in CUDA
graphs. Vendors: flash_mla for decode; cuDNN's SDPA and, where installed, flash-attn-4 for prefill; torch's rms_norm.
Each attention result is compared with the vendor's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from kernels import hopper, norm
from kernels.mla_decode import decode_plan, mla_decode
from kernels.prefill_attention import prefill_attention
from scripts.bench.kernels.table import report

try:
    import flash_mla
except ImportError:
    flash_mla = None
try:
    from flash_attn.cute import flash_attn_varlen_func as fa4
except ImportError:
    fa4 = None

RAGGED = torch.arange(64, 8192, 64)[torch.randperm(127)].tolist()  # 127 sequences, 4096 keys on average
# Heads, KV lengths of the sequences, and tokens of each: several where drafts are verified.
DECODE = [
    (128, [4096] * 128, 1),
    (128, [2048] * 256, 1),
    (128, RAGGED, 1),
    (128, [4096] * 32, 1),
    (128, [8192] * 4, 1),
    (16, [1024] * 128, 1),
    (16, [4096] * 128, 1),
    (128, [4096] * 128, 2),
    (16, [4096] * 128, 2),
    (16, [4096] * 128, 4),
]
PREFILL = [[(4096, 4096)], [(4096, 4096)] * 4, [(2048, 4096)], [(1024, 1024)] * 16]  # (queries, keys) of each sequence


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def median_us(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=20, rep=100, return_mode="median") * 1e3


def replayed_us(call: Callable[[], object]) -> float:
    """Return the same for replays of a CUDA graph, as the engine decodes: without the host's time."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_us(graph.replay)


def portable(time: Callable[[], float]) -> float:
    """Call `time` on the portable Triton path, which other GPUs and unusual shapes take."""
    chosen, hopper.on_hopper = hopper.on_hopper, lambda q: False
    try:
        return time()
    finally:
        hopper.on_hopper = chosen


def compare(out: Tensor, vendor: Tensor) -> None:
    error = ((out.float() - vendor.float()).norm() / vendor.float().norm()).item()
    assert error < 1e-2, f"{error=}"


def decode(heads: int, lens: list[int], q_len: int) -> None:
    batch, width = len(lens), -(-max(lens) // 64)
    pages = randn(batch * width, 64, 576)
    table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
    kv_lens, q, scale = torch.tensor(lens, device="cuda").int(), randn(batch * q_len, heads, 576), 576**-0.5
    plan, vendor = decode_plan(kv_lens, q_len, heads), None  # made once per step, as the vendor's
    ours = lambda: mla_decode(q, pages, table, kv_lens, scale, 512, plan)  # noqa: E731
    if flash_mla:
        metadata, _ = flash_mla.get_mla_metadata()
        theirs = lambda: flash_mla.flash_mla_with_kvcache(  # noqa: E731
            q.unflatten(0, (batch, q_len)), pages[:, :, None], table, kv_lens, 512, metadata, softmax_scale=scale,
            causal=q_len > 1,
        )[0]  # fmt: skip
        compare(ours(), theirs().flatten(0, 1))
        vendor = replayed_us(theirs)
    shape, flop = f"{heads} heads, {batch} x {sum(lens) // batch}", sum(lens) * q_len * heads * 1088 * 2
    shape += f", {q_len} tokens" if q_len > 1 else ""
    report("mla_decode", shape, replayed_us(ours), vendor, flop, "TFLOP/s", "flash_mla")
    report("mla_decode, portable", shape, portable(lambda: replayed_us(ours)), vendor, flop, "TFLOP/s", "flash_mla")


def prefill(lens: list[tuple[int, int]], heads: int = 128) -> None:
    starts = torch.tensor([(0, 0), *lens], device="cuda").cumsum(0).int()
    q_starts, kv_starts = starts[:, 0].contiguous(), starts[:, 1].contiguous()
    (num_q, num_kv), (max_q, max_kv), scale = starts[-1].tolist(), lens[0], 192**-0.5
    q, k_rope = randn(num_q, heads, 192), randn(num_kv, 64)
    k_nope, v = randn(num_kv, heads, 256).split((128, 128), -1)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, heads, -1)), -1)  # the vendors' layout
    ours = lambda: prefill_attention(q, k_nope, k_rope, v, q_starts, kv_starts, max_q, max_kv, scale)  # noqa: E731
    shape = f"{heads} heads, {len(lens)} x {max_q} on {max_kv}"
    flop = sum(a * b - a * a / 2 for a, b in lens) * heads * 320 * 2
    out, time = ours(), median_us(ours)
    if max_q == max_kv:
        by_seq = [t.view(len(lens), max_q, heads, -1).transpose(1, 2) for t in (q, k, v.contiguous())]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            theirs = lambda: F.scaled_dot_product_attention(*by_seq, is_causal=True, scale=scale)  # noqa: E731
            compare(out, theirs().transpose(1, 2).flatten(0, 1))
            report("prefill", shape, time, median_us(theirs), flop, "TFLOP/s", "cuDNN")
    if fa4:
        packed = v.contiguous()
        theirs = lambda: fa4(  # noqa: E731
            q, k, packed, cu_seqlens_q=q_starts, cu_seqlens_k=kv_starts, max_seqlen_q=max_q, max_seqlen_k=max_kv,
            softmax_scale=scale, causal=True,
        )  # fmt: skip
        result = theirs()
        compare(out, result[0] if isinstance(result, tuple) else result)
        report("prefill", shape, time, median_us(theirs), flop, "TFLOP/s", "flash-attn-4")
    if not fa4 and max_q != max_kv:
        report("prefill", shape, time, None, flop, "TFLOP/s")
    report("prefill, portable", shape, portable(lambda: median_us(ours)), None, flop, "TFLOP/s")


def norms(tokens: int) -> None:
    x, residual, weight = randn(tokens, 7168), randn(tokens, 7168), randn(7168)
    size = x.numel() * 2
    shape = str(tuple(x.shape))
    ours, theirs = lambda: norm.rms_norm(x, weight, 1e-6), lambda: F.rms_norm(x, (7168,), weight, 1e-6)
    report("rms_norm", shape, replayed_us(ours), replayed_us(theirs), 2 * size, "TB/s", "torch")
    ours = lambda: norm.add_rms_norm(x, residual, weight, 1e-6)  # noqa: E731
    theirs = lambda: F.rms_norm(x + residual, (7168,), weight, 1e-6)  # noqa: E731
    report("add_rms_norm", shape, replayed_us(ours), replayed_us(theirs), 4 * size, "TB/s", "torch")
    quantised = lambda: norm.add_rms_norm_quant(x, residual, weight, 1e-6)  # noqa: E731
    report("add_rms_norm_quant", shape, replayed_us(quantised), None, 4.5 * size, "TB/s")
    q, angle = randn(tokens, 128, 192), torch.rand(4096, 32, device="cuda")
    table, positions = (angle.cos(), angle.sin()), torch.randint(4096, (tokens,), device="cuda")
    rope = lambda: norm.rope_query(q, *table, positions, 64)  # noqa: E731
    report("rope_query", str((tokens, 128, 64)), replayed_us(rope), None, 4 * tokens * 128 * 64, "TB/s")
    kv, pages = randn(tokens, 576), randn(tokens // 64, 64, 576)
    rows = torch.randperm(tokens, device="cuda")
    write = lambda: norm.norm_rope_write(kv, weight[:512], 1e-6, *table, positions, rows, pages)  # noqa: E731
    report("norm_rope_write", str(tuple(kv.shape)), replayed_us(write), None, 4 * kv.numel(), "TB/s")


def decodes() -> None:
    for heads, lens, q_len in DECODE:
        decode(heads, lens, q_len)


def prefills() -> None:
    for lens in PREFILL:
        prefill(lens)


def moves() -> None:
    for tokens in (256, 16384):
        norms(tokens)
