"""How fast is the HTTP server under load, beside an offline run of the same requests, and beside vLLM's server?

    python -m scripts.bench.serving --shape moonlight --generator-python "source vllm/env.sh && python3"
    python -m scripts.bench.serving --peer --generator-python "source vllm/env.sh && python3"

The load comes from a public generator, `vllm bench serve`, which keeps --concurrency requests open. It runs beside the
server, in another environment (--generator-python). The weights are random. Lengths are uniform, from half of --prompt
or --output to one and a half. The same requests go through three runs, one after the other:

    offline   run.py --input: all requests wait from the start, and as many run at once as through HTTP; after a
              run that fills the caches of compiled kernels
    HTTP      run.py --http, one unified rank
    vLLM      with --peer: vLLM's own server

None of them has a prefix cache, which scripts/bench/prefix measures.

The generator first sends as many requests as run at once, which do not count. Times are the generator's: TTFT from the
request's start to its first event, inter-token latency between two events.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import ROOT, Measurement, Report, save
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.serving.workload import draw_requests, write_batch, write_dataset, write_model
from scripts.tools.demo import free_port

HOST = "127.0.0.1"
START_S = 300  # until a server must be ready
RUN_S = 300  # of one run


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Write the model and the requests to `folder`."""
        self.args, self.folder = args, folder
        config = SHAPES[args.shape]
        if args.layers:
            config = replace(config, num_hidden_layers=args.layers)
        self.model = folder / args.shape
        self.model.mkdir()
        write_model(config, self.model)
        requests = draw_requests(args.requests, args.prompt, args.output, config.vocab_size)
        self.generated = sum(tokens for _, tokens in requests)
        self.longest = 2 * (args.prompt + args.output)
        write_batch(requests, folder / "batch.jsonl")
        write_batch(requests[: args.concurrency], folder / "warm-up.jsonl")
        write_dataset(requests, folder / "dataset.jsonl")

    def offline(self) -> float:
        """Run the requests as a batch. Returns the generated tokens per second.

        A run before it fills the caches of compiled kernels, which the generator's first requests do for the servers.
        """
        self._batch("warm-up")
        tokens, said = self._batch("batch")
        rate = re.search(r"([\d,]+) generated tok/s", said)
        if tokens != self.generated or rate is None:
            raise RuntimeError(f"the batch failed: {said[-4000:]}")
        return float(rate[1].replace(",", ""))

    def _batch(self, name: str) -> tuple[int, str]:
        """Run a batch. Returns how many tokens it generated, and what it printed."""
        output = self.folder / f"{name}-answers.jsonl"
        files = "--input", str(self.folder / f"{name}.jsonl"), "--output", str(output)
        run = subprocess.run([*self._run_py(), *files], cwd=ROOT, capture_output=True, text=True, timeout=RUN_S)
        answers = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return sum(one.get("completion_tokens", 0) for one in answers), run.stderr

    def ours(self) -> dict:
        port = free_port()
        with server([*self._run_py(), "--http", f"{HOST}:{port}"], port, self.folder / "ours.log"):
            return self._generate(port)

    def theirs(self) -> dict:
        port, args = free_port(), self.args
        words = [str(Path(__file__).with_name("vllm_server.py")), "serve", str(self.model), f"--port={port}"]
        words += ["--load-format=dummy", "--dtype=bfloat16", "--no-enable-prefix-caching", f"--host={HOST}"]
        words += [f"--max-model-len={self.longest}", f"--max-num-seqs={args.concurrency}"]
        words += [f"--max-num-batched-tokens={args.step_tokens}"]
        command = ["bash", "-c", f"{args.generator_python} {shlex.join(words)}"]
        with server(command, port, self.folder / "theirs.log"):
            return self._generate(port)

    def _run_py(self) -> list[str]:
        args = self.args
        sizes = f"--max-batch={args.concurrency}", f"--max-tokens-per-step={args.step_tokens}"
        more = f"--max-model-len={self.longest}", "--load=dummy", "--prefix-cache=off"  # the first requests come twice
        return [sys.executable, "run.py", f"--model={self.model}", *sizes, *more]

    def _generate(self, port: int) -> dict:
        """Run the load generator. Returns the figures that it wrote."""
        args, result = self.args, self.folder / "result.json"
        words = ["-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend=openai", "--endpoint=/v1/completions"]
        words += ["--host", HOST, "--port", str(port), "--model", str(self.model), "--dataset-name", "custom"]
        words += ["--dataset-path", str(self.folder / "dataset.jsonl"), "--custom-output-len=-1"]
        words += ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--temperature=0", "--disable-tqdm"]
        words += ["--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency)]
        words += ["--num-warmups", str(args.concurrency), "--percentile-metrics=ttft,itl", "--metric-percentiles=50,99"]
        words += ["--save-result", "--result-dir", str(self.folder), "--result-filename", result.name]
        command = ["bash", "-c", f"{args.generator_python} {shlex.join(words)}"]
        run = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=RUN_S)
        if run.returncode or not result.exists():
            raise RuntimeError(f"the generator failed: {run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        found = json.loads(result.read_text())
        result.unlink()
        if found["completed"] != args.requests or found["total_output_tokens"] != self.generated:
            raise RuntimeError(f"not all was served: {run.stdout[-4000:]}")
        return found


@contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server until the block ends. Raises RuntimeError with its log if it does not become ready."""
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=written, start_new_session=True)
        try:
            deadline = time.monotonic() + START_S
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-6000:]}")
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def figures(args: argparse.Namespace, offline: float, ours: dict, theirs: dict | None) -> list[Measurement]:
    name = f"{args.shape}, HTTP at concurrency {args.concurrency}, prompts of {args.prompt} + {args.output} tokens"
    made = [
        Measurement(
            f"{name}: generated tokens per second, against a batch",
            round(ours["output_throughput"], 1),
            "tok/s",
            "higher",
            round(offline, 1),
            "run.py --input, same requests, same run",
        )
    ]
    fields = [("generated tokens per second", "output_throughput", "tok/s", "higher")]
    for metric, word in (("ttft", "TTFT"), ("itl", "inter-token latency")):
        fields += [(f"{word}, p{p}", f"p{p}_{metric}_ms", "ms", "lower") for p in (50, 99)]
    for word, field, unit, better in fields:
        against = (round(theirs[field], 2), "vLLM's server, same requests, same run") if theirs is not None else ()
        suffix = ", against vLLM" if theirs is not None else ""
        made.append(Measurement(f"{name}: {word}{suffix}", round(ours[field], 2), unit, better, *against))
    return made


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
    add("--layers", type=positive, help="layers of the model (the shape's)")
    add("--concurrency", type=positive, default=128, help="requests at once (128)")
    add("--requests", type=positive, default=512, help="(512)")
    add("--prompt", type=positive, default=1024, help="mean prompt tokens (1024)")
    add("--output", type=positive, default=512, help="mean generated tokens (512)")
    add("--step-tokens", type=positive, default=8192, help="--max-tokens-per-step (8192)")
    add(
        "--generator-python",
        default=shlex.quote(sys.executable),
        metavar="CMD",
        help="a Python with vLLM, as a shell command",
    )
    add("--peer", action="store_true", help="also measure vLLM's server")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        offline = bench.offline()
        print(f"offline {offline:,.0f} generated tok/s", flush=True)
        ours = bench.ours()
        theirs = bench.theirs() if args.peer else None
    for figure in figures(args, offline, ours, theirs):
        report.keep(figure)
    if args.out is not None:
        save(report.records, args.out)


if __name__ == "__main__":
    main()
