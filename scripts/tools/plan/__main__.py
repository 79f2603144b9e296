"""Plan a deployment from config.json alone: what fits, how large a batch, how many ranks per role, and the commands.

    scripts/plan DIR --gpus 96 --gpu h200 --prompt 2000 --output 100

The memory is the engine's own arithmetic. All rates are modelled: none was measured at that size.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from disagg.request import MOST_DRAFTS
from model.config import ModelConfig, read_json
from scripts.bench.lib.flags import natural, positive, probability
from scripts.bench.lib.shapes import SHAPES
from scripts.tools.plan.deployment import apart, options, unified
from scripts.tools.plan.gpus import GPUS
from scripts.tools.plan.rank import Traffic
from scripts.tools.plan.report import Plan
from scripts.tools.plan.sizes import MOST_EXPERTS

MOST_GPUS, MOST_PER_HOST = 100_000, 72


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags. Raises ValueError."""
    parser = Parser(
        prog="scripts/plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"a folder, a config.json, or one of the shapes {', '.join(SHAPES)}")
    add("--gpus", type=positive, required=True, metavar="N", help="GPUs that there are")
    add("--gpu", choices=GPUS, required=True, help="their kind")
    add("--prompt", type=positive, default=2000, metavar="N", help="tokens per prompt (2000)")
    add("--output", type=positive, default=100, metavar="N", help="tokens to generate per request (100)")
    add("--gpus-per-host", type=positive, default=8, metavar="N", help="GPUs of one machine (8)")
    add("--redundant-experts", type=natural, metavar="N", help="as in run.py, for every job (the least that divides)")
    add("--speculate", type=natural, default=0, metavar="N", help="drafts per step, as in run.py (0)")
    add(
        "--accept",
        type=probability,
        default=Traffic.accept,
        metavar="X",
        help="ASSUMED probability that a draft is right if those before it are (0.6, as in SGLang's report)",
    )
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    limits = (("--gpus", args.gpus, MOST_GPUS), ("--gpus-per-host", args.gpus_per_host, MOST_PER_HOST),
              ("--speculate", args.speculate, MOST_DRAFTS))  # fmt: skip
    for flag, value, most in limits:
        if value > most:
            raise ValueError(f"{flag} is {value}; it must be at most {most}")
    return args


def read_config(model: str) -> ModelConfig:
    """Read a folder, a file, or a known shape. Raises ValueError."""
    path = Path(model)
    if path.is_dir():
        config = ModelConfig.from_pretrained(path)
    elif path.is_file():
        config = ModelConfig.from_dict(read_json(path), model)
    elif model in SHAPES:
        config = SHAPES[model]
    else:
        raise ValueError(f"MODEL {model}: no such folder or file, and no shape; the shapes are {', '.join(SHAPES)}")
    if config.n_routed_experts > MOST_EXPERTS:
        raise ValueError(
            f"{model}: n_routed_experts is {config.n_routed_experts}; the planner takes at most {MOST_EXPERTS}"
        )
    return config


def main() -> int:
    try:
        args = parse_args()
        config, gpu, traffic = read_config(args.model), GPUS[args.gpu], Traffic(args.prompt, args.output, args.accept)
        config = config.drafting() if args.speculate else config
        if traffic.total > config.max_position_embeddings:
            raise ValueError(
                f"--prompt + --output = {args.prompt} + {args.output} = {traffic.total} is over the model's "
                f"max_position_embeddings ({config.max_position_embeddings})"
            )
        found = options(config, gpu, args.gpus, traffic, args.gpus_per_host, args.redundant_experts, args.speculate)
        if apart(found, args.gpus) is None and unified(found, args.gpus) is None:
            reasons = found.illegal | found.too_small
            raise ValueError(reasons[max(reasons)])
        model = args.model if Path(args.model).is_dir() else "DIR"
        plan = Plan(config, gpu, args.gpus, args.gpus_per_host, traffic, found, model)
        print(json.dumps(plan.as_object(), indent=2) if args.json else plan.as_text())
    except (ValueError, OSError) as error:
        print(f"scripts/plan: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
