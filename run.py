"""Serve a DeepSeek-V3-architecture model. One command for every role; torchrun starts its ranks.

    python run.py --model model/tiny --prompt "In the beginning"
    torchrun --nproc-per-node 4 run.py --model model/tiny --input prompts.jsonl --output out.jsonl

Prefill and decode in jobs of their own, in any order (--router is where the router listens):

    python run.py --role router --listen 127.0.0.1:7000 --model model/tiny --input prompts.jsonl --output out.jsonl
    torchrun --nproc-per-node 2 run.py --role prefill --router 127.0.0.1:7000 --model model/tiny
    torchrun --nproc-per-node 2 run.py --role decode  --router 127.0.0.1:7000 --model model/tiny
"""

from disagg.front.streams import discard_stdout, secure_streams
from disagg.interrupt import Interrupt

if __name__ == "__main__":  # before the other imports, which take seconds
    secure_streams()
    Interrupt()

import argparse
import os
import sys

import torch
from tqdm import tqdm

from disagg.control.address import answers, local_host, parse_address
from disagg.engine import DTYPES, Engine, EngineConfig
from disagg.front.front_door import FrontDoor, RouterThread
from disagg.loop import serve
from kernels.backend import choose, table
from model.config import ModelConfig
from model.precision import decide
from model.transformer import op_shape
from parallel.dispatchers import CHOICES
from parallel.mesh import Mesh, launched_local_rank

ROLES = ("unified", "prefill", "decode", "router")
WORK = {"prompt", "max_tokens", "input", "output", "overwrite", "resume", "show"}  # flags of those who have it


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder: config.json, safetensors, tokenizer.json")
    add("--role", choices=ROLES, default="unified", help="the loop that this job runs (default: unified, all in one)")

    work = parser.add_argument_group("work (unified, router)")
    work.add_argument("--prompt", metavar="TEXT", help="one prompt; its continuation is printed as it comes")
    work.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate for --prompt (64)")
    work.add_argument("--input", metavar="FILE", help="requests, a JSON object a line: prompt | ... (-: from stdin)")
    work.add_argument("--output", metavar="FILE", help="answers, a JSON object a line, in input order")
    work.add_argument("--overwrite", action="store_true", help="replace the output that is there")
    work.add_argument("--resume", action="store_true", help="go on behind the answers that are there")
    work.add_argument("--show", action="store_true", help="also print each text when it is finished")

    where = parser.add_argument_group("where")
    where.add_argument("--listen", metavar="HOST:PORT", help="router: where prefill and decode jobs find it")
    where.add_argument("--router", metavar="HOST:PORT", help="prefill, decode: the router's address")
    where.add_argument("--attn-tp", type=int, default=1, metavar="T", help="ranks of one attention replica (1)")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    where.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on CUDA")

    where.add_argument(
        "--backend",
        action="append",
        metavar="[OP=]LIB",
        help="force flash_attn, flash_mla, deep_gemm, triton or torch, for an op or all that it serves; or auto",
    )
    where.add_argument("--overlap", choices=("auto", "on", "off"), default="auto", help="two-batch overlap")
    where.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")

    where.add_argument("--dispatch", choices=CHOICES, default="auto", help="tokens to experts; auto: DeepEP if it can")

    experts = parser.add_argument_group("experts")
    experts.add_argument("--redundant-experts", type=int, default=0, metavar="N", help="slots for replicas, in all (0)")
    experts.add_argument("--expert-map", metavar="FILE", help="balance the experts over ranks for this recording")
    experts.add_argument("--record-experts", metavar="FILE", help="write a recording: tokens of each expert, by window")

    experts.add_argument(
        "--rebalance-interval",
        type=int,
        default=0,
        metavar="N",
        help="look every N steps whether experts should move, and move them while serving (0: never)",
    )
    experts.add_argument(
        "--rebalance-threshold",
        type=float,
        default=1.0,
        metavar="B",
        help="not while the balancedness, a rank's mean tokens over the fullest rank's, is above it (1)",
    )
    experts.add_argument(
        "--rebalance-layers-per-step", type=int, default=1, metavar="N", help="layers whose experts move at once (1)"
    )

    size = parser.add_argument_group("sizes, for each attention replica")
    size.add_argument("--max-batch", type=int, default=64, metavar="N", help="requests that run at once (64)")
    size.add_argument("--max-tokens-per-step", type=int, default=1024, metavar="N", help="prompts are cut to it (1024)")
    size.add_argument("--kv-tokens", type=int, metavar="N", help="tokens of KV in the pool (what fits; 65536 on a CPU)")
    size.add_argument("--max-model-len", type=int, metavar="N", help="prompt and generated tokens (the model's own)")
    size.add_argument(
        "--gpu-memory-fraction",
        type=float,
        default=0.9,
        metavar="F",
        help="of a GPU's memory, for all ranks of this job on it together (0.9)",
    )
    args = parser.parse_args(argv)
    _check_flags(args, parser)
    return args


def _check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    has_work = args.role in ("unified", "router")
    if has_work and (args.prompt is None) == (args.input is None):
        raise ValueError(f"--role {args.role} needs exactly one of --prompt and --input")
    if (args.input is None) != (args.output is None):
        raise ValueError("--input and --output go together: requests from one file, answers to another")
    if not has_work and (args.prompt is not None or args.input is not None):
        raise ValueError(f"--role {args.role} takes its work from the router, not from --prompt or --input")
    if args.prompt is not None and args.show:
        raise ValueError("--show is for --input; a --prompt is shown anyway")
    for flag in ("overwrite", "resume"):
        if args.output is None and getattr(args, flag):
            raise ValueError(f"--{flag} is for --output; a --prompt has none")
    if args.overwrite and args.resume:
        raise ValueError("--overwrite and --resume exclude each other: is the output that is there to stay?")
    if args.input is not None and args.max_tokens != parser.get_default("max_tokens"):
        raise ValueError(f"--max-tokens {args.max_tokens} is for --prompt; a line of --input has its own max_tokens")
    for flag in sorted(_unread(args.role, set(vars(args)))):
        if getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"--role {args.role} does not take --{flag.replace('_', '-')}")
    for role_needs, flag in ((args.role == "router", "listen"), (not has_work, "router")):
        if role_needs and getattr(args, flag) is None:
            raise ValueError(f"--role {args.role} needs --{flag} HOST:PORT")
    for flag, given in (("threshold", args.rebalance_threshold), ("layers-per-step", args.rebalance_layers_per_step)):
        if given != 1 and not args.rebalance_interval:
            raise ValueError(f"--rebalance-{flag} {given} needs --rebalance-interval: no expert moves without it")


def _unread(role: str, flags: set[str]) -> set[str]:
    """Those that would be without effect."""
    if role == "router":  # it runs no model
        return flags - WORK - {"role", "model", "listen", "max_model_len"}
    if role == "unified":
        return {"listen", "router"}
    return {"listen"} | WORK | ({"no_graphs"} if role == "prefill" else set())


def run_worker(args: argparse.Namespace, settings: EngineConfig, config: ModelConfig, interrupt: Interrupt) -> int:
    mesh = Mesh.create(args.attn_tp, args.device)
    choose_threads(mesh.device)

    def say(text: str) -> None:
        if mesh.rank == 0:
            print(text, file=sys.stderr, flush=True)

    if args.role == "unified":
        front, router = open_front_door(args, settings, config, mesh)
    else:
        front, router = None, parse_address("--router", args.router)
        if router[1] == 0:
            raise ValueError(f"--router is {args.router!r}; port 0 is only for --listen, which says what it got")
        try:
            local_host(router[0])  # there must be a way there, or the weights are read in vain
        except ValueError as error:
            raise ValueError(f"--router is {args.router!r}: {error}") from None
        if not answers(*router):
            say(f"{args.role}: nobody listens at {args.router} yet; this job will wait for a router there")
    ops, choices = choose(op_shape(config), settings.torch_dtype(mesh.device), mesh.device, args.backend or ())
    engine = Engine.from_pretrained(settings, config, args.model, mesh, ops, say)
    fp8 = decide(config, args.attn_tp, settings.torch_dtype(mesh.device), mesh.device).why if config.fp8 else ""
    where = f"cpu, threads: {torch.get_num_threads()}" if mesh.device.type == "cpu" else mesh.device.type
    say(f"{args.role}: {mesh.size} ranks in {mesh.num_replicas} attention replicas on {where}")
    say(f"{table(choices)}\n{'dispatch':>10}: {engine.dispatchers.why}\n{'overlap':>10}: {engine.rule.why}")
    if engine.why_graphs:
        say(f"{'decode':>10}: {engine.why_graphs}")
    if engine.rebalancer is not None:
        say(f"{'rebalance':>10}: {engine.rebalancer.why}")
    if fp8:
        say(f"{'fp8':>10}: {fp8}")
    engine.warm_up(lambda sizes: tqdm(sizes, desc="warming up", disable=None if mesh.rank == 0 else True))
    mesh.ep.exchange(None)  # until all ranks are here, Ctrl-C ends each by itself
    interrupt.hold()
    thread = RouterThread(front, interrupt, mesh.num_replicas) if front is not None else None
    problem = serve(args.role, engine, mesh, router, interrupt)
    if thread is not None:
        thread.join()
    engine.close()
    mesh.close()
    if problem is not None:
        print(f"{args.role}: {problem}", file=sys.stderr)
    return 1 if problem is not None or (front is not None and front.failed) else 0


def choose_threads(device: torch.device) -> None:
    """As torchrun does: one, unless the user says otherwise.

    On two idle cores the shipped model decodes as fast with one thread as with two, at 29 ms a step. Beside another
    busy process a step takes 29 to 60 ms with one, and 330 to 510 with two: they spin while they wait for one another.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def open_front_door(
    args: argparse.Namespace, settings: EngineConfig, config: ModelConfig, mesh: Mesh
) -> tuple[FrontDoor | None, tuple[str, int]]:
    """On rank 0, the front door; on every rank, where its router listens. An error there is one on all ranks."""
    front, error, address = None, None, None
    if mesh.rank == 0:
        host = local_host(mesh.first_host)
        try:
            front = FrontDoor(args, settings, config, (host, 0))
            address = (host, front.port.port)
        except ValueError as problem:
            error = str(problem)
    error, address = mesh.ep.exchange((error, address))[0]
    if error is not None:
        raise ValueError(error)
    return front, address


def main() -> int:
    interrupt = Interrupt()
    try:
        args = parse_args()
        settings = EngineConfig(
            max_batch=args.max_batch,
            max_tokens_per_step=args.max_tokens_per_step,
            kv_tokens=args.kv_tokens,
            max_model_len=args.max_model_len,
            dtype=args.dtype,
            dispatch=args.dispatch,
            decodes=args.role != "prefill",
            hands_over=args.role in ("prefill", "decode"),
            graphs=not args.no_graphs,
            overlap=args.overlap,
            redundant_experts=args.redundant_experts,
            expert_map=args.expert_map,
            record_experts=args.record_experts,
            rebalance_interval=args.rebalance_interval,
            rebalance_threshold=args.rebalance_threshold,
            rebalance_layers_per_step=args.rebalance_layers_per_step,
            gpu_memory_fraction=args.gpu_memory_fraction,
        )
        config = ModelConfig.from_pretrained(args.model)
        if args.role != "router":
            return run_worker(args, settings, config, interrupt)
        host, port = parse_address("--listen", args.listen)
        front = FrontDoor(args, settings, config, (host, port))
        front.announce(host)
        interrupt.hold()
        front.run(lambda: interrupt.seen)
        return 1 if front.failed else 0
    except BrokenPipeError:
        discard_stdout()
        print("run.py: error: nobody reads what it prints", file=sys.stderr)
        return 1
    except ValueError as error:
        if launched_local_rank() == 0:  # the others of this machine would only repeat it
            print(f"run.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without unwinding: a link's thread may still be inside a transfer whose peer has died
