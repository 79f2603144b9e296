"""One rank of a large deployment on one GPU: its own work in a step, with SIMULATED arrivals from the other ranks.

python scripts/bench_rank.py decode --ep 72 --batch 256 --kv 2048
python scripts/bench_rank.py prefill --ep 32 --tokens 16384 --prompt 4096

All layers with weights of their own (random), the engine's decode step in a CUDA graph, the experts' rows as many as
the whole deployment would send (`parallel/loopback.py`). No communication is timed: rates are of computation alone.
The parts' times are sums of kernel times in one step without a graph; what the step takes beyond them are its gaps.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent.parent))

from disagg.graph import DecodeStep
from kernels.backend import Ops, choose
from model.batch import Batch, Chunk
from model.config import ModelConfig
from model.kv_cache import make_pool, pages_for
from model.transformer import Transformer, op_shape
from parallel.loopback import Arrivals, LoopbackContiguous, LoopbackMasked, share_of_tokens
from parallel.mesh import Mesh, pick_device
from parallel.overlap import DECODE, PREFILL
from parallel.placement import Placement
from scripts import roofline
from scripts.measurements import Record, save
from scripts.shapes import SHAPES, randomize

# ms a MoE layer without communication: SGLang's kernels on H100, read off the figures of its report of 2025-05-05. Its
# decode figure has 0.235 for the experts, under the imbalance that it met (about 1.3); 0.181 is DeepGEMM's published
# speed on balanced rows.
ANCHORS = {
    "decode": {"MLA core": 0.282, "routed experts": 0.235, "projections and shared expert": 0.182, "other": 0.122},
    "prefill": {"MLA core": 4.53, "routed experts": 9.70, "projections and shared expert": 5.91, "other": 5.63},
}
BALANCED_EXPERTS = 0.181
ELEMENTWISE = (
    "rms_norm", "add_rms_norm", "rms_norm_quant", "add_rms_norm_quant", "rope_query", "norm_rope_write",
    "silu_mul", "silu_mul_masked", "quantize_1x128", "silu_mul_quant", "silu_mul_quant_masked",
)  # fmt: skip
OF_OP = dict.fromkeys(ELEMENTWISE, "elementwise")
OF_OP |= dict.fromkeys(("ep_scatter", "ep_scatter_masked", "ep_gather"), "EP permute")
OF_OP |= dict.fromkeys(("mla_decode", "prefill_attention"), "MLA core")


class Ranges:
    """Names the kernels of a step by part: a range in the profile for every call of an op or of a module. A range
    within another has a name of its own, so that the outer one's own share can be told."""

    def __init__(self) -> None:
        self.stack: list[str] = []

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def ranged(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(part)
            with record_function("/".join(["rank", *self.stack])):
                out = call(*args, **kwargs)
            self.stack.pop()
            return out

        return ranged

    def of_ops(self, ops: Ops) -> Ops:
        return replace(ops, **{name: self.wrap(part, getattr(ops, name)) for name, part in OF_OP.items()})

    def of_model(self, model: Transformer) -> None:
        def put(owner: Any, name: str, part: str) -> None:
            setattr(owner, name, self.wrap(part, getattr(owner, name)))

        for layer in model.layers:
            kind = "moe" if layer.is_moe else "dense"
            for owner, name in ((layer.self_attn, "project"), (layer.self_attn, "attend")):
                put(owner, name, f"{kind}:MLA projections")
            put(layer.input_layernorm, "add", f"{kind}:elementwise")
            put(layer.post_attention_layernorm, "add", f"{kind}:elementwise")
            if layer.is_moe:
                put(layer.mlp.gate, "forward", "moe:router")
                put(layer.mlp.experts, "forward", "moe:routed experts")
                if layer.mlp.shared_experts is not None:
                    put(layer.mlp.shared_experts, "forward", "moe:shared experts")
            else:
                put(layer.mlp, "forward", "dense:dense FFN")
        put(model.head, "forward", "head:LM head")

    def times(self, step: Callable[[], object], device: torch.device) -> dict[str, float]:
        """Milliseconds of kernels (of a CPU: of calls) by kind of layer and part, "moe:MLA core" and so on."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            if event.name.startswith("rank/") and event.device_type == DeviceType.CPU:
                spent[event.name] += event.device_time_total if device.type == "cuda" else event.cpu_time_total
        parts: dict[str, float] = defaultdict(float)
        for name, inclusive in spent.items():
            depth = name.count("/") + 1
            inner = sum(us for n, us in spent.items() if n.startswith(f"{name}/") and n.count("/") == depth)
            path = name.split("/")[1:]
            kind = path[0].split(":")[0] if ":" in path[0] else "moe"  # an op outside any module: a dispatcher's
            parts[f"{kind}:{path[-1].split(':')[-1]}"] += (inclusive - inner) / 1e3
        return dict(parts)


@dataclass(frozen=True)
class Step:
    run: Callable[[], object]
    eager: Callable[[], object]


class Rank:
    """The model and what arrives at it."""

    def __init__(self, args: argparse.Namespace, config: ModelConfig, device: torch.device):
        self.args, self.config, self.device = args, config, device
        self.dtype = torch.bfloat16
        slots = config.n_routed_experts + args.redundant
        if slots % args.ep:
            raise ValueError(f"(experts + redundant) % ep must be 0, not {slots} % {args.ep} = {slots % args.ep}")
        self.slots = slots
        table = torch.arange(slots, device=device) % config.n_routed_experts
        first = torch.arange(config.n_routed_experts, device=device)
        layers = config.num_moe_layers
        placement = Placement(first.repeat(layers, 1), table.repeat(layers, 1), args.ep)
        ops, self.choices = choose(op_shape(config), self.dtype, device, args.backend or ())
        self.ranges = Ranges()
        self.ops = self.ranges.of_ops(ops)
        self.mesh = Mesh(device=device)
        length = args.kv if args.phase == "decode" else args.prompt
        self.model = Transformer(config, self.mesh, placement, self.ops, self.dtype, length + 1, config.fp8)
        randomize(self.model)
        self.ranges.of_model(self.model)

    def arrivals(self, tokens: int, distinct: float | None = None) -> Arrivals:
        args, config = self.args, self.config
        return Arrivals.even(tokens, args.ep, config.num_experts_per_tok, self.slots, args.skew, distinct)

    def decode(self) -> Step:
        args, config = self.args, self.config
        each, capacity = pages_for(args.kv), args.ep * args.batch
        pool = make_pool(config, args.batch * each + 1, self.dtype, self.device)
        for layer in pool:
            layer.normal_()
        masked = LoopbackMasked(
            self.arrivals(args.batch), capacity, config.hidden_size, self.ops, self.device, config.fp8, self.dtype
        )
        tokens = torch.zeros(args.batch, dtype=torch.int64, device=self.device)

        def forward(batch: Batch, halves: tuple[Batch, Batch] | None) -> Tensor:
            return self.model(batch, pool, masked, halves, DECODE)

        step = DecodeStep(forward, tokens, [args.batch], each)
        chunks = [Chunk((i,), args.kv - 1, range(1 + i * each, 1 + (i + 1) * each)) for i in range(args.batch)]
        eager = lambda: step.run(chunks, args.batch)  # noqa: E731
        eager()
        if self.device.type != "cuda":
            return Step(eager, eager)
        captured = DecodeStep(forward, tokens, [args.batch], each)
        captured.run(chunks, args.batch)
        captured.capture(list)
        return Step(lambda: captured.run(chunks, args.batch), eager)

    def prefill(self) -> Step:
        args, config = self.args, self.config
        count, each = args.tokens // args.prompt, pages_for(args.prompt)
        pool = make_pool(config, count * each + 1, self.dtype, self.device)
        like = torch.zeros(1, config.hidden_size, dtype=self.dtype, device=self.device)
        hit = share_of_tokens(
            config.n_routed_experts, args.ep, config.num_experts_per_tok, config.n_group, config.topk_group
        )
        contiguous = LoopbackContiguous(
            self.arrivals(args.tokens, hit), config.hidden_size, config.num_experts_per_tok, self.ops,
            self.ops.quantize_1x128(like) if config.fp8 else like,
        )  # fmt: skip
        ids = [i * 7919 % config.vocab_size for i in range(args.prompt)]
        prompts = [Chunk(ids, 0, range(1 + i * each, 1 + (i + 1) * each)) for i in range(count)]
        batch = Batch.build([], prompts, self.device)
        run = lambda: self.model(batch, pool, contiguous, None, PREFILL)  # noqa: E731
        run()
        return Step(run, run)


def milliseconds(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median time of a step, one after the other."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeat):
            run()
            marks.append(time.perf_counter())
        return 1e3 * median(b - a for a, b in pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    run()
    for event in events:
        event.record()
        run()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(events))


def show(
    args: argparse.Namespace, config: ModelConfig, parts: dict[str, float], step: float, work: roofline.Work
) -> list[Record]:
    """The table, and its records. A MoE layer is what the step takes beyond the dense layers and the head."""
    ceilings = roofline.measure_ceilings() if torch.cuda.is_available() else None
    by_kind = defaultdict(float)
    for name, ms in parts.items():
        by_kind[name.split(":")[0]] += ms
    layers = config.num_moe_layers
    layer = (step - by_kind["dense"] - by_kind["head"]) / layers
    floors: dict[str, float] = defaultdict(float)
    if ceilings is not None:
        for part in work.kinds["MoE layer"][1]:
            floors[part.group] += 1e3 * part.seconds(ceilings)
    print(f"\n{'a MoE layer, ms':32} {'measured':>9} {'floor':>9}  (the floor is modelled)")
    mine = {name.split(":")[1]: ms / layers for name, ms in parts.items() if name.startswith("moe:")}
    for name, ms in sorted(mine.items(), key=lambda item: -item[1]):
        print(f"{name:32} {ms:9.4f} {floors.get(name, 0):9.4f}")
    gaps = layer - sum(mine.values())
    print(f"{'gaps':32} {gaps:9.4f}  (less than 0: parts ran side by side, or the profile slowed them)")
    print(f"{'together':32} {layer:9.4f} {sum(floors.values()):9.4f}")
    tokens = args.batch if args.phase == "decode" else args.tokens
    print(f"the step: {step:.2f} ms, {tokens / step * 1e3:,.0f} tok/s of computation alone (arrivals simulated)")
    anchors = dict(ANCHORS[args.phase])
    if args.phase == "decode" and args.skew == 1:
        anchors["routed experts"] = BALANCED_EXPERTS
    anchor = sum(anchors.values()) if args.shape == "v3" else None  # they are of that model
    if anchor is not None:
        by_part = ", ".join(f"{name} {ms}" for name, ms in anchors.items())
        print(f"SGLang's kernels on H100, a MoE layer: {anchor:.3f} ms ({by_part})")
    what = f"one rank of EP{args.ep}, {args.phase}, simulated arrivals (skew {args.skew:g})"
    source = "SGLang's kernels without communication, digitised from its figures"
    if args.phase == "decode" and args.skew == 1:
        source += ", the experts at DeepGEMM's published speed for balanced rows"
    records = [Record(f"{what}: a MoE layer", round(layer, 4), "ms", "lower", anchor, source if anchor else "")]
    records += [Record(f"{what}: {name}, a MoE layer", round(ms, 4), "ms", "lower") for name, ms in mine.items()]
    records.append(Record(f"{what}: gaps, a MoE layer", round(gaps, 4), "ms", "lower"))
    return [*records, Record(f"{what}: the step, computation alone", round(step, 3), "ms", "lower")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    sizes = {"decode": {"ep": 72, "batch": 256, "kv": 2048}, "prefill": {"ep": 32, "tokens": 16384, "prompt": 4096}}
    for phase, defaults in sizes.items():
        add = phases.add_parser(phase).add_argument
        for name, default in defaults.items():
            add(f"--{name}", type=int, default=default, help=f"({default})")
        add("--redundant", type=int, default=32, help="slots beyond the experts (32)")
        add("--skew", type=float, default=1.0, help="the fullest expert's rows over the mean (1)")
        add("--shape", choices=SHAPES, default="v3")
        add("--layers", type=int, help="fewer layers than the shape has")
        add("--backend", action="append", metavar="[OP=]LIB")
        add("--repeat", type=int, default=20)
        add("--device", choices=("auto", "cpu", "cuda"), default="auto")
        add("--out", type=Path, metavar="FILE", help="write the records there, for scripts/report.py")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse()
    config, device = SHAPES[args.shape], pick_device(args.device)
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers)
    start = time.perf_counter()
    rank = Rank(args, config, device)
    step = rank.decode() if args.phase == "decode" else rank.prefill()
    print(f"ready after {time.perf_counter() - start:.1f} s", flush=True)
    if device.type == "cuda":
        now, most = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        print(f"allocated {now:.2f} GiB, at most {most:.2f}")
    took = milliseconds(step.run, device, args.repeat)
    for layer in rank.model.layers:
        if layer.is_moe:
            layer.mlp.beside.stream = None  # side by side they slow each other: their times are taken one by one
    step.eager()
    parts = rank.ranges.times(step.eager, device)
    local = rank.slots // args.ep
    work = (
        roofline.decode(config, args.batch, args.kv, args.ep, local)
        if args.phase == "decode"
        else roofline.prefill(config, args.tokens, args.prompt, args.ep, local)
    )
    records = show(args, config, parts, took, work)
    if args.out is not None:
        save(records, args.out)


if __name__ == "__main__":
    main()
