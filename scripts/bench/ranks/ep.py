"""Time dispatch and combine between the ranks of a job: DeepEP's two modes and the all-to-all, by our dispatchers.

    torchrun --nproc-per-node 8 -m scripts.bench.ranks.ep --out records.json

Low latency: 128 tokens per rank in the masked layout. Normal: 4096 tokens per rank in the contiguous layout. A token
goes to 8 of 256 experts, chosen uniformly. Rows travel in fp8 to the experts (cast beforehand, or by DeepEP's
low-latency kernel) and in bf16 back. Before the timing, the returned tokens are compared with the sent ones.

Times are CUDA events around our calls: each rank's median, then the slowest rank's. In the masked layout neither the
GPU nor the host waits for the other: the GPU is held until the calls are enqueued. In the contiguous layout a dispatch
waits for the host, and that is part of its time, unlike in DeepEP's own benchmark. Nor does DeepEP's benchmark group
rows by expert, or sum them before they return. So the times of grouping and summing are given separately, and bandwidth
counts the remaining time.

Bandwidth is computed as in DeepEP's benchmarks. Low latency: the bytes of all copies, T x 8 x (7168 + 7168 / 128 x 4 +
16) in fp8, and T x 8 x 7168 x 2 back. Normal: the bytes of the rows that a rank receives. A token counts once per
receiving rank, and a rank's own tokens count too.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kernels import ref
from kernels.addends import summed
from kernels.backend import choose
from kernels.ops import Ops
from model.transformer import op_shape
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP, obstacles
from parallel.deepep_sizes import NUM_SMS, Sizes, normal_misfits
from parallel.dispatch import Contiguous, Masked
from parallel.dispatchers import Dispatcher, plain_dispatchers
from parallel.mesh import Mesh
from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES

# DeepEP's figures for EP8 on H800 over NVLink (its docs/legacy.md): low latency in us, normal in GB/s.
PUBLISHED = {"low latency": (77, 114), "normal": (153, 158)}
FP8_ERROR = 2**-4  # the largest relative error of a value in e4m3; bf16's errors are far smaller
HOLD_CYCLES = 200_000_000  # of the GPU's clock, about 0.1 s
WARM = 3  # rounds before the timed ones


class Spans:
    """Pairs of marks on the GPU's timeline (on a CPU: the host's), and the milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.pairs = device.type == "cuda", defaultdict(list)

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any) -> None:
        self.pairs[name].append((start, self.mark()))

    def wrap(self, name: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.mark()
            out = call(*args, **kwargs)
            self.add(name, start)
            return out

        return timed

    def times(self, rounds: int) -> dict[str, float]:
        """Return the milliseconds per round by name, and forget the marks. The first WARM rounds do not count.

        A name with several spans per round gets their median, times their number.
        """
        if self.on_gpu:
            torch.cuda.synchronize()
        found = {}
        for name, pairs in self.pairs.items():
            each = len(pairs) // (WARM + rounds)
            spent = [a.elapsed_time(b) if self.on_gpu else 1e3 * (b - a) for a, b in pairs[WARM * each :]]
            found[name] = median(spent) * each
        self.pairs.clear()
        return found


class Bench:
    def __init__(self, args: argparse.Namespace, mesh: Mesh) -> None:
        self.args, self.mesh, self.spans, self.report = args, mesh, Spans(mesh.device), Report(mesh.rank)
        config = replace(SHAPES["v3"], hidden_size=args.hidden)
        ops, _ = choose(op_shape(config), torch.bfloat16, mesh.device)
        names = {"ep_scatter": "grouping", "ep_scatter_masked": "grouping", "ep_gather": "summing"}
        timed = {op: self.spans.wrap(name, getattr(ops, op)) for op, name in names.items()}
        self.quantize, self.ops = ops.quantize_1x128, replace(ops, **timed)
        self.generator = torch.Generator().manual_seed(mesh.rank)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x [T, D] in bf16, uniformly random slots [T, K], and weights [T, K] that sum to 1."""
        args, device = self.args, self.mesh.device
        x = torch.randn(tokens, args.hidden, generator=self.generator).bfloat16()
        slots = torch.rand(tokens, args.experts, generator=self.generator).topk(args.top_k, 1).indices
        weights = torch.rand(tokens, args.top_k, generator=self.generator)
        return x.to(device), slots.to(device), (weights / weights.sum(1, keepdim=True)).to(device)

    def measure(self, mode: str, library: str, dispatcher: Dispatcher, tokens: int) -> None:
        x, slots, weights = self.inputs(tokens)

        payload = x if dispatcher.casts else self.quantize(x)
        arrived = dispatcher.dispatch(payload, slots, weights).wait()
        y = experts_that_change_nothing(arrived)
        back = summed(dispatcher.combine(y, arrived.way_back).wait(), self.ops.ep_gather)
        error = (back.float() - x.float()).norm() / x.float().norm()
        if not error < FP8_ERROR:
            raise RuntimeError(f"{library}, {mode}: the tokens came back with an error of {error:.3f}")
        self.together()
        self.spans.pairs.clear()
        masked = isinstance(arrived, Masked)
        if masked and self.spans.on_gpu:
            torch.cuda._sleep(HOLD_CYCLES)
        for _ in range(WARM + self.args.repeat):
            start = self.spans.mark()
            arrived = dispatcher.dispatch(payload, slots, weights).wait()
            self.spans.add("dispatch", start)
            start = self.spans.mark()
            summed(dispatcher.combine(y, arrived.way_back).wait(), self.ops.ep_gather)
            self.spans.add("combine", start)
        self.evaluate(mode, library, tokens, self.spans.times(self.args.repeat), slots, masked)
        self.together()

    def evaluate(
        self, mode: str, library: str, tokens: int, local: dict[str, float], slots: Tensor, masked: bool
    ) -> None:
        args, ranks = self.args, self.mesh.size
        scaled, bare = args.hidden + args.hidden // 128 * 4, 2 * args.hidden
        copies = tokens * args.top_k if masked else self.received(slots)
        sent = {"dispatch": copies * (scaled + 16 * masked), "combine": copies * bare}
        by_rank = self.mesh.ep.exchange((local, sent), tuple[dict[str, float], dict[str, int]])
        slowest = {name: max(times[name] for times, _ in by_rank) for name in local}
        what = f"EP{ranks}, {mode}, {library}, {tokens} tokens a rank"
        for i, (name, inside) in enumerate((("dispatch", "grouping"), ("combine", "summing"))):
            published = PUBLISHED[mode][i] if (ranks, library) == (8, "DeepEP") else None
            self.add(f"{what}: {name}", 1e3 * slowest[name], "us", published if masked else None)
            if inside in slowest:
                self.add(f"{what}: {inside} of rows in {name}", 1e3 * slowest[inside], "us")
            rates = [nbytes[name] / (times[name] - times.get(inside, 0.0)) / 1e6 for times, nbytes in by_rank]
            self.add(f"{what}: {name}", sum(rates) / ranks, "GB/s", None if masked else published)

    def received(self, slots: Tensor) -> int:
        """Return how many rows this rank receives. A token comes once, however many of its experts are here."""
        local = self.args.experts // self.mesh.size
        asked = torch.stack([(slots // local == rank).any(1).sum() for rank in range(self.mesh.size)]).tolist()
        return sum(row[self.mesh.rank] for row in self.mesh.ep.exchange(asked, list[int]))

    def add(self, name: str, value: float, unit: str, reference: float | None = None) -> None:
        source = "DeepEP's published figure, EP8 on H800" if reference else ""
        better = "higher" if unit == "GB/s" else "lower"
        self.report.keep(Measurement(f"{name}, {unit}", round(value, 3), unit, better, reference, source))

    def together(self) -> None:
        if self.spans.on_gpu:
            torch.cuda.synchronize()
        self.mesh.ep.barrier()


def experts_that_change_nothing(arrived: Contiguous | Masked) -> Tensor:
    """Return the received rows in bf16. With weights that sum to 1, combine then returns each token unchanged."""
    match arrived:
        case Masked(x, counts, _, scale):
            y = ref.dequantize_1x128(x, scale).bfloat16()
            is_real = torch.arange(x.shape[1], device=x.device) < counts[:, None]
            return y.masked_fill(~is_real[..., None], 0)
        case Contiguous(x, groups, _, scale):
            return ref.dequantize_1x128(x, scale).bfloat16().masked_fill(groups.of_rows(len(x))[:, None] < 0, 0)


def dispatchers(
    args: argparse.Namespace, mesh: Mesh, ops: Ops, say: Callable[[str], None]
) -> tuple[dict[tuple[str, str], Dispatcher], DeepEPBuffer | None]:
    """Return the dispatchers by mode and library, and DeepEP's buffer. DeepEP's are left out where it cannot serve."""
    contiguous, masked = plain_dispatchers(mesh.ep, args.experts, ops)
    over = "all-to-all over NCCL" if mesh.device.type == "cuda" else "all-to-all over gloo"
    found: dict[tuple[str, str], Dispatcher] = {}
    sizes = Sizes(mesh.size, mesh.ranks_per_node, args.experts, args.hidden, args.top_k, args.decode_tokens, "bfloat16")
    why_not = next((rules for rules in mesh.ep.exchange(obstacles(sizes, mesh.device), list[str]) if rules), [])
    buffer = None
    if why_not:
        say(f"DeepEP cannot serve: {'; '.join(why_not)}")
    else:
        normal = not normal_misfits(sizes)
        buffer = DeepEPBuffer(mesh.ep, args.experts, args.hidden, args.decode_tokens, args.num_sms, normal)
        found["low latency", "DeepEP"] = MaskedDeepEP(buffer, fp8=True)
        if normal:
            found["normal", "DeepEP"] = ContiguousDeepEP(buffer, ops)
    return found | {("low latency", over): masked, ("normal", over): contiguous}, buffer


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=positive, default=7168, help="hidden size (7168)")
    add("--experts", type=positive, default=256, help="experts of the job (256)")
    add("--top-k", type=positive, default=8, help="experts per token (8)")
    add("--decode-tokens", type=positive, default=128, help="tokens per rank in low latency (128)")
    add("--prefill-tokens", type=positive, default=4096, help="tokens per rank in normal mode (4096)")
    add("--num-sms", type=positive, default=NUM_SMS, help=f"SMs for DeepEP's normal kernels ({NUM_SMS})")
    add("--repeat", type=positive, default=30, help="rounds per median (30)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    if args.top_k > args.experts:
        parser.error(f"--top-k must be at most --experts ({args.experts}), not {args.top_k}")
    if args.hidden % 128:
        parser.error(f"--hidden % 128 must be 0, not {args.hidden} % 128 = {args.hidden % 128}")
    return parser, args


@torch.inference_mode()
def measure(args: argparse.Namespace, mesh: Mesh) -> None:
    if mesh.size < 2:
        raise ValueError("between ranks of a job: torchrun --nproc-per-node N with N of at least 2")
    if args.experts % mesh.size:
        remainder = args.experts % mesh.size
        raise ValueError(f"--experts % ranks must be 0, not {args.experts} % {mesh.size} = {remainder}")
    bench = Bench(args, mesh)
    found, buffer = dispatchers(args, mesh, bench.ops, bench.report.say)
    try:
        for (mode, library), dispatcher in found.items():
            tokens = args.decode_tokens if mode == "low latency" else args.prefill_tokens
            bench.measure(mode, library, dispatcher, tokens)
    finally:
        if args.out is not None and mesh.rank == 0:
            save(bench.report.records, args.out)
    if mesh.size != 8:
        (low, back), (normal, normal_back) = PUBLISHED.values()
        bench.report.say(
            f"for comparison, DeepEP's published figures, of EP8 on H800 and not of EP{mesh.size}: low latency "
            f"{low} / {back} us, normal {normal} / {normal_back} GB/s (dispatch / combine)"
        )
    if buffer is not None:
        buffer.close()


def main() -> None:
    parser, args = parse()
    torch.manual_seed(0)
    with refusals(parser):
        mesh = Mesh.create(device=args.device)
        measure(args, mesh)
        mesh.close()


if __name__ == "__main__":
    main()
