"""Measure the engine's offline throughput with random weights of a given shape: prefill, and decode by batch size.

    python -m scripts.bench.engine --shape moonlight --batch 1,32,64,128 --prompt 1024 --output 128 --out records.json
    python -m scripts.bench.engine --peer                                        # beside vLLM, else transformers
    python -m scripts.bench.engine --peer vllm --peer-python "source peer/env.sh && python3"
    python -m scripts.bench.engine --peer sglang --peer-python "source sglang/env.sh && python3"
    torchrun --nproc-per-node 2 -m scripts.bench.engine --shape v3 --layers 6 --batch 128 --prefill-batch 16
    python -m scripts.bench.engine --speculate 1,2 --accept 0.6 --batch 1,32,128

On a GPU the reference of each rate is a roofline (scripts.bench.lib.roofline). It is modelled from this GPU's ceilings,
which are measured in the same run. With --peer the same work first goes through another engine (peer.py). Its
environment should not inherit ours: --peer-python "unset PYTHONPATH LD_PRELOAD; source ..." prevents that.

Under torchrun each rank has a batch of its own, and the ranks share the experts. Sizes are per rank. Rates and
rooflines are sums over all ranks; a roofline counts no communication. A shape in fp8 (v3) runs in fp8 where a
checkpoint of that shape would.

With --speculate N,... everything runs without drafts, and then with N of them by a multi-token-prediction layer with
random weights. auto:N is as in run.py; what it has learned, it keeps from batch to batch. Random drafts are hardly ever
right, so acceptance is FORCED: a seeded draw takes each as right with probability --accept, if those before it are.
Every figure with drafts says so. A rate counts the tokens that the steps gave. --peer then runs vLLM's drafts with its
own forced acceptance ("synthetic"), as far as its version has that.

Times are taken on the host. Prefill lasts from the first step until the last request's first token is known. Decode is
timed over the steps in which all requests decode. Requests go through the scheduler and the step loop, as in a job
without a router.
"""

import argparse
import gc
import json
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from disagg.config import EngineConfig, parse_speculate
from disagg.control.messages import Submit
from disagg.engine import Engine
from disagg.pipeline import Pipeline, Turn
from disagg.request import MOST_DRAFTS, Request
from disagg.step import Step, Work
from disagg.unified import Unified
from disagg.warm_up import warm_up
from disagg.warm_up_progress import WarmUpProgress
from kernels.backend import choose
from model.config import ModelConfig
from model.dummy import randomize
from model.precision import decide
from model.transformer import Transformer, op_shape
from parallel.dispatchers import CHOICES
from parallel.mesh import Mesh
from parallel.placement import Placement
from scripts.bench.engine.figures import Drafting, EngineReport
from scripts.bench.engine.peer_config import write_config
from scripts.bench.engine.peer_work import generated
from scripts.bench.lib import roofline
from scripts.bench.lib.flags import new_file, positive, positives, probability
from scripts.bench.lib.forced import forced_acceptance
from scripts.bench.lib.measurements import save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES, check_size
from scripts.bench.lib.step_cost import tokens_per_step


class Mark(NamedTuple):  # because it is cheap: making one counts as the host's time
    """The moment at which the host knew a step's tokens."""

    now: float
    waited: float  # seconds that the host was blocked on them
    launching: float  # seconds so far in which the host launched steps, or waited to launch one
    sequences: int  # that got a token
    tokens: int
    mixed: bool


class Decoded(NamedTuple):
    """Decode steps. The host's time is without that in which it waits for tokens."""

    rate: float  # tokens per second, of all replicas
    host: float  # milliseconds per step
    launching: float  # of these, in the step's launch
    each: float  # tokens per step and request


class Timed(Unified):
    """The unified role, with a mark for each step."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.marks: list[Mark] = []
        self.launching, self.run, engine.run = 0.0, engine.run, self.timed_run

    def timed_run(self, work: Work) -> Step:
        start = time.perf_counter()
        step = self.run(work)
        self.launching += time.perf_counter() - start
        return step

    def take_up(self, step: Step) -> int:
        start = time.perf_counter()
        step.wait()
        now = time.perf_counter()
        sequences = len(step.work.sequences)
        tokens = sequences if step.counts is None else int(step.counts.numpy()[step.work.rows].sum())
        self.marks.append(Mark(now, now - start, self.launching, sequences, tokens, step.work.mixed))
        return super().take_up(step)


class Bench:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.role = Timed(engine)
        self.pipeline = Pipeline(self.role, engine, engine.mesh)
        self.uid = 0

    def drive(self, batch: int, length: int, max_tokens: int) -> float:
        """Run `batch` requests with prompts of `length` tokens to their end. Return the time of the start."""
        vocab = self.engine.config.vocab_size
        for _ in range(batch):
            prompt = torch.randint(vocab, (length,)).tolist()
            self.role.handle(Submit(Request(self.uid, prompt, max_tokens, ignore_eos=True), None))
            self.uid += 1
        self.role.marks.clear()
        start = time.perf_counter()
        while self.pipeline.turn() == Turn.WORKED:
            self.role.updates.clear()
        return start

    def prefill(self, batch: int, length: int) -> float:
        """Measure a prefill. Return prompt tokens per second, of all replicas together."""
        start = self.drive(batch, length, 1)
        return self.engine.mesh.num_replicas * batch * length / (self.role.marks[-1].now - start)

    def decode(self, batch: int, length: int, max_tokens: int) -> Decoded:
        """Measure the steps in which all requests decode."""
        self.drive(batch, length, max_tokens)
        all_decode = [mark for mark in self.role.marks if not mark.mixed and mark.sequences == batch]
        window = all_decode[1:]  # after the last prompt
        seconds = window[-1].now - window[0].now
        host = seconds - sum(mark.waited for mark in window[1:])
        launching, steps = window[-1].launching - window[0].launching, len(window) - 1
        tokens = sum(mark.tokens for mark in window[1:])
        rate = self.engine.mesh.num_replicas * tokens / seconds
        return Decoded(rate, 1e3 * host / steps, 1e3 * launching / steps, tokens / steps / batch)

    def experts_hit(self, batch: int) -> float:
        """Return the mean number of distinct experts per layer and decode step."""
        graphs, rows, found = self.engine.graphs, self.engine.decode.bucket(batch), []
        gates = [layer.mlp.gate for layer in self.engine.model.layers if layer.is_moe]
        hooks = [gate.register_forward_hook(lambda _, __, chosen: found.append(chosen[0])) for gate in gates]
        captured, graphs.captured = graphs.captured, {}  # a replay calls no hook
        self.drive(batch, 4, 6)
        graphs.captured = captured
        for hook in hooks:
            hook.remove()
        counts = [ids[:batch].unique().numel() for ids in found if ids.shape[0] == rows]
        return sum(counts) / max(1, len(counts))


def random_model(
    config: ModelConfig, mesh: Mesh, max_model_len: int, backend: list[str], placement: Placement | None = None
) -> Transformer:
    """Build a model with random weights. `placement`: its experts' slots; by default expert i is in slot i."""
    ops, _ = choose(op_shape(config), torch.bfloat16, mesh.device, backend)
    fp8 = decide(config, mesh.attn.size, torch.bfloat16, mesh.device).fp8
    if placement is None:
        placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size, mesh.device)
    model = Transformer(config, mesh, placement, ops, torch.bfloat16, max_model_len, fp8)
    randomize(model)
    return model


def run_peer(args: argparse.Namespace, config: ModelConfig, drafts: int) -> dict:
    """Run peer.py on the same work and return its figures. A process of its own, because that frees its memory."""
    options = {"batch": ",".join(map(str, args.batch)), "prompt": args.prompt, "output": args.output}
    options |= {"prefill-batch": args.prefill_batch, "step-tokens": args.step_tokens, "repeat": args.repeat}
    options |= {"speculate": drafts, "accept": args.accept} if drafts else {}
    words = [str(Path(__file__).with_name("peer.py")), args.peer, *(f"--{name}={v}" for name, v in options.items())]
    with tempfile.TemporaryDirectory() as folder:
        write_config(config, folder)
        command = f"{args.peer_python} {shlex.join(words)} --model={folder}"
        run = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"{run.stdout[-4000:]}\nthe peer failed (status {run.returncode}): {shlex.join(words)}")
    found = next(line for line in reversed(run.stdout.splitlines()) if line.startswith("{"))
    print(f"the peer's tok/s, drafts: {drafts}: {found}", flush=True)  # in case the rest is cut short
    return json.loads(found)


def draftings(text: str) -> list[Drafting]:
    """Parse numbers of drafts, each N or auto:N, separated by commas."""
    try:
        found = [Drafting(*parse_speculate(part)) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    for drafting in found:
        if not 1 <= drafting.most <= MOST_DRAFTS:
            raise argparse.ArgumentTypeError(f"{drafting} is not 1 to {MOST_DRAFTS} drafts")
    return found


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
    add("--batch", type=positives, default=[1, 32, 64, 128], help="decode batch sizes (1,32,64,128)")
    add("--prompt", type=positive, default=1024, help="tokens of each prompt (1024)")
    add("--output", type=positive, default=128, help="decode steps (128)")
    add("--prefill-batch", type=positive, default=64, help="requests per prefill (64)")
    add("--step-tokens", type=positive, default=16384, help="prompt tokens per step (16384)")
    add("--repeat", type=positive, default=3, help="runs per median (3)")
    add("--layers", type=positive, help="layers of the model (the shape's)")
    add(
        "--peer",
        nargs="?",
        const="auto",
        choices=("auto", "vllm", "sglang", "transformers"),
        help="also run the same work through this engine",
    )
    add(
        "--peer-python",
        default=shlex.quote(sys.executable),
        metavar="CMD",
        help="the peer's Python, as a shell command",
    )
    add("--speculate", type=draftings, default=[], metavar="N,...", help="also with so many drafts per step, or auto:N")
    add("--accept", type=probability, default=0.6, help="FORCED acceptance: how likely a draft counts as right (0.6)")
    add("--backend", action="append", metavar="[OP=]LIB", help="force a library, as in run.py")
    add("--no-graphs", action="store_true", help="run without CUDA graphs")
    add("--overlap", choices=("auto", "on", "off"), default="auto", help="two-batch overlap (auto)")
    add("--dispatch", choices=CHOICES, default="auto", help="library of dispatch and combine (auto)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    if (args.layers or 0) > config.num_hidden_layers:
        parser.error(f"argument --layers: {args.shape} has {config.num_hidden_layers}, not {args.layers}")
    if args.speculate and args.peer in ("sglang", "transformers"):
        parser.error(f"argument --speculate: of the peers vLLM alone can force acceptance, not {args.peer}")
    longest = args.prompt + max(outputs(args).values())
    if longest > config.max_position_embeddings:
        parser.error(f"--prompt and --output make requests of {longest} tokens; {args.shape} takes "
                     f"{config.max_position_embeddings}")  # fmt: skip
    return parser, args


def outputs(args: argparse.Namespace) -> dict[int, int]:
    """Return `generated` for each decode batch."""
    drafts = max((drafting.most for drafting in args.speculate), default=0)
    return {batch: generated(args, args.prompt, batch, drafts) for batch in args.batch}


def measure(bench: Bench, report: EngineReport, args: argparse.Namespace) -> None:
    model = bench.engine.model
    config, ranks = replace(model.config, fp8=model.fp8), bench.engine.mesh.size
    drafts = report.drafting.most
    bench.prefill(args.prefill_batch, args.prompt)
    for batch in dict.fromkeys((args.prefill_batch, 1)):
        rates = [bench.prefill(batch, args.prompt) for _ in range(args.repeat)]
        tokens = min(batch * args.prompt, args.step_tokens)
        work = roofline.prefill(config, tokens, args.prompt, ranks, drafts=drafts)
        report.rate("prefill", batch, f"prefill {batch} x {args.prompt}", median(rates), work)
    for batch, tokens in outputs(args).items():
        runs = [bench.decode(batch, args.prompt, tokens) for _ in range(args.repeat)]
        rates, host, launching, each = zip(*runs, strict=True)
        work = roofline.decode(config, batch, args.prompt + tokens / 2, ranks, drafts=drafts, accept=args.accept)
        report.rate("decode", batch, f"decode, batch {batch} after {args.prompt}", median(rates), work)
        if drafts:
            known = None if report.drafting.adapts else tokens_per_step(drafts, args.accept)
            source = "by the probability" if known else ""
            report.add(f"tokens per step and request, batch {batch}", median(each), "", known, source)
        report.add(f"the host's part of a decode step, batch {batch}", median(host), "ms")
        report.add(f"of that, in the step's launch, batch {batch}", median(launching), "ms")


def named(args: argparse.Namespace, config: ModelConfig, ranks: int) -> str:
    """Return the beginning of the figures' names."""
    graphs = ", without graphs" if args.no_graphs else ""
    if ranks == 1:
        return f"{args.shape}{graphs}"
    return f"{args.shape} with {config.num_hidden_layers} layers, EP{ranks}, overlap {args.overlap}{graphs}"


def ceilings(mesh: Mesh) -> roofline.Ceilings | None:
    """Return the ceilings of the first rank's GPU, while the others wait; None on a CPU."""
    measured = roofline.measure_ceilings() if mesh.device.type == "cuda" and mesh.rank == 0 else None
    return mesh.ep.exchange(measured, roofline.Ceilings | None)[0]


def run(args: argparse.Namespace, mesh: Mesh) -> None:
    """Run the whole benchmark. Raises ValueError for flags that cannot work."""
    torch.manual_seed(mesh.rank)
    if args.peer and mesh.size > 1:
        raise ValueError(f"--peer: it runs beside one rank, not {mesh.size}")
    config = SHAPES[args.shape]
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers)
    check_size(args.shape, config, mesh.device.type)
    drafting = replace(config, num_nextn_predict_layers=1)
    if args.speculate:
        drafting = drafting.drafting()
        check_size(args.shape, drafting, mesh.device.type)
    variants, peers = (Drafting(), *args.speculate), {}
    if args.peer:
        peers = {d: run_peer(args, drafting if d.most else config, d.most) for d in variants if not d.adapts}
    report = EngineReport(named(args, config, mesh.size), ceilings(mesh), peers, mesh.size, mesh.rank)
    try:
        for variant in variants:
            report.begin(variant, args.accept)
            with forced_acceptance(args.accept, mesh.device) if variant.most else nullcontext():
                run_engine(args, mesh, drafting if variant.most else config, report)
            gc.collect()  # an engine is a cycle
            if mesh.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        if args.out is not None and mesh.rank == 0:
            save(report.records, args.out)


def run_engine(args: argparse.Namespace, mesh: Mesh, config: ModelConfig, report: EngineReport) -> None:
    """Make an engine with random weights and measure it, with the drafts that `report` began with."""
    max_batch, length = max(*args.batch, args.prefill_batch), args.prompt + max(outputs(args).values())
    settings = EngineConfig(
        max_batch=max_batch,
        max_tokens_per_step=max(args.step_tokens, max_batch * (1 + report.drafting.most)),
        kv_tokens=max_batch * (length + 64),
        max_model_len=length,
        dtype="bfloat16",
        graphs="off" if args.no_graphs else "auto",
        overlap=args.overlap,
        speculate=report.drafting.most,
        adapts=report.drafting.adapts,
        dispatch=args.dispatch,
    )
    start = time.perf_counter()
    model = random_model(config, mesh, settings.positions(config), args.backend or ["auto"])
    bench = Bench(Engine(settings, model, mesh, report.say))
    report.say(f"dispatch: {bench.engine.dispatchers.why}; overlap: {bench.engine.rule.why}; fp8: {model.fp8}")
    progress = WarmUpProgress(report.say, bar=mesh.rank == 0)
    warm_up(bench.engine, progress)
    if progress.summary:
        report.say(f"warm-up: {progress.summary}")
    report.say(f"ready after {time.perf_counter() - start:.1f} s{report.label}")
    for batch in args.batch if config.num_moe_layers and mesh.size == 1 and not report.drafting.most else ():
        uniform = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch)
        print(f"batch {batch} hits {bench.experts_hit(batch):.1f} experts a layer (uniform routing: {uniform:.1f})")
    measure(bench, report, args)
    if mesh.device.type == "cuda":
        report.say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    bench.engine.close()


def main() -> None:
    parser, args = parse()
    with refusals(parser):
        mesh = Mesh.create(device=args.device)
        run(args, mesh)
        mesh.close()
