"""Is `--speculate auto` as fast as the best number of drafts, with few requests at once and with many?

    python -m scripts.bench.speculation.auto --batch 1,4,16 --out records.json
    python -m scripts.bench.speculation.auto --batch 4 --prompt 200 --output 1 --round 8 --drafts 1 --out prompts.json

The shipped model continues the prompts of docs/prompts.jsonl, greedily: always --batch requests at once, as each one
that ends is followed by another. So it serves without drafts, with each of --drafts, and with `auto:N`. All kinds take
turns, in short rounds of some tokens per request, because a machine's speed changes within seconds. Rates are generated
tokens per second, prompts included, the median over the rounds; a ratio is the median of the rounds' ratios. The first
--learning rounds do not count. With --prompt, each prompt is repeated, or cut, to so many tokens; with --output 1
nothing decodes. The machine should be idle: what another process takes is learned, too.
"""

import argparse
import json
import time
from itertools import count, cycle
from statistics import median

from tqdm import trange

from disagg.config import EngineConfig
from disagg.control.messages import Submit, Update
from disagg.engine import Engine
from disagg.front.tokenizer import load_tokenizer
from disagg.pipeline import Pipeline
from disagg.request import Request
from disagg.unified import Unified
from disagg.warm_up import warm_up
from kernels.backend import choose
from model.config import ModelConfig
from model.precision import dtype_on
from model.transformer import op_shape
from parallel.mesh import Mesh
from scripts.bench.lib.flags import natural, new_file, positive, positives
from scripts.bench.lib.measurements import ROOT, Measurement, Report, save
from scripts.bench.lib.refusals import refusals

MODEL = ROOT / "model" / "tiny"


def read_prompts(length: int | None) -> list[list[int]]:
    """Return the tokens of the prompts, `length` of each if it is not None."""
    encoder = load_tokenizer(MODEL)
    lines = [json.loads(line) for line in (ROOT / "docs" / "prompts.jsonl").read_text().splitlines()]
    prompts = [encoder.chat(line["messages"]) if "messages" in line else encoder.text(line["prompt"]) for line in lines]
    return prompts if length is None else [(prompt * length)[:length] for prompt in prompts]


class Served:
    """An engine with some number of drafts, and a stream of requests, always `batch` of them at once."""

    def __init__(
        self, batch: int, prompts: list[list[int]], output: int, drafts: int, adapts: bool, mesh: Mesh
    ) -> None:
        longest = max(map(len, prompts)) + output
        config = ModelConfig.from_pretrained(MODEL)
        ops, _ = choose(op_shape(config), dtype_on(mesh.device, "auto"), mesh.device, [])
        settings = EngineConfig(
            max_batch=batch,
            max_tokens_per_step=max(1024, batch * (1 + drafts)),
            kv_tokens=batch * (longest + 128),
            max_model_len=longest,
            speculate=drafts,
            adapts=adapts,
            prefix_cache="off",
        )
        self.engine = Engine.from_pretrained(settings, config, MODEL, mesh, ops)
        warm_up(self.engine)
        self.role, self.uids, self.prompts, self.output = Unified(self.engine), count(), cycle(prompts), output
        self.pipeline = Pipeline(self.role, self.engine, mesh)
        for place in range(batch):  # the first ones are shorter, so that they end one after the other
            self._submit(-(-output * (place + 1) // batch))

    def rate(self, tokens: int) -> float:
        """Serve until so many tokens were generated. Return the generated tokens per second."""
        began, done = time.perf_counter(), 0
        self.pipeline._seen = began  # the other kinds' rounds are no part of the step that was launched before them
        while done < tokens:
            before = self._generated
            self.pipeline.turn()
            done += self._generated - before
            ended = sum(isinstance(update, Update) and update.finish is not None for update in self.role.updates)
            self.role.updates.clear()
            for _ in range(ended):
                self._submit(self.output)
        return done / (time.perf_counter() - began)

    @property
    def _generated(self) -> int:
        return int(self.pipeline.stats["prefill_step_tokens"] + self.pipeline.stats["decode_step_tokens"])

    def _submit(self, output: int) -> None:
        self.role.handle(Submit(Request(next(self.uids), next(self.prompts), output, ignore_eos=True), None))


def measure(args: argparse.Namespace, batch: int, prompts: list[list[int]], mesh: Mesh, report: Report) -> None:
    auto, most, work = f"auto:{args.most}", args.most, f"tiny, {batch} requests at once"
    if args.prompt is not None:
        work += f", {args.prompt} prompt tokens and {args.output} generated"
    kinds = {str(n): (n, False) for n in (*args.drafts, 0)} | {auto: (most, True)}  # none and auto in a row
    served = {
        name: Served(batch, prompts, args.output, drafts, adapts, mesh) for name, (drafts, adapts) in kinds.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in served}
    for number in trange(args.learning + args.repeat, desc=f"batch {batch}, rounds"):
        for name in list(served)[:: 1 if number % 2 else -1]:
            rates[name].append(served[name].rate(batch * args.round))
    counted = {name: those[args.learning :] for name, those in rates.items()}
    found = {name: round(median(those), 2) for name, those in counted.items()}
    best = max((name for name in found if name != auto), key=found.__getitem__)
    for name, rate in found.items():
        beside, source = (found[best], f"{best} drafts, the best") if name == auto else (found["0"], "no drafts")
        of, reference = f"{work}, drafts: {name}", beside if name != "0" else None
        source = f"{source}, same run" if reference is not None else ""
        report.keep(Measurement(of, rate, "tok/s", "higher", reference, source))
    ratio = median(mine / none for mine, none in zip(counted[auto], counted["0"], strict=True))
    of = f"{work}, drafts: {auto}: its rate over that without drafts"
    report.keep(Measurement(of, round(ratio, 3), "x", "higher"))
    for each in served.values():
        each.engine.close()


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=positives, default=[1, 4, 16], metavar="B,...", help="requests at once (1,4,16)")
    add("--drafts", type=positives, default=[1, 2, 3], metavar="N,...", help="fixed numbers of drafts (1,2,3)")
    add("--most", type=positive, default=3, metavar="N", help="the most drafts of auto (3)")
    add("--prompt", type=positive, metavar="T", help="tokens of each prompt (as docs/prompts.jsonl has them)")
    add("--output", type=positive, default=256, help="tokens to generate per request (256)")
    add("--round", type=positive, default=64, help="tokens per request and round (64)")
    add("--learning", type=natural, default=16, help="rounds that do not count (16)")
    add("--repeat", type=positive, default=60, help="rounds (60)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse()
    with refusals(parser):
        mesh, report, prompts = Mesh.create(device=args.device), Report(), read_prompts(args.prompt)
        for batch in args.batch:
            measure(args, batch, prompts, mesh, report)
        if args.out is not None:
            save(report.records, args.out)
        mesh.close()


if __name__ == "__main__":
    main()
