"""What does the prefix cache cost where nothing is shared? Prefill and decode with it and without, in turns.

    python -m scripts.bench.prefix.cost --shape moonlight
    python -m scripts.bench.prefix.cost --shape tiny --device cpu --batch 4 --prompt 256 --output 16

One engine in one process, whose requests are random, so that nothing is found. All that is published is evicted later,
which counts, and so does listing it for the router. Each figure is the median over the rounds; a round measures both
kinds, the one that was second first.
"""

import argparse
from statistics import median

import torch
from tqdm import tqdm

from disagg.catalogue import Catalogue
from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.page_cache import PageCache
from disagg.warm_up import warm_up
from disagg.warm_up_progress import WarmUpProgress
from model.pages import PAGE, pages_for
from parallel.mesh import Mesh
from scripts.bench.engine.run import Bench, random_model
from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.shapes import SHAPES, check_size

KINDS = ("off", "auto")


def measure(bench: Bench, args: argparse.Namespace, caches: dict[str, PageCache]) -> dict[str, dict[str, float]]:
    """Return the median rates in tokens per second, by phase and kind."""
    rates: dict[str, dict[str, list[float]]] = {phase: {kind: [] for kind in KINDS} for phase in ("prefill", "decode")}
    tokens = args.output + -(-args.batch * args.prompt // args.step_tokens) + 3  # so that all decode together
    for number in tqdm(range(-1, args.repeat), desc="rounds"):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            bench.engine.scheduler.cache = cache = caches[kind]
            if cache.catalogue is not None:
                cache.catalogue.news()
            prefill = bench.prefill(args.batch, args.prompt)
            decode, *_ = bench.decode(args.batch, args.prompt, tokens)
            if number >= 0:  # the first round warms up
                rates["prefill"][kind].append(prefill)
                rates["decode"][kind].append(decode)
    return {phase: {kind: median(found) for kind, found in kinds.items()} for phase, kinds in rates.items()}


def parse(words: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
    add("--batch", type=positive, default=64, help="requests at once (64)")
    add("--prompt", type=positive, default=1024, help="tokens of each prompt (1024)")
    add("--output", type=positive, default=128, help="decode steps (128)")
    add("--step-tokens", type=positive, default=16384, help="prompt tokens per step (16384)")
    add("--repeat", type=positive, default=9, help="rounds (9)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser, parser.parse_args(words)


def run(args: argparse.Namespace, mesh: Mesh) -> list[Measurement]:
    """Run the whole benchmark, and return its figures. Raises ValueError for flags that cannot work."""
    torch.manual_seed(0)
    config = SHAPES[args.shape]
    check_size(args.shape, config, mesh.device.type)
    longest = args.prompt + args.output + -(-args.batch * args.prompt // args.step_tokens) + 3
    settings = EngineConfig(
        max_batch=args.batch,
        max_tokens_per_step=max(args.step_tokens, args.batch),
        kv_tokens=3 * args.batch * pages_for(longest) * PAGE,
        max_model_len=longest,
        dtype="bfloat16" if mesh.device.type == "cuda" else "auto",
    )
    report = Report()
    model = random_model(config, mesh, settings.model_len(config), ["auto"])
    engine = Engine(settings, model, mesh, report.say)
    warm_up(engine, WarmUpProgress(print, bar=True))
    pages = engine.scheduler.cache.capacity + 1
    caches = {kind: PageCache(pages, keeps=kind != "off") for kind in KINDS}
    caches["auto"].catalogue = Catalogue()
    found = measure(Bench(engine), args, caches)
    if caches["auto"].hits or not caches["auto"].evictions:
        raise RuntimeError(f"not what was to be measured: {caches['auto'].stats()}")
    name = f"{args.shape}, {args.batch} x {args.prompt} + {args.output} tokens, nothing shared"
    for phase, rates in found.items():
        value, reference = (round(rates[kind], 3) for kind in ("auto", "off"))
        source = "without the cache, same process, in turns"
        report.keep(Measurement(f"{name}: {phase} with the prefix cache", value, "tok/s", "higher", reference, source))
    engine.close()
    return report.records


def main() -> None:
    parser, args = parse()
    with refusals(parser):
        mesh = Mesh.create(device=args.device)
        records = run(args, mesh)
        mesh.close()
    if args.out is not None:
        save(records, args.out)


if __name__ == "__main__":
    main()
