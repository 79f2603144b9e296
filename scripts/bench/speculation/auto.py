"""Is `--speculate auto` as fast as the best number of drafts, with few requests at once and with many?

    python -m scripts.bench.speculation.auto --batch 1,4,16 --out records.json

The shipped model continues the prompts of docs/prompts.jsonl, greedily: --batch requests at once, without drafts, with
each of --drafts, and with `auto:N`. All kinds take turns, in rounds. Rates are generated tokens per second, prompts
included, the median over the rounds. `auto` keeps what it has learned from round to round. The first --learning rounds
do not count. The machine should be idle: what another process takes is learned, too.
"""

import argparse
import json
import time
from itertools import count
from statistics import median

from tqdm import trange

from disagg.config import EngineConfig
from disagg.control.messages import Submit
from disagg.engine import Engine
from disagg.front.tokenizer import load_tokenizer
from disagg.pipeline import Pipeline, Turn
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


def read_prompts() -> list[list[int]]:
    encoder = load_tokenizer(MODEL)
    lines = [json.loads(line) for line in (ROOT / "docs" / "prompts.jsonl").read_text().splitlines()]
    return [encoder.chat(line["messages"]) if "messages" in line else encoder.text(line["prompt"]) for line in lines]


class Served:
    """An engine with some number of drafts, and the requests that it has served."""

    def __init__(self, batch: int, longest: int, drafts: int, adapts: bool, mesh: Mesh) -> None:
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
        self.role, self.uids = Unified(self.engine), count()
        self.pipeline = Pipeline(self.role, self.engine, mesh)

    def rate(self, prompts: list[list[int]], output: int) -> float:
        """Serve prompts, `output` tokens each. Return the generated tokens per second."""
        for prompt in prompts:
            self.role.handle(Submit(Request(next(self.uids), prompt, output, ignore_eos=True), None))
        began = time.perf_counter()
        while self.pipeline.turn() == Turn.WORKED:
            self.role.updates.clear()
        return len(prompts) * output / (time.perf_counter() - began)


def measure(args: argparse.Namespace, batch: int, prompts: list[list[int]], mesh: Mesh, report: Report) -> None:
    longest = max(map(len, prompts)) + args.output
    kinds = [*((str(n), n, False) for n in (0, *args.drafts)), (f"auto:{args.most}", args.most, True)]
    served = {name: Served(batch, longest, *how, mesh) for name, *how in kinds}
    rates: dict[str, list[float]] = {name: [] for name in served}
    for number in trange(args.learning + args.repeat, desc=f"batch {batch}, rounds"):
        work = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
        for name in list(served)[:: 1 if number % 2 else -1]:
            rates[name].append(served[name].rate(work, args.output))
    found = {name: round(median(those[args.learning :]), 2) for name, those in rates.items()}
    auto, best = kinds[-1][0], max(list(found)[:-1], key=found.__getitem__)
    for name, rate in found.items():
        beside, source = (found[best], f"{best} drafts, the best") if name == auto else (found["0"], "no drafts")
        reference = (beside, f"{source}, same run") if name != "0" else ()
        of = f"tiny, {batch} requests at once, drafts: {name}"
        report.keep(Measurement(of, rate, "tok/s", "higher", *reference))
    report.keep(
        Measurement(
            f"tiny, {batch} requests at once, drafts: {auto}, beside none", found[auto], "tok/s", "higher", found["0"],
            "no drafts, same run",
        )
    )  # fmt: skip
    for each in served.values():
        each.engine.close()


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=positives, default=[1, 4, 16], metavar="B,...", help="requests at once (1,4,16)")
    add("--drafts", type=positives, default=[1, 2, 3], metavar="N,...", help="fixed numbers of drafts (1,2,3)")
    add("--most", type=positive, default=3, metavar="N", help="the most drafts of auto (3)")
    add("--output", type=positive, default=256, help="tokens to generate per request (256)")
    add("--learning", type=natural, default=4, help="rounds that do not count (4)")
    add("--repeat", type=positive, default=9, help="rounds (9)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse()
    with refusals(parser):
        mesh, report, prompts = Mesh.create(device=args.device), Report(), read_prompts()
        for batch in args.batch:
            measure(args, batch, prompts, mesh, report)
        if args.out is not None:
            save(report.records, args.out)
        mesh.close()


if __name__ == "__main__":
    main()
