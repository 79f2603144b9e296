"""Measure how moving experts slows the steps that run meanwhile, on one rank of a large deployment.

The rank decodes while every slot of every layer is filled again from host memory.

    python -m scripts.bench.one_rank.rebalance --ep 72 --batch 128 --kv 2048

The rank is that of scripts.bench.one_rank, with SIMULATED arrivals. The experts are moved by `disagg/rebalance.py`
itself. First a map is requested that gives each rank the experts of the next rank. Then a look counts, decides and
moves, as in a job.

The checkpoint is a file of a few experts of the real size. They stand in for all experts, modulo their number. The file
is in the page cache; these times hold for a real checkpoint only if that is cached too.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from disagg.rebalance import Rebalancer, short_switches
from kernels.fp8_format import BLOCK
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.pages import pages_for
from model.slots import IDENTITY, Slots
from model.weights import ExpertReader
from parallel.load_counter import LoadCounter
from scripts.bench.lib.flags import SIZES, positive
from scripts.bench.lib.measurements import Measurement, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.one_rank.rank import Rank, RankStep, add_flags, add_measuring_flags, check_decode, check_flags

NEVER = 10**9  # steps
MOST = 1.5  # the longest step while experts move, over the median of the others


class StandIns(ExpertReader):
    """A reader of a folder with `count` experts of the first MoE layer, which stand in for all experts."""

    def __init__(self, folder: Path, config: ModelConfig, count: int) -> None:
        self.count = count
        write_experts(folder, config, count)
        super().__init__(Checkpoint(folder, config), config)

    def read(self, layer: int, expert: int, into: Slots, slot: int) -> None:
        super().read(0, expert % self.count, into, slot)
        into[slot][IDENTITY].fill_(expert)


def write_experts(folder: Path, config: ModelConfig, count: int) -> None:
    width, hidden = config.moe_intermediate_size, config.hidden_size
    tensors = {}
    for expert in range(count):
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            key = f"model.layers.{config.first_k_dense_replace}.mlp.experts.{expert}.{name}_proj.weight"
            tensors[key] = torch.randn(shape, dtype=torch.bfloat16)
            if config.fp8:
                tensors[key] = tensors[key].to(torch.float8_e4m3fn)
                tensors[f"{key}_scale_inv"] = torch.full([-(-n // BLOCK) for n in shape], shape[1] ** -0.5)
    save_file(tensors, folder / "model.safetensors")


def timed(step: RankStep, rebalancer: Rebalancer, going: Callable[[int], bool], on_gpu: bool) -> list[float]:
    """Run steps while `going(steps so far)`. Return the milliseconds between the ends of successive steps.

    As in the engine, a step is launched while the one before it runs.
    """

    def mark() -> torch.cuda.Event | float:
        if not on_gpu:
            return 1e3 * time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    while going(len(marks) - 1):
        rebalancer.advance((rebalancer.vote(),))
        step.run()
        rebalancer.step()
        marks.append(mark())
        if on_gpu:
            marks[-2].synchronize()
    if on_gpu:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]
    return [b - a for a, b in pairwise(marks)]


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_flags(add, ep=72)
    for name, default, what in (
        ("batch", 128, SIZES["batch"]),
        ("kv", 2048, SIZES["kv"]),
        ("experts", 16, "experts in the file"),
        ("layers-per-step", 1, "layers that move at once"),
    ):
        add(f"--{name}", type=positive, default=default, help=f"{what} ({default})")
    add_measuring_flags(add)
    return parser, parser.parse_args()


@torch.inference_mode()
def main() -> None:
    parser, args = parse()
    with refusals(parser):
        config, device = check_flags(args)
        check_decode(config, [args.batch], args.kv)
        if args.ep < 2:
            raise ValueError(f"--ep {args.ep}: it must be at least 2, for experts to move")
        if args.experts > config.n_routed_experts:
            raise ValueError(f"--experts {args.experts}: of {args.shape} it must be at most {config.n_routed_experts}")
    on_gpu = device.type == "cuda"
    rank = Rank(args, config, device, args.kv, args.batch * pages_for(args.kv))
    rank.model.load_counter = LoadCounter(rank.model.placement, config.n_routed_experts)
    with tempfile.TemporaryDirectory() as folder, short_switches():
        reader = StandIns(Path(folder), config, args.experts)
        rebalancer = Rebalancer(rank.model, rank.mesh, reader, NEVER, layers_per_step=args.layers_per_step)
        size, local = rebalancer.spare.slot_bytes, rebalancer.placement.slots_per_rank
        print(f"{config.num_moe_layers} layers of {local} slots of {size / 1e6:.3f} MB on this rank", flush=True)
        step = rank.decode(args.batch, args.kv)
        timed(step, rebalancer, lambda steps: steps < 3, on_gpu)
        still = timed(step, rebalancer, lambda steps: steps < args.repeat, on_gpu)

        def moving(what: str) -> list[Measurement]:
            """Measure steps until the rebalancer is idle, and two more, so that the last flip is among them."""
            before = rebalancer.stats.copy()
            steps = timed(step, rebalancer, lambda steps: steps < 2 or not rebalancer.idle, on_gpu)
            rebalancer.interval = NEVER
            steps += timed(step, rebalancer, lambda steps: steps < 2, on_gpu)
            done = {name: value - before[name] for name, value in rebalancer.stats.items()}
            if done["rebalance_failures"] or (what == "every slot anew" and not done["rebalances_total"]):
                raise RuntimeError(f"it did not move: {done}")
            seconds, moved = done["rebalance_seconds"], done["experts_staged"] * size
            ratio = max(steps) / median(still)
            print(
                f"{what}: {seconds:.2f} s, {len(steps)} steps, {done['experts_staged']} experts, {moved / 1e9:.2f} GB; "
                f"median step {median(steps):.3f} ms, longest {max(steps):.3f} ms, {ratio:.2f} x the median without"
            )
            name = f"one rank of EP{args.ep}, decode, experts on the move ({what}), simulated arrivals"
            return [
                Measurement(f"{name}: the longest step", round(max(steps), 3), "ms", "lower"),
                Measurement(
                    f"{name}: the longest step over the median of others", round(ratio, 3), "x", "lower", MOST,
                    "the most that this project allows itself",
                ),
                Measurement(f"{name}: until all have moved", round(seconds, 3), "s", "lower"),
                Measurement(f"{name}: staged from host memory", round(moved / 1e9, 3), "GB", "lower"),
            ]  # fmt: skip

        print(f"no moves: {len(still)} steps, median {median(still):.3f} ms, longest {max(still):.3f} ms", flush=True)
        what = f"one rank of EP{args.ep}, decode, experts at rest, simulated arrivals"
        records = [Measurement(f"{what}: the step", round(median(still), 3), "ms", "lower")]
        rebalancer.request(rebalancer.map.roll(-local, 1))
        records += moving("every slot anew")
        rebalancer.interval = 1  # a look is due at once
        records += moving("a look and what it decides")
        rebalancer.close()
        step.close()
    if args.out is not None:
        save(records, args.out)


if __name__ == "__main__":
    main()
