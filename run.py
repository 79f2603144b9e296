"""Serve a model of the DeepSeek-V3 architecture. One command for every role; torchrun starts its ranks.

    python run.py --model model/tiny --prompt "In the beginning"
    torchrun --nproc-per-node 4 run.py --model model/tiny --input prompts.jsonl --output out.jsonl
    python run.py --model model/tiny --http 127.0.0.1:8000

Prefill and decode in separate jobs, started in any order. --router is the address where the router listens:

    python run.py --role router --router 127.0.0.1:7000 --model model/tiny --input prompts.jsonl --output out.jsonl
    torchrun --nproc-per-node 2 run.py --role prefill --router 127.0.0.1:7000 --model model/tiny
    torchrun --nproc-per-node 2 run.py --role decode  --router 127.0.0.1:7000 --model model/tiny

Each role has its own flags: --role ROLE --help lists them.
"""

from disagg.front.streams import check_file_limit, raise_file_limit, secure_streams
from disagg.interrupt import Interrupt
from parallel.launched import launched_name, launched_rank

if __name__ == "__main__":  # before the slow imports
    secure_streams(launched_name())
    raise_file_limit()
    Interrupt()

import argparse
import os
import sys
from typing import NoReturn

from disagg.config import DTYPES, EngineConfig
from disagg.control.access import add_access
from disagg.front.exit_status import exit_status
from disagg.front.flags import add_requests, check_requests
from disagg.front.process import RouterProcess
from disagg.handoff.endpoints import TRANSPORTS
from disagg.launch import run_router, run_worker
from model.config import ModelConfig
from model.hub import find_model
from parallel.mesh import Mesh

ROLES = ("unified", "prefill", "decode", "router")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags. Raises ValueError for flags that the role does not take, or that contradict each other."""
    common = Parser(add_help=False, allow_abbrev=False)
    add = common.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face folder (config.json, safetensors, tokenizer.json) or hub id: ORG/NAME, ORG/NAME@REVISION",
    )
    add("--role", choices=ROLES, default="unified", help="this job's role (unified: router, prefill and decode in one)")
    add("--max-model-len", type=int, metavar="N", help="limit of prompt plus generated tokens (the model's own)")
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--role", choices=ROLES, default="unified")
    role = first.parse_known_args(argv)[0].role
    parser = Parser(
        prog="run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    if role != "unified":
        text = "address to listen on" if role == "router" else "address of the router"
        parser.add_argument("--router", required=True, metavar="HOST:PORT", help=text)
    add_access(parser)
    if role in ("prefill", "decode"):
        add_handoff(parser)
    if role in ("unified", "router"):
        add_requests(parser)
    if role != "router":
        add_engine(parser, role)
        add_experts(parser)
        add_sizes(parser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"--role {role} does not take {unknown[0]}; --role {role} --help lists its flags")
    if role in ("unified", "router"):
        check_requests(args, parser)
    args.model_name = args.model  # `model` becomes the folder of a hub id
    return args


def add_handoff(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("handoff, the same in both roles").add_argument
    add("--transport", choices=TRANSPORTS, default="torch", help="the library that moves the KV (torch)")
    add("--kv-checksum", action="store_true", help="compare a checksum of each transfer, to look for a fault (off)")


def add_engine(parser: argparse.ArgumentParser, role: str) -> None:
    add = parser.add_argument_group("engine").add_argument
    add(
        "--load",
        choices=("weights", "dummy"),
        default="weights",
        help="the folder's weights, or random ones of its configuration (weights)",
    )
    add("--attn-tp", type=int, default=1, metavar="T", help="ranks per attention replica (1)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on CUDA, float32 on a CPU")
    add(
        "--backend",
        action="append",
        default=[],
        metavar="[OP=]LIB",
        help="use flash_attn, flash_mla, deep_gemm, triton or torch for one op, or for every op that the library has; "
        "dispatch=deepep or dispatch=all_to_all",
    )
    add("--prefix-cache", choices=("auto", "off"), default="auto", help="compute once what prompts share (auto: on)")
    add("--overlap", choices=("auto", "on", "off"), default="auto", help="two-batch overlap (auto)")
    add(
        "--speculate",
        default="0",
        metavar="N|auto[:N]",
        help="drafts per step, by the model's own MTP layer; auto: 0 to N (4), whatever pays best (0)",
    )
    add("--graphs", choices=("auto", "off"), default="auto", help="CUDA graphs for steps that allow it (auto)")


def add_experts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("experts").add_argument
    add("--redundant-experts", type=int, default=0, metavar="N", help="extra slots in the job, for expert replicas (0)")
    add("--expert-map", metavar="FILE", help="balance the experts over the ranks for this recording")
    add("--record-experts", metavar="FILE", help="write a recording: tokens per expert, in windows of steps")
    add(
        "--rebalance",
        default="0",
        metavar="N[,B[,L]]",
        help="every N steps, if the balancedness is at most B (1), move experts while serving, L layers at once (1)",
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sizes, per attention replica").add_argument
    add("--max-batch", type=int, default=64, metavar="N", help="requests that run at once (64)")
    add("--max-tokens-per-step", type=int, default=1024, metavar="N", help="longer prompts run in chunks (1024)")
    add("--kv-tokens", type=int, metavar="N", help="size of the KV pool in tokens (all that fit; 65536 on a CPU)")
    add(
        "--gpu-memory-fraction",
        type=float,
        default=0.9,
        metavar="F",
        help="fraction of each GPU's memory, for all ranks of this job on it (0.9)",
    )


def main() -> int:
    interrupt, args = Interrupt(), parse_args()
    check_file_limit()
    if args.role == "router":
        args.model = find_model(args.model, Mesh(), weights=False)
        return run_router(args, ModelConfig.from_pretrained(args.model), interrupt)
    settings = EngineConfig.from_flags(args)
    front = RouterProcess(args) if args.role == "unified" and launched_rank() == 0 else None
    try:
        mesh = Mesh.create(args.attn_tp)
        args.model = find_model(args.model, mesh, weights=args.load == "weights", drafts=settings.speculate > 0)
        return run_worker(args, settings, ModelConfig.from_pretrained(args.model), mesh, interrupt, front)
    finally:
        if front is not None:
            front.abandon()


if __name__ == "__main__":
    status = exit_status(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for threads: a link's may be inside a transfer whose peer has died
