"""Measure the gain of balanced experts on one rank of a deployment, under a recorded load. SIMULATED.

python -m scripts.bench.one_rank.balance decode docs/recordings/moving-decode.safetensors --top-k 4
python -m scripts.bench.one_rank.balance prefill docs/recordings/moving-prefill.safetensors --top-k 4

The rank is that of scripts.bench.one_rank. Its layers have the given shape, with as many experts as the recording has
(run.py --record-experts). In every layer it is the fullest rank, for which all others would wait. Its experts get the
rows that they would get in one window and layer of the recording; another one for each layer.

The load of the fullest rank depends on the map of the experts. The kinds of maps are those of scripts.tools.eplb_sim,
and an even load is measured beside them. Their steps are timed in turns. Communication is not timed, nor is the moving
of experts, which `scripts.bench.one_rank.rebalance` measures.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import ModelConfig
from model.pages import pages_for
from parallel.load_counter import load_recording
from scripts.bench.lib.flags import SIZES, positive
from scripts.bench.lib.measurements import Measurement, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.one_rank.rank import (
    Rank,
    add_flags,
    add_measuring_flags,
    check_decode,
    check_flags,
    check_prefill,
    times,
)
from scripts.bench.one_rank.simulated_load import SimulatedLoad
from scripts.tools.eplb_sim import PAPER, THEIRS, Deployment, maps_of

EVEN = "an even load"


def fullest(counts: NDArray, by_window: list[NDArray], ranks: int, layers: int) -> NDArray:
    """Return the fullest rank's share of all copies, per slot [layers, P / ranks].

    counts: [windows, layers, E]; by_window: each window's map [layers, P]. The `layers` rows of the result are pairs of
    a window and a layer, picked at even distances from all that saw tokens. An expert's copies are spread evenly over
    its slots.
    """
    found = []
    for loads, of_slot in zip(counts, by_window, strict=True):
        if loads.sum():
            replicas = np.stack([np.bincount(row, minlength=loads.shape[1]) for row in of_slot])
            of_one = loads / replicas / loads.sum(1, keepdims=True)
            slots = np.take_along_axis(of_one, of_slot, 1).reshape(len(of_slot), ranks, -1)
            found += list(slots[np.arange(len(slots)), slots.sum(2).argmax(1)])
    picked = np.linspace(0, len(found) - 1, layers).round().astype(int)
    return np.stack(found)[picked]


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    sizes = {"decode": {"batch": 256, "kv": 2048}, "prefill": {"tokens": 16384, "prompt": 4096}}
    for phase, defaults in sizes.items():
        add = phases.add_parser(phase).add_argument
        add("recording", type=Path, help="of run.py --record-experts")
        add_flags(add, ep=12, redundant=4)
        add_measuring_flags(add)
        add("--top-k", type=positive, help="experts per token of the recorded model (the shape's)")
        add("--name", default="", help="what was recorded, for the names of figures")
        for name, default in defaults.items():
            add(f"--{name}", type=positive, default=default, help=f"{SIZES[name]} ({default})")
    return parser, parser.parse_args()


def build(args: argparse.Namespace, counts: NDArray) -> tuple[Rank, dict[str, NDArray]]:
    """Return the rank, and the load of its slots by kind of map. Raises ValueError for flags that cannot work."""
    experts = {"n_routed_experts": counts.shape[2], "n_group": 1, "topk_group": 1}
    if args.top_k is not None:
        experts["num_experts_per_tok"] = args.top_k
    config, device = check_flags(args, **experts)
    slots = config.n_routed_experts + args.redundant
    loads = {EVEN: np.full((1, slots // args.ep), 1 / slots)}
    for name, by_window in maps_of(counts, Deployment(args.ep, slots), 1, [1]).items():
        loads[name] = fullest(counts, by_window, args.ep, config.num_moe_layers)
    if (largest := max(shares.max() for shares in loads.values())) * config.num_experts_per_tok > 1:
        raise ValueError(
            f"--top-k {config.num_experts_per_tok}: an expert gets {largest:.3f} of all copies in {args.recording}, "
            f"and can get at most 1 / top-k"
        )
    return make_rank(args, config, device), loads


def make_rank(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> Rank:
    if args.phase == "decode":
        check_decode(config, [args.batch], args.kv)
        return Rank(args, config, device, args.kv, args.batch * pages_for(args.kv))
    check_prefill(config, [args.tokens], args.prompt)
    return Rank(args, config, device, args.prompt, args.tokens // args.prompt * pages_for(args.prompt))


@torch.inference_mode()
def main() -> None:
    parser, args = parse()
    with refusals(parser):
        counts = load_recording(args.recording).numpy()
        rank, loads = build(args, counts)
    make, sizes = (rank.decode, (args.batch, args.kv)) if args.phase == "decode" else (
        rank.prefill, (args.tokens, args.prompt))  # fmt: skip
    top_k, steps = rank.config.num_experts_per_tok, {}
    for name, shares in loads.items():
        arriving = partial(arrivals_of, shares.tolist(), args.ep, top_k)
        steps[name] = make(*sizes, arriving=arriving)
    took = times({name: step.run for name, step in steps.items()}, rank.device, args.repeat)
    what = f"{args.name or args.recording.stem}, {args.phase} at EP{args.ep} with {args.redundant} redundant experts"
    what += f", one rank of {args.shape}'s layers with {rank.config.n_routed_experts} experts, {sizes[0]} x {sizes[1]}"
    records = []
    for name, ms in took.items():
        rows = loads[name].sum(1).mean() * args.ep
        gain = took["unbalanced"] / ms
        print(f"{name:>20}: the fullest rank has {rows:.3f} of the mean, {ms:9.3f} ms a step, {gain:.3f}x (simulated)")
        title = f"{what}, {name if name == EVEN else f'{name} map'}"
        records.append(Measurement(f"{title}: the step", round(ms, 3), "ms", "lower", kind="simulated"))
        if name not in (EVEN, "unbalanced"):
            throughput = f"{title}: throughput over an unbalanced map's"
            records.append(
                Measurement(throughput, round(gain, 4), "x", "higher", PAPER[args.phase], THEIRS, "simulated")
            )
    for step in steps.values():
        step.close()
    if args.out is not None:
        save(records, args.out)


def arrivals_of(shares: list[list[float]], ranks: int, top_k: int, tokens: int) -> list[SimulatedLoad]:
    return [SimulatedLoad.of_shares(row, tokens, ranks, top_k) for row in shares]


if __name__ == "__main__":
    main()
