"""How many drafts of the shipped model are right, in held-out text of each domain that it was trained on?

    apt-get install bible-kjv wordnet-base    # as for scripts.tools.train_tiny, with the same Python
    python -m scripts.bench.speculation --drafts 1,2,3,4 --out records.json

Prompts are pieces of held-out text, spread evenly over it. The engine continues each, without drafts and with each
number of drafts. It says how many answers parted from those without, as rounding may make them. Tokens per step are
those that a request gets of a step of the model, on average. "Right up to place k": the draft in place k and all before
it. Neither depends on the machine.

--timed requests per domain are also served one at a time, the numbers of drafts in turns: tokens per second after the
first token, as the host sees them.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tokenizers import Tokenizer

from disagg.config import EngineConfig
from disagg.control.messages import Submit, Tokens
from disagg.engine import Engine
from disagg.pipeline import Pipeline, Turn
from disagg.request import MOST_DRAFTS, Request
from disagg.unified import Unified
from disagg.warm_up import warm_up
from kernels.backend import choose
from model.config import ModelConfig
from model.precision import dtype_on
from model.transformer import op_shape
from parallel.mesh import Mesh
from scripts.bench.lib.flags import fraction, natural, new_file, positive, positives
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.tools.tiny_text import encode, read_documents

MODEL = Path(__file__).parents[3] / "model" / "tiny"
WINDOW = 2048  # tokens: training.json counts the held-out text in whole ones


def held_out(wordnet: Path, stdlib: Path) -> dict[str, np.ndarray]:
    """Return the held-out text of each domain as one stream of tokens.

    Raises ValueError if a domain's text is not that of the training, OSError if it is not there.
    """
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    trained, streams = json.loads((MODEL / "training.json").read_text())["heldout"], {}
    for domain, documents in read_documents(wordnet, stdlib).items():
        streams[domain] = encode(tokenizer, [text for text, is_held_out in documents if is_held_out])
        found, known = len(streams[domain]) // WINDOW * WINDOW, trained[domain]["tokens"]
        if found != known:
            raise ValueError(f"{domain}: {found:,} tokens are held out, and {known:,} were in training: another corpus")
    return streams


def pieces(stream: np.ndarray, count: int, length: int) -> list[list[int]]:
    """Return `count` pieces of `length` tokens, spread evenly over a stream. Raises ValueError if it is too short."""
    whole = stream[: len(stream) // length * length].reshape(-1, length)
    if len(whole) < count:
        raise ValueError(f"--requests {count} --prompt {length}: a domain has only {len(stream):,} held-out tokens")
    return whole[np.arange(count) * len(whole) // count].tolist()


class Served:
    """An engine with a number of drafts, and what it has served."""

    def __init__(self, args: argparse.Namespace, drafts: int, mesh: Mesh) -> None:
        self.drafts, self.fields = drafts, {"temperature": args.temperature, "ignore_eos": True}
        config, length = ModelConfig.from_pretrained(MODEL), args.prompt + args.output
        ops, _ = choose(op_shape(config), dtype_on(mesh.device, "auto"), mesh.device, [])
        settings = EngineConfig(
            max_batch=args.requests,
            max_tokens_per_step=max(1024, args.requests * (1 + drafts)),
            kv_tokens=args.requests * (length + 64 + 3 * (1 + drafts)),
            max_model_len=length,
            speculate=drafts,
            prefix_cache="off",
        )
        self.engine, self.output = Engine.from_pretrained(settings, config, MODEL, mesh, ops), args.output
        warm_up(self.engine)

    def serve(self, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, float], float]:
        """Serve prompts together. Returns the tokens, the replica's statistics, and the seconds after first tokens."""
        role = Unified(self.engine)
        pipeline = Pipeline(role, self.engine, self.engine.mesh)
        for uid, prompt in enumerate(prompts):
            role.handle(Submit(Request(uid, prompt, self.output, seed=uid, **self.fields), None))
        tokens: list[list[int]] = [[] for _ in prompts]
        began = ended = 0.0
        while pipeline.turn() == Turn.WORKED:
            if role.updates:
                ended = time.perf_counter()
                began = began or ended
            for update in role.updates:
                news = update.by_uid.items() if isinstance(update, Tokens) else [(update.uid, update.tokens)]
                for uid, new in news:
                    tokens[uid] += [new] if isinstance(new, int) else new
            role.updates.clear()
        return tokens, role.stats(), ended - began

    def rate(self, prompts: list[list[int]]) -> float:
        """Serve prompts one at a time. Return the tokens per second after each one's first."""
        served = [self.serve([prompt]) for prompt in prompts]
        tokens = sum(len(each) - 1 for (each,), _, _ in served)
        return tokens / sum(seconds for _, _, seconds in served)


def places(stats: dict[str, float], drafts: int) -> list[float]:
    """Return the share of the verified drafts in each place that were right, and all before them, too."""
    return [stats[f"accepted_drafts_{i}"] / stats[f"verified_drafts_{i}"] for i in range(1, drafts + 1)]


def tokens_per_step(stats: dict[str, float], drafts: int) -> float:
    """Return the tokens of a step that verified, per request."""
    return 1 + sum(stats[f"accepted_drafts_{i}"] for i in range(1, drafts + 1)) / stats["verifications"]


def measure(args: argparse.Namespace, texts: dict[str, list[list[int]]], mesh: Mesh, report: Report) -> None:
    every = [Served(args, drafts, mesh) for drafts in (0, *args.drafts)]
    sampled = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    for domain, prompts in texts.items():
        of = f"tiny, held-out {domain}, {sampled}"
        plain, _, _ = every[0].serve(prompts)
        for served in every[1:]:
            tokens, stats, _ = served.serve(prompts)
            parted = sum(mine != theirs for mine, theirs in zip(tokens, plain, strict=True))
            if parted:
                report.say(f"{of}, drafts: {served.drafts}: {parted} of {len(prompts)} parted from those without")
            name = f"{of}, drafts: {served.drafts}"
            report.keep(Measurement(f"{name}: tokens per step", round(tokens_per_step(stats, served.drafts), 3), ""))
            for place, share in enumerate(places(stats, served.drafts), 1):
                report.keep(Measurement(f"{name}: right up to place {place}", round(100 * share, 1), "%"))
        if not args.timed:
            continue
        rates = [[served.rate(prompts[: args.timed]) for served in every] for _ in range(args.repeat + 1)][1:]
        for served, those in zip(every, zip(*rates, strict=True), strict=True):
            name = f"{of}, one request at a time, drafts: {served.drafts}"
            reference = round(median(row[0] for row in rates), 2) if served.drafts else None
            source = "no drafts, same run" if served.drafts else ""
            report.keep(Measurement(name, round(median(those), 2), "tok/s", "higher", reference, source))
    for served in every:
        served.engine.close()


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--drafts", type=positives, default=[1, 2, 3, 4], metavar="N,...", help="drafts per step (1,2,3,4)")
    add("--requests", type=positive, default=64, help="requests per domain (64)")
    add("--prompt", type=positive, default=128, help="tokens of held-out text per request (128)")
    add("--output", type=positive, default=64, help="tokens to generate per request (64)")
    add("--temperature", type=fraction, default=0.0, help="of every request (0: greedy)")
    add("--timed", type=natural, default=0, help="requests per domain to serve one at a time, and to time (0)")
    add("--repeat", type=positive, default=3, help="runs per median of the times (3)")
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), metavar="DIR", help="WordNet's files")
    add("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), metavar="DIR", help="Python's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    if max(args.drafts) > MOST_DRAFTS:
        parser.error(f"argument --drafts: at most {MOST_DRAFTS} drafts, not {max(args.drafts)}")
    if args.output < (least := max(args.drafts) + 2):
        parser.error(f"argument --output: at least {least} tokens, the first, the last, and one for each draft between")
    return parser, args


def main() -> None:
    parser, args = parse()
    with refusals(parser):
        try:
            streams = held_out(args.wordnet, args.stdlib)
        except (OSError, KeyError) as error:
            raise ValueError(f"the corpora of scripts.tools.train_tiny are needed ({error})") from None
        texts = {domain: pieces(stream, args.requests, args.prompt) for domain, stream in streams.items()}
        mesh = Mesh.create(device=args.device)
        report = Report()
        torch.manual_seed(0)
        measure(args, texts, mesh, report)
        if args.out is not None:
            save(report.records, args.out)
        mesh.close()
