"""What does the prefix cache save in talks with one system prompt, and what do clients see of it?

    python -m scripts.bench.prefix --shape moonlight
    python -m scripts.bench.prefix --shape moonlight --peer --peer-python "source vllm/env.sh && python3"
    python -m scripts.bench.prefix --shape tiny --device cpu --talks 2 --turns 2 --message 40 --answer 8

The same talks go to run.py --http with the cache and without, each with random weights: to one unified rank, and where
there are two GPUs or none, to a prefill and a decode rank. Computed prompt tokens and received bytes of KV are what the
replicas report. With --peer, the talks also go to vLLM's server with its cache. Each server first has talks of its own
that share nothing with the measured ones. Times are the clients': from the request to its first event.
"""

import argparse
import re
import shlex
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from disagg.reports import REPORT_S
from model.pages import PAGE
from scripts.bench.handoff.jobs import Jobs
from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.shapes import SHAPES, check_size
from scripts.bench.prefix.talks import Seen, run_talks
from scripts.bench.serving.run import HOST, START_S, healthy, server
from scripts.bench.serving.workload import write_model
from scripts.tools.demo import free_port

COUNTED = {
    "computed": r'moesaic_step_tokens_total\{[^}]*phase="prefill"[^}]*\}',
    "moved": "moesaic_transfer_bytes_total",
}


@dataclass(frozen=True)
class Found:
    """What one server gave: the clients' view, and the growth of its replicas' counters."""

    seen: Seen
    computed: float = 0.0  # prompt tokens
    moved: float = 0.0  # bytes of KV


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Write the model to `folder`."""
        self.args, self.folder, self.sizes = args, folder, (args.system, args.message, args.answer)
        self.longest = args.system + args.turns * (args.message + args.answer)
        config = SHAPES[args.shape]
        if args.layers:
            config = replace(config, num_hidden_layers=args.layers)
        check_size(args.shape, config, args.device)
        self.vocab = config.vocab_size
        self.model = folder / args.shape
        self.model.mkdir()
        write_model(
            replace(config, max_position_embeddings=max(self.longest, config.max_position_embeddings)), self.model
        )

    def ours(self, apart: bool, cache: str) -> Found:
        """Measure our server. `apart`: prefill and decode in jobs of their own. `cache`: of --prefix-cache."""
        with self._jobs(apart, cache) as port:
            self._talk(port, 1)
            before = counters(port)
            seen = self._talk(port, 2)
            return Found(seen, **{name: value - before[name] for name, value in counters(port).items()})

    @contextmanager
    def _jobs(self, apart: bool, cache: str) -> Iterator[int]:
        """Run our server until the block ends. Yields its port."""
        args, port, router = self.args, free_port(), f"{HOST}:{free_port()}"
        logs = self.folder / f"{'apart' if apart else 'together'}-{cache}"
        logs.mkdir()
        pages = args.talks * (-(-self.longest // PAGE) + 1)
        engine = ["--model", str(self.model), "--load", "dummy", "--max-batch", str(args.talks)]
        engine += [
            "--max-tokens-per-step",
            str(max(args.step_tokens, args.talks)),
            "--max-model-len",
            str(self.longest),
        ]
        engine += ["--kv-tokens", str(3 * pages * PAGE), "--prefix-cache", cache]
        front = ["--http", f"{HOST}:{port}"]
        with Jobs(args, logs) as jobs:
            if apart:
                for gpu, role in enumerate(("prefill", "decode")):
                    jobs.start(role, role, 1, gpu, *engine, "--router", router)
                limits = ["--model", str(self.model), "--max-model-len", str(self.longest)]
                jobs.start("router", "router", 1, 0, *limits, "--router", router, *front)
            else:
                jobs.start("unified", "unified", 1, 0, *engine, *front)
            deadline = time.monotonic() + START_S
            while not healthy(port):
                if problem := jobs.failed():
                    raise RuntimeError(problem)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the server was not ready after {START_S} s")
                time.sleep(0.2)
            yield port

    def theirs(self) -> Found:
        port, args = free_port(), self.args
        words = [str(Path(__file__).parents[1] / "serving" / "vllm_server.py"), "serve", str(self.model)]
        words += [f"--port={port}", f"--host={HOST}", "--load-format=dummy", "--dtype=bfloat16"]
        words += ["--enable-prefix-caching", f"--max-model-len={self.longest}", f"--max-num-seqs={args.talks}"]
        words += [f"--max-num-batched-tokens={max(args.step_tokens, args.talks)}", "--served-model-name=model"]
        command = ["bash", "-c", f"{args.peer_python} {shlex.join(words)}"]
        with server(command, port, self.folder / "theirs.log"):
            self._talk(port, 1)
            return Found(self._talk(port, 2))

    def _talk(self, port: int, seed: int) -> Seen:
        return run_talks(port, self.args.talks, self.args.turns, self.sizes, self.vocab, seed)


def counters(port: int) -> dict[str, float]:
    """Return the sums of COUNTED over all replicas, once they have reported everything so far."""
    time.sleep(REPORT_S + 1)
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, pattern in COUNTED.items():
        found[name] = sum(
            float(value) for value in re.findall(rf"^{pattern}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        )
    return found


def figures(args: argparse.Namespace, found: dict[tuple[bool, str], Found], theirs: Found | None) -> list[Measurement]:
    """`found`: by whether the roles are apart, and by --prefix-cache."""
    name = f"{args.shape}, {args.talks} talks of {args.turns} turns after a system prompt of {args.system} tokens"
    off, made = "--prefix-cache off, same requests, same run", []
    for apart in sorted({apart for apart, _ in found}):
        on, without = found[apart, "auto"], found[apart, "off"]
        where = "prefill and decode apart" if apart else "one job"
        rows = [("prompt tokens computed", on.computed, without.computed, "tokens")]
        rows += [("KV received", on.moved, without.moved, "bytes")] if apart else []
        for turn, first in (("first turn", True), ("later turns", False)):
            times = (one.seen.median_ttft_ms(first) for one in (on, without))
            rows.append((f"TTFT, median, {turn}", *times, "ms"))
        for what, value, reference, unit in rows:
            made.append(
                Measurement(f"{name}, {where}: {what}", round(value, 2), unit, "lower", round(reference, 2), off)
            )
        if theirs is not None and not apart:
            for turn, first in (("first turn", True), ("later turns", False)):
                ours, vllm = (round(one.seen.median_ttft_ms(first), 2) for one in (on, theirs))
                what = f"{name}, {where}: TTFT, median, {turn}, against vLLM"
                source = "vLLM's server with its cache, same requests, same run"
                made.append(Measurement(what, ours, "ms", "lower", vllm, source))
    return made


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
    add("--layers", type=positive, help="layers of the model (the shape's)")
    add("--talks", type=positive, default=32, help="at once (32)")
    add("--turns", type=positive, default=4, help="per talk, at least 2 (4)")
    add("--system", type=positive, default=2000, help="tokens of the system prompt (2000)")
    add("--message", type=positive, default=100, help="tokens of each message (100)")
    add("--answer", type=positive, default=64, help="tokens of each answer (64)")
    add("--step-tokens", type=positive, default=8192, help="--max-tokens-per-step (8192)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--peer", action="store_true", help="also measure vLLM's server")
    add("--peer-python", default="python3", metavar="CMD", help="a Python with vLLM, as a shell command")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args(words)
    if args.turns < 2:
        parser.error(f"--turns is {args.turns}; it must be at least 2")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args, report = parse(), Report()
    arrangements = [False, True] if args.device == "cpu" or torch.cuda.device_count() > 1 else [False]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        found = {(apart, cache): bench.ours(apart, cache) for apart in arrangements for cache in ("off", "auto")}
        theirs = bench.theirs() if args.peer else None
    for figure in figures(args, found, theirs):
        report.keep(figure)
    if args.out is not None:
        save(report.records, args.out)


if __name__ == "__main__":
    main()
