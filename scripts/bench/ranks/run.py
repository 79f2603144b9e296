"""Compare ways to run a model with random weights over all GPUs of a job.

Expert parallelism with and without two-batch overlap; plain tensor parallelism; and balanced experts under skewed
routing.

    torchrun --nproc-per-node 8 -m scripts.bench.ranks --shape v3 --layers 12 --out records.json
    torchrun --nproc-per-node 2 -m scripts.bench.ranks --shape v3 --layers 8 --only skewed,static,live

ep        DP attention, EP experts, no overlap
overlap   like ep, with two-batch overlap
tp        plain tensor parallelism (plain_tp.py); its single replica gets the requests of all ranks
skewed    like ep, while the experts' popularity follows Zipf's law (skew.py)
static    like skewed, with --redundant more slots, and a map made for the loads that `skewed` counted
live      like skewed, with --redundant more slots, starting from an even map; looks every --interval steps and moves
          experts (a few experts in host memory stand in for all); measured after the first move, with further looks

Figures are tokens per second and GPU: prefill by prompt length, decode by batch per GPU and prompt length. They are
measured as in scripts.bench.engine. The variants run one after another, each with its own engine.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from disagg.config import EngineConfig, Rebalance
from disagg.engine import Engine
from disagg.experts import balanced, make_placement
from disagg.warm_up import warm_up
from model.config import ModelConfig
from model.pages import PAGE, pages_for
from parallel.dispatchers import CHOICES, Dispatchers, make_dispatchers
from parallel.eplb import balancedness
from parallel.load_counter import LoadCounter
from parallel.mesh import Mesh
from scripts.bench.engine.run import Bench, generated, random_model
from scripts.bench.lib.flags import fraction, natural, new_file, positive, positives
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES, check_size
from scripts.bench.one_rank.rebalance import StandIns
from scripts.bench.ranks.plain_tp import plain_tp, sliced_experts
from scripts.bench.ranks.skew import skew_gates

VARIANTS = ("ep", "overlap", "tp", "skewed", "static", "live")
BESIDE = {"overlap": "ep", "tp": "ep", "static": "skewed", "live": "static"}  # the reference of each
SKEWED = ("skewed", "static", "live")
STAND_INS = 16  # experts in host memory
LOOKS = 10  # within these the experts must have moved


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="v3", help="the model (v3)")
    add("--layers", type=positive, help="layers of the model (the shape's)")
    add("--only", default=",".join(VARIANTS), help=f"variants, separated by commas ({','.join(VARIANTS)})")
    add("--prompt", type=positives, default=[1024, 2048, 4096], help="prompt lengths (1024,2048,4096)")
    add("--batch", type=positives, default=[32, 64, 128, 256], help="decode: requests per GPU (32,64,128,256)")
    add("--output", type=positive, default=64, help="decode steps (64)")
    add("--step-tokens", type=positive, default=16384, help="prompt tokens per GPU and step (16384)")
    add("--kv-tokens", type=positive, help="tokens of KV per GPU (all that fit); batches that need more are left out")
    add("--repeat", type=positive, default=3, help="runs per median (3)")
    add("--zipf", type=fraction, default=0.5, help="exponent of the experts' popularity (0.5)")
    add("--redundant", type=natural, default=32, help="slots beyond the experts (32)")
    add("--interval", type=positive, default=50, help="live: steps between looks (50)")
    add("--dispatch", choices=CHOICES, default="auto", help="library of dispatch and combine (auto)")
    add("--backend", action="append", metavar="[OP=]LIB", help="force a library, as in run.py")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    wanted = set(args.only.split(","))
    if unknown := wanted - set(VARIANTS):
        parser.error(f"--only {','.join(sorted(unknown))}: the variants are {', '.join(VARIANTS)}")
    args.only = [variant for variant in VARIANTS if variant in wanted]
    if "static" in args.only and "skewed" not in args.only:
        parser.error("--only static: it needs what skewed counts: --only skewed,static")
    return parser, args


def check(args: argparse.Namespace, mesh: Mesh) -> ModelConfig:
    """Return the model's configuration. Raises ValueError for wrong flags, before the first variant takes time."""
    config, ranks = SHAPES[args.shape], mesh.size
    least, all_layers = config.first_k_dense_replace + 1, config.num_hidden_layers
    if args.layers is not None and not least <= args.layers <= all_layers:
        raise ValueError(f"--layers {args.layers}: of {args.shape} it must be in [{least}, {all_layers}]")
    if {"skewed", "static", "live"} & set(args.only) and config.topk_method != "noaux_tc":
        raise ValueError(f"--only skewed, static, live: they set a gate's bias, which {args.shape} lacks")
    slots, experts = config.n_routed_experts + args.redundant, config.n_routed_experts
    if {"static", "live"} & set(args.only) and (slots % ranks or args.redundant > experts * ranks):
        raise ValueError(
            f"--redundant {args.redundant}: ({experts} + redundant) % {ranks} ranks must be 0, and it must be at most "
            f"{experts} x {ranks} = {experts * ranks}"
        )
    longest = max(args.prompt) + generated(args, max(args.prompt), max(args.batch))
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"--prompt and --output make requests of {longest} tokens; {args.shape} takes "
            f"{config.max_position_embeddings}"
        )
    config = replace(config, num_hidden_layers=args.layers or all_layers)
    check_size(args.shape, config, mesh.device.type)
    return config


class Comparison(Report):
    """Runs the variants and reports their figures."""

    def __init__(self, args: argparse.Namespace, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(mesh.rank)
        self.args, self.config, self.mesh = args, config, mesh
        self.found: dict[tuple[str, str], float] = {}  # by variant and work
        self.counts: Tensor | None = None  # [layers, E] tokens per expert, counted in `skewed`

    def add(self, variant: str, work: str, value: float, unit: str = "tok/s") -> None:
        self.found[variant, work] = value = round(value, 3)
        beside = BESIDE.get(variant)
        reference = self.found.get((beside, work))
        source = f"{beside}, same run" if reference else ""
        name = f"{self.args.shape} with {self.config.num_hidden_layers} layers on {self.mesh.size} ranks, {variant}"
        if variant in SKEWED:
            name += f" (Zipf {self.args.zipf:g})"
        name += "".join(f", --backend {one}" for one in self.args.backend or [])
        self.keep(Measurement(f"{name}: {work}", value, unit, "higher", reference, source))

    def run(self, variant: str) -> None:
        """Build, measure and free one variant. Nothing of it stays on the GPU."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            engine = self.engine(variant, Path(folder))
            built = time.perf_counter() - start
            warm_up(engine)
            self.say(f"{variant}: built in {built:.1f} s, ready after {time.perf_counter() - start:.1f} s")
            bench = Bench(engine)
            if variant == "live":
                self.settle(bench)
            self.measure(variant, bench)
            if variant in SKEWED:
                self.look(variant, engine)
            engine.close()
        del engine, bench
        gc.collect()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def engine(self, variant: str, folder: Path) -> Engine:
        args, mesh, config = self.args, self.mesh, self.config
        if variant == "tp":
            mesh, config = plain_tp(mesh, config)
        together, longest = mesh.attn.size, max(args.prompt)
        settings = EngineConfig(
            max_batch=together * max(args.batch),
            max_tokens_per_step=together * max(args.step_tokens, *args.batch),
            kv_tokens=args.kv_tokens and together * args.kv_tokens,
            max_model_len=longest + generated(args, longest, max(args.batch)),
            dtype="bfloat16",
            overlap="on" if variant == "overlap" else "off",
            dispatch="auto" if variant == "tp" else args.dispatch,
            rebalance=Rebalance(args.interval if variant == "live" else 0),
        )
        placement = None
        if variant == "static":
            placement = balanced(self.counts, config.n_routed_experts + args.redundant, config.n_group, mesh)
        elif variant == "live":
            placement = make_placement(config, mesh, args.redundant, None)
        model = random_model(config, mesh, settings.model_len(config), args.backend or ["auto"], placement)
        if variant in SKEWED:
            skew_gates(model, args.zipf)
            model.load_counter = LoadCounter(model.placement, config.n_routed_experts)
        reader = StandIns(folder, config, min(STAND_INS, config.n_routed_experts)) if variant == "live" else None

        def make(*how: Any, **rest: Any) -> Dispatchers:
            local = make_dispatchers(*how, **rest)
            return sliced_experts(local, mesh) if variant == "tp" else local

        engine = Engine(settings, model, mesh, self.say, reader, make=make)
        self.say(f"{variant}: dispatch: {engine.dispatchers.why}; overlap: {engine.rule.why}; fp8: {model.fp8}")
        return engine

    def measure(self, variant: str, bench: Bench) -> None:
        args, gpus, together = self.args, self.mesh.size, bench.engine.mesh.attn.size
        for length in args.prompt:
            batch = together * min(max(args.batch), max(1, args.step_tokens // length))

            def prefill(length: int = length, batch: int = batch) -> float:
                return bench.prefill(batch, length)

            self.add(variant, f"prefill of prompts of {length}, a GPU", self.often(prefill) / gpus)
        for length in args.prompt:
            for batch in args.batch:
                steps = generated(args, length, batch)
                work = f"decode, batch {batch} a GPU after {length}, a GPU"
                wanted = together * batch * pages_for(length + steps) * PAGE
                if wanted > bench.engine.kv_tokens:
                    self.say(f"{variant}: {work}: left out, {wanted:,} tokens of KV do not fit")
                    continue

                def decode(length: int = length, batch: int = batch, steps: int = steps) -> float:
                    return bench.decode(together * batch, length, steps)[0]

                self.add(variant, work, self.often(decode) / gpus)

    def often(self, rate: Callable[[], float]) -> float:
        """Return the median of --repeat runs, after one that does not count."""
        rate()
        return median(rate() for _ in range(self.args.repeat))

    def settle(self, bench: Bench) -> None:
        """Decode until the experts have moved. Raises RuntimeError if they do not."""
        rebalancer, args = bench.engine.rebalancer, self.args
        for _ in range(-(-LOOKS * args.interval // args.output)):
            bench.drive(max(args.batch), min(args.prompt), args.output)
            if all(self.mesh.ep.exchange(rebalancer.stats["rebalances_total"] > 0, bool)):
                return
        raise RuntimeError(f"the experts did not move: {dict(rebalancer.stats)}")

    def look(self, variant: str, engine: Engine) -> None:
        """Report how even the ranks' loads were, under the last map."""
        counts = self.mesh.ep.all_reduce(engine.model.load_counter.total()).cpu()
        if variant == "skewed":
            self.counts = counts.float()
        of_slot = engine.model.placement.expert_of_slot.cpu().numpy()
        self.add(variant, "balancedness", float(balancedness(counts.numpy(), of_slot, self.mesh.size).mean()), "")
        if engine.rebalancer is not None:
            stats = engine.rebalancer.stats
            self.say(f"live: {stats['rebalances_total']:.0f} moves, {stats['rebalance_failures']:.0f} failed")


def main() -> None:
    parser, args = parse()
    with refusals(parser):
        mesh = Mesh.create(device=args.device)
        comparison = Comparison(args, check(args, mesh), mesh)
        try:
            for variant in args.only:
                torch.manual_seed(0 if variant == "tp" else mesh.rank)  # the ranks of a replica need the same requests
                comparison.run(variant)
        finally:
            if args.out is not None and mesh.rank == 0:
                save(comparison.records, args.out)
        mesh.close()
