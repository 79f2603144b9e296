"""Draw a timeline of two-batch overlap: a step of one rank, plain and as two micro-batches.

python -m scripts.bench.one_rank.timeline decode --layers 7 --trace overlap.json --chart overlap.png
python -m scripts.bench.one_rank.timeline prefill --layers 5 --tokens 16384 --prompt 4096 --chart overlap.png

There is a lane for the computation and one for the communication of each micro-batch, coloured by stage
(`parallel/overlap.py`). Communication (deepep_times.py) and arrivals are SIMULATED.

On a GPU the spans are kernels, each assigned to the stage that launched it. The GPU waits until the host has launched
the whole step. Otherwise a decode step without a CUDA graph would show the host's speed. That limits --layers, because
a stream's queue holds about a thousand kernels. On a CPU the spans are the calls themselves.

--trace keeps the profiler's Chrome trace with all kernels, for chrome://tracing or ui.perfetto.dev.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from model.pages import pages_for
from parallel.overlap import STAGES, Steps
from scripts.bench.lib.charts import figure, save_lanes
from scripts.bench.lib.flags import SIZES, new_file, new_png, positive
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.one_rank.kernel_ranges import export, launched_in, mark_ranges
from scripts.bench.one_rank.overlap import make_link
from scripts.bench.one_rank.rank import Rank, add_flags, check_decode, check_flags, check_prefill

Span = tuple[float, float, str]  # start and end in milliseconds from the step's beginning, name
Lanes = dict[str, list[Span]]
FEW_LAYERS = 7  # the default of --layers
MARK = "turn "  # before the names of our ranges in a profile: "turn a 3 experts", "turn a 3 dispatch>"


class Watch:
    """Marks the turns of a rank's micro-batches, and their transfers, in a profile. It wraps the model and the link."""

    def __init__(self, rank: Rank, link: Any) -> None:
        self.stage = ""  # the current turn: "a 3 experts"
        self.flights: list[Span] = []  # on a CPU, by time.perf_counter
        self.waits: list[tuple[float, float]] = []
        self.layers, self.steps, self.begin = rank.config.num_moe_layers, rank.model.moe_steps, link.start
        self.link, self.names = link, iter(())
        rank.model.moe_steps, link.start = self.watched, self.started

    def watched(self, *args: Any) -> Steps[Tensor]:
        return self.turns(next(self.names), self.steps(*args))

    def turns(self, name: str, steps: Steps[Tensor]) -> Steps[Tensor]:
        count = 0
        while True:
            layer, stage = divmod(count, len(STAGES))
            self.stage = f"{name} {layer} {STAGES[stage] if layer < self.layers else 'end'}"
            try:
                with record_function(MARK + self.stage):
                    done = next(steps)
            except StopIteration as stop:
                return stop.value
            yield done
            count += 1

    def started(self, what: str, tokens: int) -> Callable[[], None]:
        name = f"{self.stage.rsplit(' ', 1)[0]} {what}>"
        before = max(time.perf_counter(), self.link.free_at)
        with record_function(MARK + name):
            wait = self.begin(what, tokens)
        if self.link.device.type == "cuda":
            return wait
        self.flights.append((before, self.link.free_at, name))

        def waited() -> None:
            start = time.perf_counter()
            wait()
            self.waits.append((start, time.perf_counter()))

        return waited

    def record(self, step: Callable[[], object], names: tuple[str, ...], trace: Path) -> Lanes:
        """Run the step, call its micro-batches `names`, and write the profile to `trace`. Return the lanes."""
        self.names, on_gpu = iter(names), self.link.device.type == "cuda"
        self.flights.clear()
        self.waits.clear()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            if on_gpu:
                self.link.kernels.hold(1, 0.1)
            with record_function(f"{MARK}step"):
                began = time.perf_counter()
                step()
            if on_gpu:
                torch.cuda.synchronize()
        events = export(profiler, trace)
        if on_gpu:
            return lanes_of(kernel_spans(events))
        ranges = mark_ranges(events, MARK)
        zero = next(start for start, _, name in ranges if name == "step")
        turns = [r for r in ranges if r[2] != "step" and r[2][-1] != ">"]
        first = (turns[0][0] - zero) / 1e3
        spans = [((start - zero) / 1e3 - first, (end - zero) / 1e3 - first, name) for start, end, name in turns]
        flights, waits = ([tuple((at - began) * 1e3 - first for at in s[:2]) + s[2:] for s in found]
                          for found in (self.flights, self.waits))  # fmt: skip
        return lanes_of([*(piece for span in spans for piece in without(span, waits)), *flights])


def without(span: Span, waits: list[tuple[float, float]]) -> list[Span]:
    """Return the pieces of the span that remain when the waits are cut out."""
    pieces, (start, end, name) = [], span
    for wait in sorted(w for w in waits if start <= w[0] < end):
        pieces.append((start, wait[0], name))
        start = min(end, wait[1])
    return [*pieces, (start, end, name)]


def kernel_spans(events: list[dict]) -> list[Span]:
    """Return the kernels and copies that a turn launched, named like the turn. The first begins at 0.

    Send and receive kernels run on the computing stream; a flight has a stream of its own.
    """
    found = launched_in(events, MARK)
    main = next((event["args"]["stream"] for event, name in found if name == "step"), None)
    turns = [(event, name) for event, name in found if name != "step"]
    zero = min((event["ts"] for event, _ in turns), default=0.0)
    spans = []
    for event, name in turns:
        if "_hold_kernel" in event["name"] and event["args"]["stream"] == main:
            name = f"{name.rsplit(' ', 1)[0]} send, receive"
        spans.append(((event["ts"] - zero) / 1e3, (event["ts"] + event["dur"] - zero) / 1e3, name))
    return spans


def lanes_of(spans: list[Span]) -> Lanes:
    """Sort spans into lanes: computation and communication of each micro-batch. The spans keep only their stage."""
    lanes: Lanes = defaultdict(list)
    for start, end, name in sorted(spans):
        micro_batch, _, stage = name.split(" ", 2)
        lane = "communication" if stage.endswith(">") else "computing"
        lanes[f"{micro_batch}: {lane}"].append((start, end, stage))
    return {name: lanes[name] for name in sorted(lanes, key=lambda lane: (lane[:2], lane.endswith("communication")))}


def overlapped_share(lanes: Lanes) -> float:
    """Return the share of the time in flight during which something is computed."""
    flights = _joined(span for name, spans in lanes.items() if name.endswith("communication") for span in spans)
    busy = _joined(span for name, spans in lanes.items() if name.endswith("computing") for span in spans)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in flights for b in busy)
    return both / max(1e-9, sum(end - start for start, end in flights))


def _joined(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Merge spans that overlap."""
    joined: list[tuple[float, float]] = []
    for start, end, _ in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    sizes = {
        "decode": (72, {"batch": 256, "kv": 2048}),
        "prefill": (32, {"tokens": 16384, "prompt": 4096}),
    }
    for phase, (ep, defaults) in sizes.items():
        add = phases.add_parser(phase).add_argument
        add_flags(add, ep)
        for name, default in defaults.items():
            add(f"--{name}", type=positive, default=default, help=f"{SIZES[name]} ({default})")
        add("--trace", type=new_file, metavar="JSON", help="write the overlapped step's Chrome trace")
        add("--chart", type=new_png, metavar="PNG", required=True, help="draw the timeline")
    return parser, parser.parse_args()


def build(args: argparse.Namespace) -> Rank:
    """Build the rank. Raises ValueError for flags that cannot work."""
    if args.layers is None:
        args.layers = min(FEW_LAYERS, SHAPES[args.shape].num_hidden_layers)
    config, device = check_flags(args)
    figure()  # is there matplotlib?
    if args.phase == "decode":
        check_decode(config, [args.batch], args.kv, halves=True)
        return Rank(args, config, device, args.kv, args.batch * pages_for(args.kv))
    check_prefill(config, [args.tokens], args.prompt, halves=True)
    return Rank(args, config, device, args.prompt, args.tokens // args.prompt * pages_for(args.prompt))


@torch.inference_mode()
def main() -> None:
    parser, args = parse()
    with refusals(parser):
        rank = build(args)
    link = make_link(rank, args.phase)
    make, sizes = (rank.decode, (args.batch, args.kv)) if args.phase == "decode" else (
        rank.prefill, (args.tokens, args.prompt))  # fmt: skip
    plain, overlapped = (make(*sizes, link, overlap) for overlap in (False, True))
    watch = Watch(rank, link)
    with tempfile.TemporaryDirectory() as folder:
        both = watch.record(plain.eager, ("plain",), Path(folder) / "plain.json")
        lanes = watch.record(overlapped.eager, ("a", "b"), args.trace or Path(folder) / "overlapped.json")
    for name, found in (("plain", both), ("overlapped", lanes)):
        end = max(span[1] for spans in found.values() for span in spans)
        print(f"{name:>10}: {end:.3f} ms of MoE layers, {overlapped_share(found):.0%} of the flights beside computing")
    title = (
        f"one rank of EP{args.ep}, {args.phase} {' x '.join(map(str, sizes))}, {rank.config.num_moe_layers} MoE layers"
    )
    args.chart.parent.mkdir(parents=True, exist_ok=True)
    save_lanes(args.chart, f"{title}: simulated arrivals and communication", "ms", both | lanes)


if __name__ == "__main__":
    main()
