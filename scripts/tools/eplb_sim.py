"""Simulate balancing on a recording of expert loads (run.py --record-experts), for any number of ranks. SIMULATED.

python -m scripts.tools.eplb_sim docs/recordings/moving-decode.safetensors --phase decode --groups 4 --ep 4,12
python -m scripts.tools.eplb_sim seen.safetensors --phase prefill --interval 1,5 --ranks-per-node 4,8 --chart c.png

The recording's windows are replayed on each deployment, with three kinds of maps:

    unbalanced   experts in order; redundant slots hold replicas of the first experts
    static       made once, from the loads of all windows: the map knows the load in advance, as in the paper's figures
    remade       made again every `interval` windows, from the windows since the last map; unbalanced until the first

Balancedness is a rank's mean tokens over the fullest rank's, averaged over layers and windows: 1 is perfect. The
implied throughput follows a simple model: a step takes (1 - s) + s / balancedness. Here s is the experts' share of a
balanced step (--experts-share), whose time is that of the fullest rank.

The model leaves out the time of moving experts and all other waiting of ranks for each other. It also leaves out the
unevenness of single steps, because a window sums many steps.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.eplb import balance, balancedness
from parallel.load_counter import load_recording
from scripts.bench.lib.charts import save_lines
from scripts.bench.lib.flags import naturals, new_file, new_png, positive, positives
from scripts.bench.lib.measurements import Measurement, save
from scripts.bench.lib.refusals import refusals

# The share of the experts' kernels in a layer without communication, on H100 with balanced ranks. Prefill: 9.70 of
# 25.77 ms, digitised from SGLang's report of 2025-05-05. Decode: DeepGEMM's published 0.181 ms, beside the report's
# 0.586 ms for the other kernels.
SHARES = {"prefill": 0.38, "decode": 0.24}
SAME, THEIRS = "unbalanced, same recording", "the paper's EPLB ablation, another model and load"
PAPER = {"prefill": 1.49, "decode": 2.54}  # the report's throughput with EPLB over that without


@dataclass(frozen=True)
class Deployment:
    ep: int
    slots: int
    on_node: int = 8  # ranks

    @property
    def nodes(self) -> int:
        return 1 if self.ep % self.on_node else self.ep // self.on_node

    def __str__(self) -> str:
        return f"EP{self.ep}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")


@dataclass(frozen=True)
class Outcome:
    """The result of one kind of map: means over layers and windows."""

    balancedness: float
    imbalance: float  # the fullest rank's tokens over the mean

    def over(self, other: "Outcome", share: float) -> float:
        """Return this map's throughput divided by the other's. `share`: the experts' part of a balanced step."""
        return (1 - share + share * other.imbalance) / (1 - share + share * self.imbalance)


def unbalanced(layers: int, experts: int, slots: int) -> NDArray[np.int64]:
    """Return a map with the experts in order; redundant slots hold replicas of the first ones."""
    return np.tile(np.arange(slots) % experts, (layers, 1))


def maps_of(
    counts: NDArray, deployment: Deployment, groups: int, intervals: Sequence[int]
) -> dict[str, list[NDArray[np.int64]]]:
    """Make each kind of map from counts [windows, layers, E]: a map [layers, slots] per window.

    An interval of 5 gives the kind "remade every 5".
    """
    windows, layers, experts = counts.shape
    d, plain = deployment, unbalanced(layers, experts, deployment.slots)

    def made(loads: NDArray) -> NDArray[np.int64]:
        return balance(loads, d.slots, d.ep, groups, d.nodes)

    maps = {"unbalanced": [plain] * windows, "static": [made(counts.sum(0))] * windows}
    for interval in intervals:
        remade = [plain, *(made(counts[w - interval : w].sum(0)) for w in range(interval, windows, interval))]
        maps[f"remade every {interval}"] = [remade[w // interval] for w in range(windows)]
    return maps


def replay(counts: NDArray, deployment: Deployment, groups: int, intervals: Sequence[int]) -> dict[str, Outcome]:
    """Return the outcome of each kind of map. Windows without tokens do not count."""
    seen = [w for w in range(len(counts)) if counts[w].sum()]
    found = {}
    for name, by_window in maps_of(counts, deployment, groups, intervals).items():
        even = np.stack([balancedness(counts[w], by_window[w], deployment.ep) for w in seen])
        found[name] = Outcome(float(even.mean()), float((1 / even).mean()))
    return found


def deployments(experts: int, args: argparse.Namespace) -> list[Deployment]:
    """Return all combinations of the flags whose slots divide over the ranks, and print the others."""
    found = []
    for ep, extra in product(args.ep, args.redundant):
        if (experts + extra) % ep:
            print(f"EP{ep}: {experts} + {extra} slots do not divide")
        else:
            found += [Deployment(ep, experts + extra, on_node) for on_node in args.ranks_per_node]
    return found


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def parse() -> tuple[argparse.Namespace, NDArray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recording", type=Path, help="of run.py --record-experts")
    add("--phase", choices=PAPER, required=True, help="the side that was recorded")
    add("--ep", type=positives, default=[4, 12], help="numbers of ranks (4,12)")
    add("--redundant", type=naturals, default=[0, 4], help="slots beyond the experts (0,4)")
    add("--interval", type=positives, default=[1], help="windows between two maps (1)")
    add("--ranks-per-node", type=positives, default=[8], help="(8); if the ranks do not divide, they count as one node")
    add("--groups", type=positive, default=1, help="the model's n_group (1)")
    add(
        "--experts-share",
        type=share,
        metavar="S",
        help="the experts' share of a balanced step (prefill 0.38, decode 0.24)",
    )
    add("--name", default="", help="what was recorded, for the names of figures and for the chart")
    add("--chart", type=new_png, metavar="PNG", help="draw balancedness and throughput by number of ranks")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    with refusals(parser):
        counts = load_recording(args.recording).numpy()
    if counts.shape[2] % args.groups:
        parser.error(f"argument --groups: {counts.shape[2]} experts do not divide into {args.groups}")
    if max(args.redundant) > (most_slots := counts.shape[2] * min(args.ep)):
        parser.error(
            f"argument --redundant: it must be at most experts x ranks ({most_slots}), not {max(args.redundant)}"
        )
    if not any((counts.shape[2] + extra) % ep == 0 for ep, extra in product(args.ep, args.redundant)):
        parser.error(
            f"no deployment: (experts + --redundant) % --ep must be 0 for one of each; {counts.shape[2]} experts"
        )
    args.experts_share = args.experts_share or SHARES[args.phase]
    return args, counts


def main() -> None:
    args, counts = parse()
    windows, layers, experts = counts.shape
    of, paper = args.experts_share, PAPER[args.phase]
    print(f"{args.phase}: {windows} windows, {layers} layers, {experts} experts, {counts.sum():,} copies; simulated")
    print(f"throughput over unbalanced, with experts {of:.0%} of a balanced step; the paper's ablation: {paper}x")
    print(f"{'deployment':>18} {'redundant':>9} {'map':>15} {'balancedness':>12} {'throughput':>10}")
    records, lines, what = [], {}, f"{args.name}, {args.phase}".removeprefix(", ")
    several = len(args.ranks_per_node) > 1
    for d in deployments(experts, args):
        found, extra = replay(counts, d, args.groups, args.interval), d.slots - experts
        before, beside = found["unbalanced"], f"{extra} redundant" + (f", {d.on_node} a node" if several else "")
        for kind, after in found.items():
            gain = after.over(before, of)
            print(f"{d!s:>18} {extra:9} {kind:>15} {after.balancedness:12.3f} {gain:9.2f}x")
            lines.setdefault(f"{kind}, {beside}", []).append((d.ep, after.balancedness))
            if kind == "unbalanced":
                continue
            lines.setdefault(f"throughput, {kind}, {beside}", []).append((d.ep, gain))
            a_map = "a static map" if kind == "static" else f"a map {kind} windows"
            at = f"{what}, {d}, {extra} redundant, {a_map}"
            for name, value, unit, reference, source in (
                (f"balancedness, {at}", after.balancedness, "", round(before.balancedness, 4), SAME),
                (f"implied throughput, {at}, experts {of:.0%} of a step", gain, "x", paper, THEIRS),
            ):
                records.append(Measurement(name, round(value, 4), unit, "higher", reference, source, "simulated"))
    if args.out is not None:
        save(records, args.out)
    if args.chart is not None:
        try:
            save_lines(args.chart, f"{what} (simulated)", "ranks", "balancedness; throughput over unbalanced", lines)
        except ValueError as error:
            raise SystemExit(f"eplb_sim.py: error: {error}") from None


if __name__ == "__main__":
    main()
