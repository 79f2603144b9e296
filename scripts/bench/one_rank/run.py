"""Measure one rank of a large deployment on one GPU: its own work in a step, with SIMULATED arrivals from other ranks.

python -m scripts.bench.one_rank decode --ep 72 --batch 256 --kv 2048
python -m scripts.bench.one_rank prefill --ep 32 --tokens 16384 --prompt 4096 --trace step.json --chart parts.png

All layers have random weights of their own. Decode is the engine's step in a CUDA graph. The experts get as many rows
as the whole deployment would send (`loopback.py`). Communication is not timed: rates are of computation alone.

The time of a part is the sum of its kernels' times in one step without a graph. The step takes longer: the rest is gaps
between kernels, and the lower clock of a GPU under steady load. Work that a kernel does in the same pass counts as the
kernel's. For example, the cast of attention's output counts as attention; the floors count it as elementwise. A decode
step's weighted sum over the experts counts as elementwise, because the next norm makes it; the floors count it as EP
permute.

At the end the throughput of a cluster of such ranks is MODELLED. The inputs are the measured steps, whole and as two
micro-batches, and the communication times of deepep_times.py:

    plain        the step + all transfers
    overlapped   dense layers and head + the longer of (MoE layers of two halves, flights of all transfers)
                 + the time that send and receive kernels hold the SMs

In prefill the MoE layers of the halves slow down in proportion to the SMs that transfers hold. With SGLang's published
kernel times the model gives about 6 % more than SGLang measured without overlap, and 15 to 20 % more with it. The model
contains no imbalance and no waiting for the slowest rank.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from disagg.budget import GIB
from kernels.ops import Ops
from model.config import ModelConfig
from model.footprint import StepShape, page_bytes, weight_bytes
from model.pages import pages_for
from model.transformer import Transformer
from parallel.deepep_sizes import NUM_SMS
from scripts.bench.lib import roofline
from scripts.bench.lib.charts import figure, save_bars
from scripts.bench.lib.flags import SIZES, new_file, new_png, positive
from scripts.bench.lib.measurements import Measurement, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.one_rank import deepep_times
from scripts.bench.one_rank.delay import Delay
from scripts.bench.one_rank.kernel_ranges import export, launched_in, mark_ranges
from scripts.bench.one_rank.rank import (
    Rank,
    add_flags,
    add_measuring_flags,
    check_decode,
    check_flags,
    check_prefill,
    times,
)

# Milliseconds per MoE layer without communication: SGLang's kernels on H100, digitised from its report of 2025-05-05.
# In its decode the experts take 0.235 with an imbalance of about 1.3. DeepGEMM's published speed on balanced rows gives
# 0.181.
ANCHORS = {
    "decode": {"MLA core": 0.282, "routed experts": 0.235, "projections and shared expert": 0.182, "other": 0.122},
    "prefill": {"MLA core": 4.53, "routed experts": 9.70, "projections and shared expert": 5.91, "other": 5.63},
}
BALANCED_EXPERTS = 0.181
COARSE = {  # our parts -> the anchors' parts; the rest is "other"
    "MLA core": "MLA core", "routed experts": "routed experts", "MLA projections": "projections and shared expert",
    "shared experts": "projections and shared expert", "router": "projections and shared expert",
}  # fmt: skip
PAPER = {  # tok/s per node of 8 GPUs: SGLang's report, with overlap
    "decode": ("EP72, batch 256, KV 2,000", 22_282), "prefill": ("EP32, 16,384 tokens, prompts of 4,096", 50_302),
}  # fmt: skip
ELEMENTWISE = (
    "rms_norm", "add_rms_norm", "rms_norm_quant", "add_rms_norm_quant", "rope_query", "norm_rope_write",
    "silu_mul", "quantize_1x128", "silu_mul_quant", "silu_mul_quant_masked",
)  # fmt: skip
OF_OP = dict.fromkeys(ELEMENTWISE, "elementwise")
OF_OP |= dict.fromkeys(("ep_scatter", "ep_scatter_masked", "ep_gather"), "EP permute")
OF_OP |= dict.fromkeys(("mla_decode", "prefill_attention"), "MLA core")
OF_KERNEL = dict.fromkeys(("_rope_kernel", "_norm_rope_write_kernel"), "elementwise")  # whichever op launches them


MARK = "rank/"  # before the names of our ranges in a profile


class Ranges:
    """Names the kernels of a step by part, with a range in the profile for every call of an op or a module.

    A range within another has a name of its own, so that the time of the outer range alone can be computed.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def ranged(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(part)
            with record_function(MARK + "/".join(self.stack)):
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
                for name in ("logits", "forward"):
                    put(layer.mlp.gate, name, "moe:router")
                put(layer.mlp.experts, "forward", "moe:routed experts")
                if layer.mlp.shared_experts is not None:
                    put(layer.mlp.shared_experts, "forward", "moe:shared experts")
            else:
                put(layer.mlp, "forward", "dense:dense FFN")
        put(model.head, "forward", "head:LM head")
        put(model.head, "project", "head:LM head")
        if model.mtp is not None:
            put(model.mtp, "forward", "drafts:draft layer")
            put(model.mtp, "fill", "drafts:fill")

    def times(self, step: Callable[[], object], device: torch.device, trace: Path | None) -> dict[str, float]:
        """Profile the step. Return milliseconds of kernels (on a CPU: of calls) by kind of layer and part.

        A key is like "moe:MLA core". `trace`: where to write the step's Chrome trace.
        """
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        events = export(profiler, trace)
        parts: dict[str, float] = defaultdict(float)
        if device.type == "cuda":
            for event, path in launched_in(events, MARK):
                kind, part = part_of(path).split(":")
                parts[f"{kind}:{OF_KERNEL.get(event['name'], part)}"] += event["dur"] / 1e3
            return dict(parts)
        for start, end, path in (ranges := mark_ranges(events, MARK)):
            inner = sum(e - s for s, e, name in ranges if start <= s and e <= end and name.startswith(f"{path}/")
                        and name.count("/") == path.count("/") + 1)  # fmt: skip
            parts[part_of(path)] += (end - start - inner) / 1e3
        return dict(parts)


def part_of(path: str) -> str:
    """Map a range to its part: "moe:MLA projections/MLA core" -> "moe:MLA core".

    An op outside any module belongs to a dispatcher, so to a MoE layer.
    """
    pieces = path.split("/")
    kind = pieces[0].split(":")[0] if ":" in pieces[0] else "moe"
    return f"{kind}:{pieces[-1].split(':')[-1]}"


@dataclass(frozen=True)
class Figures:
    """Milliseconds."""

    step: float
    halves: float | None  # the step as two micro-batches, one after the other; None if it cannot be cut
    outside: float  # the step's dense layers and head
    layer: float  # a MoE layer: the rest of the step, divided by their number
    parts: dict[str, float]  # a MoE layer's parts by name, with its gaps
    floors: dict[str, float]  # the modelled floor of each part; empty on a CPU


def evaluate(config: ModelConfig, step: float, halves: float | None, parts: Mapping[str, float], work: roofline.Cost,
             ceilings: roofline.Ceilings | None) -> Figures:  # fmt: skip
    """Compute the figures. `parts`: from `Ranges.times`. `ceilings`: None on a CPU."""
    layers = config.num_moe_layers
    outside = sum(ms for name, ms in parts.items() if not name.startswith("moe:"))
    layer = (step - outside) / layers
    of_layer = {name.split(":")[1]: ms / layers for name, ms in parts.items() if name.startswith("moe:")}
    of_layer = dict(sorted(of_layer.items(), key=lambda item: -item[1]))
    floors: dict[str, float] = defaultdict(float)
    for part in work.kinds["MoE layer"][1] if ceilings is not None else ():
        floors[part.group] += 1e3 * part.seconds(ceilings)
    return Figures(step, halves, outside, layer, of_layer | {"gaps": layer - sum(of_layer.values())}, floors)


def anchors_of(args: argparse.Namespace) -> dict[str, float]:
    """Return SGLang's times of the parts. They exist for the shape v3 alone."""
    if args.shape != "v3":
        return {}
    balanced = {"routed experts": BALANCED_EXPERTS} if args.phase == "decode" and args.skew == 1 else {}
    return ANCHORS[args.phase] | balanced


def coarse(parts: Mapping[str, float]) -> dict[str, float]:
    """Sum the parts to those of the anchors, and add the whole layer."""
    sums: dict[str, float] = dict.fromkeys(ANCHORS["decode"], 0.0)
    for name, ms in parts.items():
        sums[name if name in sums else COARSE.get(name, "other")] += ms
    return sums | {"a MoE layer": sum(parts.values())}


def show(args: argparse.Namespace, figures: Figures) -> list[Measurement]:
    """Print the table, and return its figures."""
    print(f"\n{'a MoE layer, ms':32} {'measured':>9} {'floor':>9}  (the floor is modelled)")
    for name, ms in figures.parts.items():
        note = "  (less than 0: parts ran side by side, or the profile slowed them)" if name == "gaps" else ""
        print(f"{name:32} {ms:9.4f} {figures.floors.get(name, 0):9.4f}{note}")
    print(f"{'together':32} {figures.layer:9.4f} {sum(figures.floors.values()):9.4f}")
    tokens = args.batch if args.phase == "decode" else args.tokens
    step = figures.step
    print(f"the step: {step:.2f} ms, {tokens / step * 1e3:,.0f} tok/s of computation alone (arrivals simulated)")
    if figures.halves is not None:
        print(f"the same as two micro-batches: {figures.halves:.2f} ms")
    anchors, anchor, source = anchors_of(args), None, ""
    if anchors:
        anchor = round(sum(anchors.values()), 3)
        by_part = ", ".join(f"{name} {ms}" for name, ms in anchors.items())
        print(f"SGLang's kernels on H100, a MoE layer: {anchor:.3f} ms ({by_part})")
        source = "SGLang's kernels without communication, digitised from its figures"
        if args.phase == "decode" and args.skew == 1:
            source += ", the experts at DeepGEMM's published speed for balanced rows"
    what = name_of(args)
    records = [Measurement(f"{what}: a MoE layer", round(figures.layer, 4), "ms", "lower", anchor, source)]
    records += [
        Measurement(f"{what}: {name}, a MoE layer", round(ms, 4), "ms", "lower") for name, ms in figures.parts.items()
    ]
    records.append(Measurement(f"{what}: the step, computation alone", round(step, 3), "ms", "lower"))
    if figures.halves is not None:
        name = f"{what}: the step as two micro-batches, computation alone"
        records.append(Measurement(name, round(figures.halves, 3), "ms", "lower"))
    return records


def name_of(args: argparse.Namespace) -> str:
    sizes = f"{args.batch} x {args.kv}" if args.phase == "decode" else f"{args.tokens} in {args.prompt}s"
    forced = f", --backend {' '.join(args.backend)}" if args.backend else ""
    of = f"one rank of {args.shape} at EP{args.ep}"
    return f"{of}, {args.phase} {sizes}, simulated arrivals (skew {args.skew:g}){forced}"


def cluster_steps(
    figures: Figures, layers: int, whole: list[Delay], half: list[Delay], slowdown: float = 1.0
) -> dict[str, float]:
    """Return the milliseconds of a step in the cluster, MODELLED as the module's docstring says.

    `whole`, `half`: dispatch and combine of a MoE layer, for all tokens and for half of them. `slowdown`: factor on the
    time of what is computed beside transfers.
    """
    steps = {"plain": figures.step + 1e3 * layers * sum(t.total for t in whole)}
    if figures.halves is not None:
        flight, busy = (1e3 * 2 * layers * sum(getattr(t, part) for t in half) for part in ("flight", "busy"))
        computing = (figures.halves - figures.outside) * slowdown
        steps["overlapped"] = figures.outside + max(computing, flight) + busy
    return steps


def show_cluster(args: argparse.Namespace, config: ModelConfig, figures: Figures) -> list[Measurement]:
    tokens = args.batch if args.phase == "decode" else args.tokens
    model = (deepep_times.low_latency if args.phase == "decode" else deepep_times.normal)(config, args.ep)
    whole, half = ([model(what, count) for what in ("dispatch", "combine")] for count in (tokens, tokens // 2))
    slowdown = 1.0
    if args.phase == "prefill" and torch.cuda.is_available():
        all_sms = torch.cuda.get_device_properties(0).multi_processor_count
        slowdown = all_sms / (all_sms - NUM_SMS)
    setting, paper = PAPER[args.phase]
    shown = ", ".join(f"{name} {1e3 * t.total:.3g}" for name, t in zip(("dispatch", "combine"), whole, strict=True))
    print(f"\nthe cluster, MODELLED: ms of a MoE layer's communication, from DeepEP's published tables: {shown}")
    records = []
    for name, ms in cluster_steps(figures, config.num_moe_layers, whole, half, slowdown).items():
        of_gpu = tokens / ms * 1e3
        rate = deepep_times.NODE * of_gpu
        print(f"{name:>10}: {ms:9.2f} ms a step, {of_gpu:9,.0f} tok/s a GPU, {rate:10,.0f} a node (modelled)")
        reference = paper if name == "overlapped" and args.shape == "v3" else None
        source = f"SGLang on H100, measured: {setting}" if reference else ""
        title = f"{name_of(args)}: tok/s a node, {name}"
        records.append(Measurement(title, round(rate), "tok/s", "higher", reference, source, kind="modelled"))
    if args.shape == "v3":
        print(f"    SGLang: {paper:,} tok/s a node, measured on H100 ({setting})")
    return records


def show_memory(rank: Rank, what: str) -> list[Measurement]:
    """Print the memory that `disagg/memory.py` counts, and what torch reports. Return the figures (none on a CPU)."""
    parts = weight_bytes(StepShape(rank.config, rank.dtype.itemsize, rank.model.fp8, ranks=rank.ep, slots=rank.local))
    parts["KV"] = rank.pool.shape[1] * page_bytes(rank.config, rank.dtype.itemsize)
    counted = sum(parts.values())
    print("memory by the table, GiB: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()))
    print(f"    together {counted / GIB:.2f}")
    if rank.device.type != "cuda":
        return []
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    print(f"    torch has {now / GIB:.2f} allocated ({now / counted - 1:+.1%}), had at most {peak / GIB:.2f}")
    source = "what torch has allocated"
    counted, now, peak = (round(size / GIB, 2) for size in (counted, now, peak))
    return [
        Measurement(f"{what}: weights and KV by the table", counted, "GiB", "lower", now, source),
        Measurement(f"{what}: the most that torch had allocated", peak, "GiB", "lower"),
    ]


def save_chart(path: Path, args: argparse.Namespace, figures: Figures) -> None:
    series = {"measured": coarse(figures.parts)}
    if figures.floors:
        series["floor (modelled)"] = coarse(figures.floors)
    if anchors := anchors_of(args):
        series["SGLang's kernels (from its figures)"] = coarse(anchors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_bars(path, f"{name_of(args)}: a MoE layer", "ms", series)


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    sizes = {"decode": {"ep": 72, "batch": 256, "kv": 2048}, "prefill": {"ep": 32, "tokens": 16384, "prompt": 4096}}
    for phase, defaults in sizes.items():
        add = phases.add_parser(phase).add_argument
        add_flags(add, defaults.pop("ep"))
        add_measuring_flags(add)
        for name, default in defaults.items():
            add(f"--{name}", type=positive, default=default, help=f"{SIZES[name]} ({default})")
        add("--trace", type=new_file, metavar="JSON", help="write a step's Chrome trace")
        add("--chart", type=new_png, metavar="PNG", help="draw the parts, with floors and SGLang's times")
    return parser, parser.parse_args()


def prepare(args: argparse.Namespace, ranges: Ranges) -> tuple[roofline.Ceilings | None, Rank]:
    """Return the GPU's ceilings, measured before anything else runs on it, and the rank.

    Raises ValueError for flags that cannot work.
    """
    config, device = check_flags(args)
    if args.chart is not None:
        figure()  # is there matplotlib?
    if args.phase == "decode":
        check_decode(config, [args.batch], args.kv)
        length, sequences = args.kv, args.batch
    else:
        check_prefill(config, [args.tokens], args.prompt)
        length, sequences = args.prompt, args.tokens // args.prompt
    ceilings = None
    if device.type == "cuda":
        ceilings = roofline.measure_ceilings()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return ceilings, Rank(args, config, device, length, sequences * pages_for(length), ranges.of_ops)


@torch.inference_mode()
def main() -> None:
    parser, args = parse()
    start, ranges = time.perf_counter(), Ranges()
    with refusals(parser):
        ceilings, rank = prepare(args, ranges)
    ranges.of_model(rank.model)
    config, device, decodes = rank.config, rank.device, args.phase == "decode"
    sizes = (args.batch, args.kv) if decodes else (args.tokens, args.prompt)
    make = rank.decode if decodes else rank.prefill
    step = make(*sizes)
    halves = make(*sizes, overlap=True) if sizes[0] % 2 == 0 else None
    print(f"ready after {time.perf_counter() - start:.1f} s", flush=True)
    memory = show_memory(rank, name_of(args))
    runs = {"plain": step.run} | ({"halves": halves.run} if halves is not None else {})
    took = times(runs, device, args.repeat)
    for layer in rank.model.layers:
        if layer.is_moe:
            layer.mlp.beside.stream = None  # times are taken one by one, because kernels side by side slow each other
    step.eager()
    parts = ranges.times(step.eager, device, args.trace)
    work = (roofline.decode if decodes else roofline.prefill)(config, *sizes, args.ep, rank.local)
    figures = evaluate(config, took["plain"], took.get("halves"), parts, work, ceilings)
    records = memory + show(args, figures) + show_cluster(args, config, figures)
    if args.chart is not None:
        save_chart(args.chart, args, figures)
    if args.out is not None:
        save(records, args.out)
