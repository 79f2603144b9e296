"""Launch: start the router, or one rank of a job with its engine and its loop. Called by run.py with its flags."""

import os
import sys
from argparse import Namespace

import torch

from disagg.config import DISPATCH, EngineConfig
from disagg.control.access import read_secret
from disagg.control.address import answers, parse_address
from disagg.engine import Engine
from disagg.front.front_door import FrontDoor, RouterThread
from disagg.front.process import RouterProcess
from disagg.handoff.credits import buffer_bytes
from disagg.handoff.endpoints import BY_DEFAULT, Handoff
from disagg.interrupt import Interrupt
from disagg.loop import serve
from disagg.warm_up import warm_up
from disagg.warm_up_progress import WarmUpProgress
from kernels.backend import choose, table
from model.config import ModelConfig
from model.footprint import page_bytes
from model.precision import decide, dtype_on
from model.transformer import op_shape
from parallel.interface import local_host
from parallel.mesh import Mesh


def run_router(args: Namespace, config: ModelConfig, interrupt: Interrupt) -> int:
    """Run the router until all requests have an answer. Returns the process's exit status."""
    host, port = parse_address("--router", args.router)
    front = FrontDoor(args, config, (host, port))
    front.announce(host)
    interrupt.hold()
    RouterThread(front, interrupt).join()  # not in the main thread, whose signals an event loop would take
    return 1 if front.failed else 0


def run_worker(
    args: Namespace,
    settings: EngineConfig,
    config: ModelConfig,
    mesh: Mesh,
    interrupt: Interrupt,
    front: RouterProcess | None,
) -> int:
    """Run one rank of a job. Returns the process's exit status. `front`: on rank 0 of a unified job, else None.

    Raises ValueError for flags that the model or the machine does not allow.
    """
    choose_threads(mesh.device)

    def say(text: str) -> None:
        if mesh.rank == 0:
            print(text, file=sys.stderr, flush=True)

    if args.role == "unified":
        handoff = BY_DEFAULT
        secret = read_secret(args, mesh.first_host)
        if front is not None:
            front.open(args.model, local_host(mesh.first_host))
    else:
        handoff = Handoff(args.transport, args.kv_checksum)
        handoff.check(mesh.device)
        router = find_router(args.router)
        secret = read_secret(args, router[0], mesh.first_host)
        if not answers(*router):
            say(f"{args.role}: nobody listens at {args.router} yet; this job will wait for a router there")
    dtype = dtype_on(mesh.device, settings.dtype)
    forced = [text for text in args.backend if not text.startswith(DISPATCH)]
    ops, choices = choose(op_shape(config), dtype, mesh.device, forced)
    if args.role == "unified":
        router = wait_for_front_door(front, mesh)
    handed_over = config.drafting() if settings.speculate else config
    handoff_bytes = buffer_bytes(page_bytes(handed_over, dtype.itemsize)) if args.role != "unified" else 0
    engine = Engine.from_pretrained(settings, config, args.model, mesh, ops, say, handoff_bytes)
    fp8 = decide(config, args.attn_tp, dtype, mesh.device).why if config.fp8 else ""
    where = f"cpu, threads: {torch.get_num_threads()}" if mesh.device.type == "cpu" else mesh.device.type
    say(f"{args.role}: ranks: {mesh.size}, attention replicas: {mesh.num_replicas}, on {where}")
    say(f"{'weights':>10}: {engine.loaded}")
    say(f"{table(choices)}\n{'dispatch':>10}: {engine.dispatchers.why}\n{'overlap':>10}: {engine.rule.why}")
    if engine.captures.why:
        say(f"{'graphs':>10}: {engine.captures.why}")
    if settings.speculate:
        drafts = settings.drafts_per_step
        range_ = f"{drafts[0]} to " if len(drafts) > 1 else ""
        say(f"{'drafts':>10}: {range_}{settings.speculate} per step")
    if engine.rebalancer is not None:
        say(f"{'rebalance':>10}: {engine.rebalancer.why}")
    if fp8:
        say(f"{'fp8':>10}: {fp8}")
    progress = WarmUpProgress(say, bar=mesh.rank == 0)
    warm_up(engine, progress, behind=True)
    if progress.summary:
        say(f"{'warm-up':>10}: {progress.summary}")
    mesh.ep.barrier()  # until all ranks have come, Ctrl-C ends each rank by itself
    interrupt.hold()
    if front is not None:
        front.start(mesh.num_replicas, interrupt)
    problem = serve(args.role, engine, mesh, router, interrupt, secret, handoff)
    status = front.join() if front is not None else 0
    engine.close()
    mesh.close()
    if problem is not None:
        print(f"{args.role}: {problem}", file=sys.stderr)
    return status or int(problem is not None)


def find_router(text: str) -> tuple[str, int]:
    """Parse --router. Raises ValueError if its host cannot be reached, before the weights are read in vain."""
    host, port = parse_address("--router", text)
    if port == 0:
        raise ValueError(f"--router is {text!r}; port 0 is only for the router itself, which says what it got")
    try:
        local_host(host)
    except ValueError as error:
        raise ValueError(f"--router is {text!r}: {error}") from None
    return host, port


def choose_threads(device: torch.device) -> None:
    """Use one thread, as torchrun does, unless OMP_NUM_THREADS is set.

    On two idle cores the shipped model decodes as fast with one thread as with two, at 29 ms per step. Beside another
    busy process a step takes 29 to 60 ms with one thread, and 330 to 510 ms with two. Two threads spin while they wait
    for one another.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def wait_for_front_door(front: RouterProcess | None, mesh: Mesh) -> tuple[str, int]:
    """Collective. Wait until rank 0's front door is open. Returns the router's address.

    An error on rank 0 is raised on all ranks, as a ValueError.
    """
    problem, address = None, None
    if front is not None:
        try:
            address = front.address()
        except ValueError as error:
            problem = str(error)
    if (problem := mesh.ep.first_problem(problem)) is not None:
        raise ValueError(problem)
    return mesh.ep.exchange(address, tuple[str, int] | None)[0]
