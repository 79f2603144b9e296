"""How long does a job of one rank take to start: on a machine that has no compiled kernels, and on one that has all?

    python -m scripts.bench.start --shape moonlight
    python -m scripts.bench.start --shape v3 --layers 4 --fp8
    python -m scripts.bench.start --shape v3 --experts 16 --fp8    # as many as a rank of a deployment may have

    the process starts ----> the first token of a request comes ----> all kernels are compiled
                       start                                 behind

A start is `run.py` with random weights and one request, whose answer has one token. The first one has empty folders for
the kernels of Triton and DeepGEMM. It serves until those are full, and the next ones have the same folders. So a figure
of "warm caches" has no kernel to compile; it is the median of --repeat starts. What else the machine keeps, like
Python's compiled files, is what it is. Where PYTHONDONTWRITEBYTECODE forbids these, each start takes seconds longer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Thread

from disagg.warm_up import COMPILED, NOT_COMPILED
from parallel.mesh import pick_device
from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import ROOT, Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES, check_size
from scripts.bench.serving.workload import write_batch, write_model

LIMIT_S = 500.0
LOOK_S = 0.01  # between two looks at what a job said


@dataclass(frozen=True)
class Start:
    """Seconds from the process's start."""

    served: float  # the first token came
    compiled: float | None  # nothing was left to compile; None where no rehearsal was needed
    warm_up: str  # the job's own line about it, with its parts


class Job:
    """A process of run.py with one request. What it says is kept with the time, and its input stays open."""

    def __init__(self, folder: Path, caches: Path) -> None:
        env = os.environ | {"TRITON_CACHE_DIR": f"{caches}/triton", "DG_JIT_CACHE_DIR": f"{caches}/deep_gemm"}
        flags = ["--model", str(folder), "--load", "dummy", "--dtype", "bfloat16", "--input", "-", "--output", "-"]
        pipe = subprocess.PIPE
        self._began = time.monotonic()
        command = [sys.executable, "run.py", *flags]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        self._said: dict[str, list[tuple[float, str]]] = {"stdout": [], "stderr": []}
        self._readers = [Thread(target=self._read, args=(name,), daemon=True) for name in self._said]
        for reader in self._readers:
            reader.start()
        with suppress(BrokenPipeError):  # it has ended, which `wait` says
            self._process.stdin.write((folder / "request.jsonl").read_text())
            self._process.stdin.flush()

    def _read(self, name: str) -> None:
        for line in getattr(self._process, name):
            self._said[name].append((time.monotonic() - self._began, line))

    def first(self, name: str, is_it: Callable[[str], bool]) -> tuple[float, str] | None:
        """Return the first line that is it, and when it came."""
        return next((said for said in list(self._said[name]) if is_it(said[1])), None)

    def wait(self, name: str, is_it: Callable[[str], bool]) -> tuple[float, str]:
        """Wait for that line. Raises RuntimeError if the job ends without it, or takes LIMIT_S seconds."""
        while True:
            if ended := self._process.poll() is not None:
                for reader in self._readers:
                    reader.join()
            if (found := self.first(name, is_it)) is not None:
                return found
            if ended or time.monotonic() - self._began > LIMIT_S:
                raise RuntimeError(f"the job did not say what it should:\n{self.log}")
            time.sleep(LOOK_S)

    @property
    def log(self) -> str:
        return "".join(f"{seconds:7.2f} s  {line}" for seconds, line in self._said["stderr"])

    def end(self) -> None:
        """Close its input, and wait until it has ended. Raises RuntimeError if it fails, or takes LIMIT_S seconds."""
        self._process.stdin.close()
        try:
            status = self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the job does not end:\n{self.log}") from None
        if status:
            raise RuntimeError(f"the job's exit status is {status}:\n{self.log}")

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()


def start(folder: Path, caches: Path) -> Start:
    """Start a job, wait until it has served and has all its kernels, and end it."""
    job = Job(folder, caches)
    try:
        served, answer = job.wait("stdout", bool)
        if "error" in answer or "{" not in answer:
            raise RuntimeError(f"the answer is {answer}{job.log}")
        _, warm_up = job.first("stderr", lambda line: " warm-up: " in line) or (0, "")
        compiled = None
        if " kernels " in warm_up:
            compiled, line = job.wait("stderr", lambda line: COMPILED in line or NOT_COMPILED in line)
            if NOT_COMPILED in line:
                raise RuntimeError(f"{line}{job.log}")
        job.end()
    finally:
        job.kill()
    return Start(served, compiled, warm_up.strip())


def figures(name: str, empty: Start, warm: list[Start]) -> list[Measurement]:
    def figure(what: str, seconds: float) -> Measurement:
        return Measurement(f"start of {name}: {what}", round(seconds, 2), "s", "lower")

    found = [figure("first token, empty caches", empty.served)]
    if empty.compiled is not None:
        found.append(figure("all kernels compiled, empty caches", empty.compiled))
    return [*found, figure("first token, warm caches", median(one.served for one in warm))]


def parse(words: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
    add("--layers", type=positive, help="layers of the model (the shape's)")
    add("--experts", type=positive, help="experts of a layer (the shape's)")
    add("--fp8", action="store_true", help="weights in block fp8 (bf16)")
    add("--repeat", type=positive, default=3, help="starts with warm caches (3)")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser, parser.parse_args(words)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Start all jobs, and return the figures. Raises ValueError for flags that cannot work."""
    shape, report = SHAPES[args.shape], Report()
    layers, experts = args.layers or shape.num_hidden_layers, args.experts or shape.n_routed_experts
    config = replace(shape, num_hidden_layers=layers, n_routed_experts=experts, fp8=args.fp8)
    check_size(args.shape, config, pick_device("auto").type)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(config, folder)
        write_batch([("w1 w2 w3 w4", 1)], folder / "request.jsonl")
        starts = []
        for number in range(1 + args.repeat):
            starts.append(one := start(folder, folder / "caches"))
            report.say(f"start {number}: {one.served:.2f} s{'; ' if one.warm_up else ''}{one.warm_up}")
    fewer = [f"{count} {what}" for count, what in ((args.layers, "layers"), (args.experts, "experts")) if count]
    name = f"{args.shape}{' with ' if fewer else ''}{' and '.join(fewer)} in {'fp8' if args.fp8 else 'bf16'}"
    for figure in figures(name, starts[0], starts[1:]):
        report.keep(figure)
    return report.records


def main(words: list[str] | None = None) -> None:
    parser, args = parse(words)
    with refusals(parser):
        records = run(args)
    if args.out is not None:
        save(records, args.out)
