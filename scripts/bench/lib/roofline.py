"""Model how fast one rank's step could be: the time of each part on a GPU with given ceilings.

python -m scripts.bench.lib.roofline decode --shape moonlight --batch 128 --kv 1088
python -m scripts.bench.lib.roofline decode --shape v3 --batch 256 --kv 2048 --ep 72 --local 4 --ceilings 798,1400,3.0
python -m scripts.bench.lib.roofline prefill --tokens 16384 --prompt 4096 --ep 32 --local 9 --ceilings 798,1400,3.0

`step_cost.py` says what is counted. Without --ceilings (bf16 TFLOP/s, fp8 TFLOP/s or -, TB/s) they are measured on this
machine's GPU.
"""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

from scripts.bench.lib.flags import PHASES, SIZES, positive
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.lib.step_cost import Ceilings, Cost, decode, prefill, total


def measure_ceilings() -> Ceilings:
    """Measure the current GPU with random operands: products of 8192^3 (fp8 with one scale per operand), and a copy."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16, fp8 = 2 * side**3 / _median_seconds(lambda: a @ b.t()), None
    if torch.cuda.get_device_capability() >= (8, 9):
        x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        product = lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        fp8 = 2 * side**3 / _median_seconds(product)
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Ceilings(bf16, fp8, 2 * source.numel() / _median_seconds(lambda: target.copy_(source)))


def _median_seconds(call: Callable[[], object]) -> float:
    for _ in range(20):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for mark in marks:
        mark.record()
        call()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


def show(work: Cost, ceilings: Ceilings) -> None:
    fp8 = "no" if ceilings.fp8 is None else f"{ceilings.fp8 / 1e12:,.0f} TFLOP/s"
    print(f"ceilings: bf16 {ceilings.bf16 / 1e12:,.0f} TFLOP/s, fp8 {fp8}, {ceilings.bandwidth / 1e12:.2f} TB/s")
    groups: dict[str, float] = {}
    for kind, (count, parts) in work.kinds.items():
        print(f"\n{count} x {kind:50} {'GFLOP':>10} {'MB':>9} {'us':>9}  (modelled)")
        for part in parts:
            seconds = part.seconds(ceilings)
            groups[part.group] = groups.get(part.group, 0) + count * seconds
            limit = "bytes" if seconds == part.nbytes / ceilings.bandwidth else part.dtype
            _row(f"{part.group}: {part.name}", part.flop, part.nbytes, seconds, limit)
        _row("sum", sum(p.flop for p in parts), sum(p.nbytes for p in parts), total(parts, ceilings))
    print(f"\n{'the step, modelled':30} {'ms':>9} {'share':>6}")
    step = work.seconds(ceilings)
    for group, seconds in groups.items():
        print(f"{group:30} {1e3 * seconds:9.3f} {seconds / step:6.1%}")
    print(f"{'sum':30} {1e3 * step:9.3f}        {work.rate(ceilings):,.0f} tok/s")


def _row(name: str, flop: float, nbytes: float, seconds: float, limit: str = "") -> None:
    print(f"  {name:52} {flop / 1e9:10.2f} {nbytes / 1e6:9.2f} {1e6 * seconds:9.2f}  {limit}".rstrip())


def _given(text: str) -> Ceilings:
    try:
        bf16, fp8, bandwidth = (None if part == "-" else float(part) * 1e12 for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BF16,FP8,TB/S") from None
    if (
        bf16 is None
        or bandwidth is None
        or not all(0 < rate < math.inf for rate in (bf16, bandwidth, bf16 if fp8 is None else fp8))
    ):
        raise argparse.ArgumentTypeError(f"{text!r}: rates must be over 0 (and for fp8 - is none)")
    return Ceilings(bf16, fp8, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for phase, sizes in PHASES.items():
        add = phases.add_parser(phase).add_argument
        add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
        for size in sizes:
            add(f"--{size}", type=positive, required=True, help=SIZES[size])
        add("--ep", type=positive, default=1, help="ranks over which the experts are spread (1)")
        add(
            "--local",
            type=positive,
            help="slots per rank, redundant ones included (default: an even share of the experts)",
        )
        add(
            "--ceilings",
            type=_given,
            metavar="BF16,FP8,TB/S",
            help="in TFLOP/s (- for no fp8) and TB/s (measured on the GPU)",
        )
    args = parser.parse_args()
    if args.local is not None and args.ep * args.local < SHAPES[args.shape].n_routed_experts:
        parser.error(f"--ep x --local must be at least the {SHAPES[args.shape].n_routed_experts} experts, not {args.ep}"
                     f" x {args.local} = {args.ep * args.local}")  # fmt: skip
    if args.phase == "prefill" and args.prompt > args.tokens:
        parser.error(f"--prompt must be at most --tokens ({args.tokens}), not {args.prompt}")
    if args.ceilings is None and not torch.cuda.is_available():
        parser.error("no GPU to measure the ceilings of: give --ceilings")
    ceilings, config = args.ceilings or measure_ceilings(), SHAPES[args.shape]
    if args.phase == "decode":
        work = decode(config, args.batch, args.kv, args.ep, args.local)
    else:
        work = prefill(config, args.tokens, args.prompt, args.ep, args.local)
    show(work, ceilings)


if __name__ == "__main__":
    main()
