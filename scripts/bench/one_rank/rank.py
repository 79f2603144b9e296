"""One rank of a large deployment on one GPU, for benchmarks: a model with random weights, and its steps.

Arrivals from the other ranks are SIMULATED (`loopback.py`). A step runs whole or as two micro-batches that overlap.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from disagg.fixed_inputs import FixedInputs
from disagg.graphs import Graphs
from disagg.steps import DecodeStep
from disagg.warm_up import compilers
from kernels.backend import choose
from kernels.compile_ahead import CompileAhead
from kernels.ops import Ops
from model.batch import Batch, Chunk, Decodes, split
from model.config import ModelConfig
from model.dummy import randomize
from model.kv_cache import make_pool
from model.pages import pages_for
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh, pick_device
from parallel.placement import Placement
from scripts.bench.lib.flags import natural, new_file, positive
from scripts.bench.lib.shapes import SHAPES, check_size
from scripts.bench.one_rank.loopback import Arriving, LoopbackContiguous, LoopbackMasked
from scripts.bench.one_rank.simulated_link import SimulatedLink
from scripts.bench.one_rank.simulated_load import SimulatedLoad, share_of_tokens


def add_flags(add: Callable[..., object], ep: int, redundant: int = 32) -> None:
    """Add the flags of every benchmark of one rank."""
    add("--ep", type=positive, default=ep, help=f"ranks of the deployment ({ep})")
    add("--redundant", type=natural, default=redundant, help=f"slots beyond the experts ({redundant})")
    add("--skew", type=float, default=1.0, help="the fullest expert's rows over the mean (1)")
    add("--shape", choices=SHAPES, default="v3", help="the model (v3)")
    add("--layers", type=int, help="layers of the model (the shape's)")
    add("--backend", action="append", metavar="[OP=]LIB", help="force a library, as in run.py")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")


def add_measuring_flags(add: Callable[..., object]) -> None:
    add("--repeat", type=positive, default=20, help="steps per median (20)")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")


def check_flags(args: argparse.Namespace, **other: int) -> tuple[ModelConfig, torch.device]:
    """Return the shape and the device that the flags of `add_flags` name. `other`: fields of the shape to replace.

    Raises ValueError for flags that cannot work.
    """
    config = replace(SHAPES[args.shape], **other)
    if not 1 <= args.skew <= 2:
        raise ValueError(f"--skew {args.skew:g}: it must be in [1, 2]")
    slots = config.n_routed_experts + args.redundant
    if slots % args.ep:
        raise ValueError(
            f"--ep {args.ep}, --redundant {args.redundant}: (experts + redundant) % ep must be 0, "
            f"not {slots} % {args.ep} = {slots % args.ep}"
        )
    if config.num_experts_per_tok * args.skew > slots:
        raise ValueError(
            f"--skew {args.skew:g}: skew * experts a token <= experts + redundant must hold, "
            f"not {args.skew:g} * {config.num_experts_per_tok} <= {slots}"
        )
    least, all_layers = config.first_k_dense_replace + 1, config.num_hidden_layers
    if args.layers is not None and not least <= args.layers <= all_layers:
        raise ValueError(f"--layers {args.layers}: of {args.shape} it must be in [{least}, {all_layers}]")
    device = pick_device(args.device)
    config = replace(config, num_hidden_layers=args.layers or all_layers)
    check_size(args.shape, config, device.type)
    return config, device


def check_decode(config: ModelConfig, batches: Sequence[int], kv: int, halves: bool = False) -> None:
    """Raise ValueError for sizes that cannot work. `halves`: steps are cut into two micro-batches."""
    _check_length(config, "kv", kv)
    for batch in batches:
        if halves and batch % 2:
            raise ValueError(f"--batch {batch}: batch % 2 must be 0, not {batch} % 2 = 1: it is cut in halves")


def check_prefill(config: ModelConfig, tokens: Sequence[int], prompt: int, halves: bool = False) -> None:
    """Raise ValueError as in `check_decode`. With `halves` a prompt across the cut is cut too."""
    _check_length(config, "prompt", prompt)
    for count in tokens:
        if halves and count < 2:
            raise ValueError(f"--tokens {count}: it must be at least 2: it is cut in halves")
        if count % prompt:
            raise ValueError(f"--tokens {count}: tokens % prompt must be 0, not {count} % {prompt} = {count % prompt}")


def _check_length(config: ModelConfig, name: str, tokens: int) -> None:
    if tokens > config.max_position_embeddings:
        raise ValueError(f"--{name} {tokens}: the shape's longest sequence is {config.max_position_embeddings}")


@dataclass(frozen=True)
class RankStep:
    run: Callable[[], object]  # for decode on a GPU: replays a CUDA graph
    eager: Callable[[], object]
    close: Callable[[], None] = lambda: None  # frees the graph


class Rank:
    """The model, with a KV pool of `pages` pages and the null page."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: ModelConfig,
        device: torch.device,
        length: int,
        pages: int,
        of_ops: Callable[[Ops], Ops] = lambda ops: ops,
    ) -> None:
        """`args`: the flags of `add_flags`. `length`: tokens of the longest sequence. `of_ops`: wraps the ops.

        Raises ValueError for values that do not fit together.
        """
        self.config, self.device, self.ep, self.skew = config, device, args.ep, args.skew
        self.dtype = torch.bfloat16
        self.slots = config.n_routed_experts + args.redundant
        table = torch.arange(self.slots, device=device) % config.n_routed_experts
        first, layers = torch.arange(config.n_routed_experts, device=device), config.num_moe_layers
        placement, of_drafts = (
            Placement(first.repeat(count, 1), table.repeat(count, 1), args.ep) for count in (layers, 1)
        )
        ops, self.choices = choose(op_shape(config), self.dtype, device, args.backend or ())
        self.ops = of_ops(ops)
        self.mesh = Mesh(device=device)
        self.model = Transformer(config, self.mesh, placement, self.ops, self.dtype, length + 1, config.fp8, of_drafts)
        randomize(self.model)
        self.pool = make_pool(config, pages + 1, self.dtype, device)
        for layer in self.pool:
            layer.normal_()

    @property
    def local(self) -> int:
        """Slots on this rank."""
        return self.slots // self.ep

    def even(self, tokens: int) -> tuple[SimulatedLoad]:
        """Return the load of uniform routing with the imbalance of --skew: the same in every layer."""
        c = self.config
        hit = share_of_tokens(c.n_routed_experts, self.ep, c.num_experts_per_tok, c.n_group, c.topk_group)
        return (SimulatedLoad.even(tokens, self.ep, c.num_experts_per_tok, self.slots, self.skew, hit),)

    def decode(
        self,
        batch: int,
        kv: int,
        link: SimulatedLink | None = None,
        overlap: bool = False,
        arriving: Arriving | None = None,
    ) -> RankStep:
        """Make a step with one token for each of `batch` sequences, which attend to `kv` tokens.

        With `overlap` it runs in two halves of the rows, as in the engine, so `batch` must be even.
        """
        config, each = self.config, pages_for(kv)
        masked = LoopbackMasked(
            arriving or self.even, batch, self.ep * batch, config.hidden_size, self.ops, self.device, config.fp8,
            self.dtype, link,
        )  # fmt: skip
        tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)

        def forward(rows: Batch, halves: tuple[Batch, Batch] | None, *_: None) -> Tensor:
            return self.model(rows, self.pool, masked, halves)

        inputs, graphs = FixedInputs(2, batch, each, self.device), Graphs()
        step = DecodeStep(forward, tokens, [batch], inputs, graphs, lambda rows: overlap)
        pages = [range(1 + i * each, 1 + (i + 1) * each) for i in range(batch)]
        decodes = Decodes(np.arange(batch), np.full(batch, kv - 1), pages)
        eager = partial(step.run, decodes, batch, eager=True)
        self._run_first(eager, batch, kv, overlap)
        if self.device.type != "cuda":
            return RankStep(eager, eager)
        graphs.capture(lambda rows: step.run(decodes, rows), [batch], "decode steps")
        torch.cuda.empty_cache()  # the eager steps' memory: the graph has its own, and little is free
        return RankStep(partial(step.run, decodes, batch), eager, graphs.reset)

    def prefill(
        self,
        tokens: int,
        prompt: int,
        link: SimulatedLink | None = None,
        overlap: bool = False,
        arriving: Arriving | None = None,
    ) -> RankStep:
        """Make a step of prompts of `prompt` tokens, `tokens` together. With `overlap` it is cut as in the engine."""
        config, each = self.config, pages_for(prompt)
        like = torch.zeros(1, config.hidden_size, dtype=self.dtype, device=self.device)
        contiguous = LoopbackContiguous(
            arriving or self.even, tokens, config.hidden_size, config.num_experts_per_tok, self.ops,
            self.ops.quantize_1x128(like) if config.fp8 else like, link,
        )  # fmt: skip
        ids = [i * 7919 % config.vocab_size for i in range(prompt)]
        prompts = [Chunk(ids, 0, range(1 + i * each, 1 + (i + 1) * each)) for i in range(tokens // prompt)]
        batch = Batch.build([], prompts, self.device)
        halves = tuple(Batch.build(*part, self.device) for part in split([], prompts)) if overlap else None
        run = lambda: self.model(batch, self.pool, contiguous, halves)  # noqa: E731
        self._run_first(run, tokens, prompt, overlap)
        return RankStep(run, run)

    def _run_first(self, step: Callable[[], object], *sizes: int) -> None:
        """Run a step once. Its kernels, of these sizes, compile many at once."""
        if self.device.type == "cuda":
            ahead = CompileAhead(compilers(self.ops, alone=True)[0], repr((self.config, sizes)))
            with ahead.installed():
                with ahead.rehearsal():
                    step()
                for problem in ahead.finish() or ():
                    print(f"warning: a kernel was not compiled ahead: {problem}", file=sys.stderr)
        step()


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def times(runs: dict[str, Callable[[], object]], device: torch.device, repeat: int) -> dict[str, float]:
    """Return the median milliseconds of each run, in turns, so that a GPU's changing clock affects all alike."""
    taken: dict[str, list] = {name: [] for name in runs}
    for _ in range(repeat + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                run()
                marks[1].record()
            else:
                marks = [time.perf_counter()]
                run()
                marks.append(time.perf_counter())
            taken[name].append(marks)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return {name: median(a.elapsed_time(b) for a, b in pairs[1:]) for name, pairs in taken.items()}
    return {name: 1e3 * median(b - a for a, b in pairs[1:]) for name, pairs in taken.items()}
