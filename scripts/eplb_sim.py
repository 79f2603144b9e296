"""What balancing would do for a recording of expert loads (run.py --record-experts), at any number of ranks. SIMULATED.

python scripts/eplb_sim.py seen.safetensors --ep 4,12,36 --redundant 0,4 --interval 1,4 --out records.json

For each window of the recording: balancedness (mean over the fullest rank's tokens; 1 is perfect) of the map without
balancing, of one made once from all windows (a static --expert-map of this very load), and of one remade every
`interval` windows from those before it. The experts' part of a step lasts as long as its fullest rank, so the ratio of
two balancednesses is what that part gains.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from parallel.eplb import balance, balancedness
from scripts.measurements import Record, save


def unbalanced(layers: int, experts: int, slots: int) -> NDArray[np.int64]:
    """Experts in order; redundant slots hold the first experts once more."""
    return np.tile(np.arange(slots) % experts, (layers, 1))


def replay(counts: NDArray, ep: int, slots: int, groups: int, nodes: int, interval: int) -> dict[str, float]:
    """counts [windows, layers, E] -> mean balancedness over windows and layers, by kind of map. Windows without tokens
    do not count; the first `interval` windows of the remade map run unbalanced."""
    windows, layers, experts = counts.shape
    plain = unbalanced(layers, experts, slots)
    static = balance(counts.sum(0), slots, ep, groups, nodes)
    remade, found = plain, {"unbalanced": [], "static": [], "remade": []}
    for w in range(windows):
        if w and w % interval == 0:
            remade = balance(counts[w - interval : w].sum(0), slots, ep, groups, nodes)
        if counts[w].sum() == 0:
            continue
        for name, of_slot in (("unbalanced", plain), ("static", static), ("remade", remade)):
            found[name].append(balancedness(counts[w], of_slot, ep).mean())
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recording", type=Path)
    add("--ep", type=_numbers, default=[4, 12], help="ranks (4,12)")
    add("--redundant", type=_numbers, default=[0, 4], help="slots beyond the experts (0,4)")
    add("--interval", type=_numbers, default=[1], help="windows between two maps (1)")
    add("--groups", type=int, default=1, help="the model's n_group (1)")
    add("--ranks-per-node", type=int, default=8, help="(8)")
    add("--name", default="", help="what was recorded, for the records")
    add("--out", type=Path, metavar="FILE", help="write the records there, for scripts/report.py")
    args = parser.parse_args()
    counts = load_file(str(args.recording))["counts"].numpy()
    windows, layers, experts = counts.shape
    print(f"{windows} windows, {layers} layers, {experts} experts, {counts.sum():,} copies; simulated")
    print(
        f"{'ranks':>5} {'slots':>5} {'interval':>8} {'unbalanced':>10} {'static':>7} {'remade':>7} {'experts gain':>12}"
    )
    records = []
    for ep in args.ep:
        for extra in args.redundant:
            slots = experts + extra
            if slots % ep:
                print(f"{ep:5} {slots:5} does not divide")
                continue
            nodes = max(1, ep // args.ranks_per_node) if ep % args.ranks_per_node == 0 else 1
            for interval in args.interval:
                got = replay(counts, ep, slots, args.groups, nodes, interval)
                gain = got["static"] / got["unbalanced"]
                numbers = f"{got['unbalanced']:10.3f} {got['static']:7.3f} {got['remade']:7.3f} {gain:11.2f}x"
                print(f"{ep:5} {slots:5} {interval:8} {numbers}")
                name = f"balancedness{', ' + args.name if args.name else ''}, EP{ep}, {extra} redundant"
                records.append(
                    Record(f"{name}, a static map", round(got["static"], 4), "", "higher", round(got["unbalanced"], 4),
                           "unbalanced, same recording", "simulated")
                )  # fmt: skip
    if args.out is not None:
        save(records, args.out)


if __name__ == "__main__":
    main()
