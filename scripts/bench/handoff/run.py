"""Test and time the KV handoff between prefill and decode on different GPUs of one machine.

    python -m scripts.bench.handoff --out records.json              # 1 prefill + 1 decode GPU
    python -m scripts.bench.handoff --pairs 4 --only wire,pages     # 4 + 4
    python -m scripts.bench.handoff --pairs 2 --prefill-tp 2 --only tokens,requests,kill
    python -m scripts.bench.handoff --transport nixl --device cpu --only wire,pages --wire-bytes 256000000

tokens     jobs of run.py, each on its own GPUs, give the same tokens of the shipped model as one process
wire       the speed of the wire: copies within one process, and torch.distributed between two. With --transport nixl or
           mooncake also that library's own loop, which reads scattered pages without packing
pages      the handoff's own path, with scattered pages of DeepSeek-V3's KV (61 layers x 576 bf16)
steps      a prefill step and a captured decode step: one rank's work, with simulated arrivals.
           idle: without transfers
           paced: the prompts of each prefill step are handed over when it ends. A step has few layers but its prompts
           the KV of all layers, so this is more traffic than such a prefill GPU would send
           flooded: transfers never pause, which is far more than prefill could sustain
requests   a stream of requests through jobs of run.py: the TTFT by its parts. The model has V3's KV and little else
kill       the same, with SIGKILL for one of two prefill jobs during a burst of prompts

Parts wire, pages and steps need no jobs (ends.py); the others start jobs of run.py (jobs.py).
With fewer GPUs than 2 x --pairs the ranks share them, and the figures' names say so. That tests function, not speed.
"""

import argparse
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from disagg.handoff.endpoints import TRANSPORTS
from parallel.mesh import pick_device
from scripts.bench.handoff.ends import run_ends
from scripts.bench.handoff.jobs import LONGEST, TALKERS, same_tokens, through_jobs
from scripts.bench.handoff.traffic import AHEAD
from scripts.bench.lib.flags import fraction, new_file, positive, positives
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES, check_size

PARTS = ("tokens", "wire", "pages", "steps", "requests", "kill")
WITH_JOBS = ("tokens", "requests", "kill")
LIMIT_S = 120  # per group of parts


class HandoffReport(Report):
    """The figures of all parts."""

    def __init__(self, pairs: int, prefill_tp: int, device: str, transport: str) -> None:
        super().__init__()
        on_gpu = device != "cpu" and torch.cuda.is_available()
        gpus = torch.cuda.device_count() if on_gpu else 0
        sharing = f", sharing {gpus} GPU" if on_gpu and gpus < 2 * pairs else ""
        tensor_parallel = f", prefill with attention TP {prefill_tp}" if prefill_tp > 1 else ""
        library = f", {transport}" if transport != "torch" else ""
        self.prefix = f"handoff {pairs} + {pairs}{tensor_parallel}{sharing}{library}"
        # GB/s and its name: the reference of the other transfers. With a one-sided library, its own loop.
        self.copy: tuple[float, str] | tuple[()] = ()

    def add(self, name: str, value: float, unit: str, reference: float | None = None, source: str = "") -> None:
        better = "higher" if unit in ("GB/s", "tokens") else "lower"
        self.keep(Measurement(f"{self.prefix}: {name}", round(value, 4), unit, better, reference, source))

    def ends(self, part: str, found: Any, args: argparse.Namespace) -> None:
        match part, found:
            case "wire", (copy, wire):
                self.copy = round(median(copy) / 1e9, 4), "copy within one process, same run"
                self.add("copy within one process", self.copy[0], "GB/s")
                self.add("one large tensor, torch.distributed", median(wire) / 1e9, "GB/s", *self.copy)
            case "library", rates:
                pages = f"{args.wire_bytes / 1e6:.0f} MB of scattered pages of one layer"
                self.add(f"the library's own loop, {pages}", median(rates) / 1e9, "GB/s", *self.copy)
                self.copy = round(median(rates) / 1e9, 4), "the library's own loop, same run"
            case "pages", (tokens, one):
                what = f"scattered pages of {tokens} tokens"
                self.add(f"{what}, {AHEAD} prompts at once", one["stream"] / 1e9, "GB/s", *self.copy)
                self.add(f"{what}, while receiving", one["receiving"] / 1e9, "GB/s", *self.copy)
                self.add(f"{what}, one prompt alone ({one['bytes'] / 1e6:.1f} MB)", 1e3 * one["alone"], "ms")
            case "steps", steps:
                beside = {"paced": "transfers of what prefill computes", "flooded": "transfers without a pause"}
                for how, transfers in beside.items():
                    self.add(f"{transfers}, beside steps", steps[f"{how} GB/s"], "GB/s")
                for phase in ("prefill", "decode"):
                    what = f"a {phase} step of {args.shape}, {args.layers} layers (simulated arrivals), mean"
                    idle = round(steps[f"{phase} idle"], 4)
                    self.add(what, idle, "ms")
                    for how, transfers in beside.items():
                        source = "without transfers, same run"
                        self.add(f"{what}, beside {transfers}", steps[f"{phase} {how}"], "ms", idle, source)

    def requests(self, found: dict[str, Any]) -> None:
        print(found["table"])
        print(f"(error: the {TALKERS} requests that decode throughout; the end interrupts them)")
        chunk = min(found["by length"])
        whole = found["by length"][chunk]["transfer"]
        for length, row in found["by length"].items():
            for name, seconds in row.items():
                self.add(f"prompt {length} in chunks of {chunk}, {name}", 1e3 * seconds, "ms")
            if length > chunk:
                self.add(
                    f"prompt {length} in chunks of {chunk}, share of the transfer that is not hidden",
                    row["transfer"] / (whole * length / chunk), "of 1", chunk / length, "the last chunk alone",
                )  # fmt: skip

    def kill(self, found: dict[str, Any]) -> None:
        what = "SIGKILL of the prefill job"
        self.add(f"{what}: the router notices after", 1e3 * found["noticed"], "ms")
        self.add(f"{what}: the first request fails and is retried after", 1e3 * found["first retry"], "ms")
        self.add(f"{what}: all {found['retried']} have a token after", 1e3 * found["last of them answered"], "ms")
        self.add(f"{what}: requests that end with an error", found["errors"], "requests")
        before = round(1e3 * found["gap before"], 3)
        gap = "longest gap between two tokens of other requests"
        self.add(f"{what}: {gap}", 1e3 * found["gap after"], "ms", before, "before, same run")
        if found["error"]:
            print(f"an error: {found['error']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=positive, default=1, help="number of prefill GPUs and of decode GPUs (1)")
    add("--prefill-tp", type=positive, default=1, help="attention TP of the prefill jobs (1)")
    add("--only", default=",".join(PARTS), help=f"parts, separated by commas ({','.join(PARTS)})")
    add("--transport", choices=TRANSPORTS, default="torch", help="wire and pages: as of run.py (torch)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--repeat", type=positive, default=20, help="repetitions per figure (20)")
    add(
        "--prompts",
        type=positives,
        default=[1024, 2048, 4096],
        help="prompt lengths; the shortest is the chunk (1024,2048,4096)",
    )
    add("--kv-layers", type=positive, default=61, help="layers of KV (61)")
    add("--wire-bytes", type=positive, default=2**30, help="wire: bytes of the large tensor (1 GiB)")
    add("--shape", choices=SHAPES, default="v3", help="steps: the model (v3)")
    add("--layers", type=positive, default=8, help="steps: layers of the model (8)")
    add("--ep", type=positive, default=32, help="steps: ranks of the deployment (32)")
    add("--batch", type=positive, default=128, help="steps: sequences of a decode step (128)")
    add("--kv", type=positive, default=2048, help="steps: tokens of context, and per prompt (2048)")
    add("--tokens", type=positive, default=8192, help="steps: tokens of a prefill step (8192)")
    add("--interval", type=fraction, default=0.1, help="requests: seconds between two requests (0.1)")
    add("--talk", type=positive, default=8192, help="requests: tokens of each request that decodes throughout (8192)")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if args.pairs % args.prefill_tp:
        remainder = args.pairs % args.prefill_tp
        parser.error(f"--pairs % --prefill-tp must be 0, not {args.pairs} % {args.prefill_tp} = {remainder}")
    if args.transport != "torch" and set(args.only) - {"wire", "pages"}:
        parser.error(f"--transport {args.transport}: it is for --only wire,pages")
    if args.prefill_tp > 1 and set(args.only) - set(WITH_JOBS):
        parser.error(f"--prefill-tp {args.prefill_tp}: it is for --only {','.join(WITH_JOBS)}, whose parts start jobs")
    for flag, tokens in (("--prompts", max(args.prompts)), ("--talk", args.talk)):
        if tokens > LONGEST and {"requests", "kill"} & set(args.only):
            parser.error(f"{flag} {tokens}: it must be at most {LONGEST}, for the model of parts requests and kill")
    with refusals(parser):
        device = pick_device(args.device)
        if "steps" in args.only:
            check_size(args.shape, replace(SHAPES[args.shape], num_hidden_layers=args.layers), device.type)
    return args


def main() -> int:
    args, failed = parse(), 0
    report = HandoffReport(args.pairs, args.prefill_tp, args.device, args.transport)

    def tokens() -> None:
        count = same_tokens(args, LIMIT_S)
        report.add("the shipped model's tokens, all equal to those of one process", count, "tokens")

    def ends() -> None:
        run_ends(args, wanted, LIMIT_S, lambda part, found: report.ends(part, found, args))

    def requests() -> None:
        found = through_jobs(args, "kill" in wanted, LIMIT_S)
        report.requests(found)
        if "kill" in wanted:
            report.kill(found)

    groups = ((tokens, ("tokens",)), (ends, ("wire", "pages")), (ends, ("steps",)), (requests, ("requests", "kill")))
    for group, parts in groups:
        wanted = [part for part in parts if part in args.only]
        if not wanted:
            continue
        start = time.monotonic()
        try:
            group()
        except Exception as error:  # the other parts still run
            failed = 1
            print(f"FAILED: {', '.join(wanted)}: {error}", file=sys.stderr)
        print(f"({', '.join(wanted)}: {time.monotonic() - start:.1f} s)", flush=True)
        if args.out is not None:
            save(report.records, args.out)
    return failed
