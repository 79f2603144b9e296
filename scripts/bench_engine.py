"""Offline throughput of the engine on a model of given shape with random weights: prefill, and decode by batch size.

python scripts/bench_engine.py --shape moonlight --batch 1,32,64,128 --prompt 1024 --output 128 --out records.json

Times are the host's: prefill from the first step to the moment the last request's first token is known, decode over the
steps in which all requests decode. Requests go through the scheduler and the step loop as in a job, without a router.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from disagg.control import Submit
from disagg.engine import Engine, EngineConfig, Step
from disagg.request import Request
from disagg.unified import Unified
from disagg.worker import Pipeline
from parallel.mesh import Mesh
from scripts.measurements import Record, save
from scripts.shapes import SHAPES, random_model


@dataclass(frozen=True)
class Mark:
    """The moment at which a step's tokens were known to the host."""

    now: float
    waited: float  # seconds that the host stood still for them
    tokens: int
    mixed: bool


class Timed(Unified):
    """The unified role, with a mark for each step."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self.marks: list[Mark] = []

    def after(self, step: Step) -> None:
        start = time.perf_counter()
        if step.done is not None:
            step.done.synchronize()
        now = time.perf_counter()
        self.marks.append(Mark(now, now - start, len(step.sequences), step.mixed))
        super().after(step)


class Bench:
    def __init__(self, engine: Engine, prompt: int):
        self.engine, self.prompt = engine, prompt
        self.role = Timed(engine)
        self.pipeline = Pipeline(self.role, engine, engine.mesh)
        self.uid = 0

    def drive(self, batch: int, max_tokens: int) -> float:
        """Run `batch` requests to their end. When it began."""
        vocab = self.engine.config.vocab_size
        for _ in range(batch):
            prompt = torch.randint(vocab, (self.prompt,)).tolist()
            self.role.handle(Submit(Request(self.uid, prompt, max_tokens, ignore_eos=True), None))
            self.uid += 1
        self.role.marks.clear()
        start = time.perf_counter()
        while self.pipeline.turn():
            self.role.updates.clear()
        return start

    def prefill(self, batch: int) -> float:
        """Prompt tokens a second."""
        start = self.drive(batch, 1)
        return batch * self.prompt / (self.role.marks[-1].now - start)

    def decode(self, batch: int, steps: int) -> tuple[float, float]:
        """While all requests decode: tokens a second, and the milliseconds of a step that the host itself took."""
        self.drive(batch, steps + 2)
        window = [mark for mark in self.role.marks if not mark.mixed][1:]  # after the last prompt
        seconds = window[-1].now - window[0].now
        host = seconds - sum(mark.waited for mark in window[1:])
        return sum(mark.tokens for mark in window[1:]) / seconds, 1e3 * host / (len(window) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="moonlight")
    add("--batch", default="1,32,64,128", help="decode batch sizes")
    add("--prompt", type=int, default=1024, help="tokens of each prompt")
    add("--output", type=int, default=128, help="decode steps")
    add("--prefill-batch", type=int, default=64)
    add("--step-tokens", type=int, default=16384, help="prompt tokens a step")
    add("--repeat", type=int, default=3)
    add("--layers", type=int, help="fewer layers than the shape has")
    add("--backend", action="append", metavar="[OP=]LIB")
    add("--no-graphs", action="store_true")
    add("--out", type=Path, metavar="FILE", help="write the records there, for scripts/report.py")
    args = parser.parse_args()
    torch.manual_seed(0)
    batches = [int(b) for b in args.batch.split(",")]
    most = max(*batches, args.prefill_batch) if len(batches) > 1 else max(batches[0], args.prefill_batch)
    mesh, config = Mesh.create(), SHAPES[args.shape]
    length = args.prompt + args.output + 3
    settings = EngineConfig(
        max_batch=most,
        max_tokens_per_step=max(args.step_tokens, most),
        kv_tokens=most * (length + 64),
        max_model_len=min(length, config.max_position_embeddings),
        dtype="bfloat16",
        graphs=not args.no_graphs,
    )
    start = time.perf_counter()
    model = random_model(config, mesh, settings.model_len(config), args.backend or ["auto"])
    engine = Engine(settings, model, mesh)
    engine.warm_up(lambda sizes: tqdm(sizes, desc="warming up", file=sys.stderr, disable=None))
    print(f"ready after {time.perf_counter() - start:.1f} s")
    bench, records = Bench(engine, args.prompt), []

    def report(name: str, value: float, unit: str = "tok/s", better: str = "higher") -> None:
        full = f"{args.shape}, {name}"
        print(f"{full:60} {value:12,.3f} {unit}", flush=True)
        records.append(Record(full, round(value, 3), unit, better))

    bench.prefill(args.prefill_batch)
    for batch in (args.prefill_batch, 1):
        rates = [bench.prefill(batch) for _ in range(args.repeat)]
        report(f"prefill {batch} x {args.prompt}", median(rates))
    for batch in batches:
        rates, host = zip(*(bench.decode(batch, args.output) for _ in range(args.repeat)), strict=True)
        report(f"decode, batch {batch} after {args.prompt}", median(rates))
        report(f"the host's part of a decode step, batch {batch}", median(host), "ms", "lower")
    if mesh.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if args.out is not None:
        save(records, args.out)


if __name__ == "__main__":
    main()
