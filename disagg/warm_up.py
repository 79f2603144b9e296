"""The warm-up: steps of all sizes in which kernels differ. Their requests are made up, and get no answer."""

import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from disagg.engine import Engine
from disagg.products import run_products
from disagg.request import Request
from disagg.scheduler import Plan, Sequence
from disagg.step import NO_WORK, Drafts, Work
from disagg.warm_up_progress import Shown, silent
from kernels.compile_ahead import CompileAhead, Compiler
from kernels.nvcc_ahead import NvccAhead
from kernels.ops import Ops
from model.pages import pages_for

COMPILED = "all kernels of this rank are compiled; later starts on this machine find them"
NOT_COMPILED = "kernels not compiled ahead, first"
Size = TypeVar("Size", bound=Any)


def warm_up(engine: Engine, progress: Shown = silent, behind: bool = False) -> None:
    """Collective. Compile kernels before the first request, and capture some steps. No-op on a CPU.

    `progress` shows how far it is. `behind`: return while products that few steps need are still being compiled.
    """
    if engine.mesh.device.type != "cuda":
        return
    found, all_of_them = compilers(engine.ops, alone=engine.mesh.size == 1)
    ahead = engine.compiling = make_ahead(engine, found)
    try:
        with ahead.installed():
            run_all(engine, ahead, all_of_them, progress, behind)
    except BaseException:
        ahead.close()
        raise
    torch.cuda.synchronize()
    for counter in engine.model.load_counters:
        counter.forget()
    gc.collect()
    gc.freeze()  # these objects live as long as the engine, so later collections can skip them


def run_all(engine: Engine, ahead: CompileAhead, all_of_them: bool, progress: Shown, behind: bool) -> None:
    """Collective. Rehearse, unless an earlier start has, and run. `all_of_them`: can all kernels be compiled ahead?"""
    complete, done = zip(*engine.mesh.ep.exchange((all_of_them, ahead.is_done), tuple[bool, bool]), strict=True)
    if all(complete + done):
        ahead.close()
    else:
        rehearse(engine, ahead, progress, behind)
    with engine.model.few_layers():
        if not all(complete):
            run_beside(engine, progress)
            run_products(engine, most_prompt_tokens(engine), progress)
        run_every_size(engine, progress)
    capture(engine, progress)


def make_ahead(engine: Engine, found: list[Compiler]) -> CompileAhead:
    """Return what compiles the engine's kernels ahead, by the given compilers."""
    mesh, nodes = engine.mesh, engine.mesh.node_of_rank
    here = [rank for rank in range(mesh.size) if not nodes or nodes[rank] == nodes[mesh.rank]]
    ops = [f"{op.__module__}.{op.__qualname__}" for op in vars(engine.ops).values() if callable(op)]
    what = repr((engine.config, engine.settings, engine.model.fp8, engine.model.dtype, mesh.size, mesh.attn.size, ops))
    return CompileAhead(found, what, here.index(mesh.rank), len(here))


def rehearse(engine: Engine, ahead: CompileAhead, progress: Shown, behind: bool) -> None:
    """Collective. Compile the kernels of all steps, many at once. `behind`: as in `warm_up`."""

    def of_steps(sizes: Iterable[Size], what: str) -> Iterable[Size]:
        return progress(sizes, "finding kernels")

    def of_products(sizes: Iterable[Size], what: str) -> Iterable[Size]:
        return progress(sizes, "finding kernels of products")

    def finish() -> None:
        problems = ahead.finish()
        if problems:
            print(f"warning: {len(problems)} {NOT_COMPILED} {problems[0]}", file=sys.stderr)
        elif problems is not None and behind:
            print(COMPILED, file=sys.stderr)

    with ahead.rehearsal(), engine.model.few_layers():
        run_every_size(engine, of_steps)
        run_beside(engine, of_steps)
    with ahead.rehearsal(behind):
        run_products(engine, most_prompt_tokens(engine), of_products)
    ahead.wait(progress)
    if behind:
        threading.Thread(target=finish, name="kernels", daemon=True).start()
    else:
        finish()
    engine.mesh.ep.barrier()  # another rank may still compile what this one needs


def compilers(ops: Ops, alone: bool) -> tuple[list[Compiler], bool]:
    """Return what can compile the kernels of ops ahead, and whether these are all. `alone`: the job has one rank."""
    found: list[Compiler] = []
    all_of_them = True
    try:
        module = importlib.import_module("kernels.triton_ahead")  # not at the top, because it needs Triton
        found.append(module.TritonAhead(alone))
    except ImportError as error:  # also of what another version of Triton lacks
        print(f"warning: Triton's kernels compile one by one: {error}", file=sys.stderr)
        all_of_them = False
    if any(op.__module__ == "kernels.deep_gemm_ops" for op in vars(ops).values() if callable(op)):
        try:
            found.append(NvccAhead.of_deep_gemm())
        except OSError as error:
            print(f"warning: DeepGEMM's kernels compile one by one: {error}", file=sys.stderr)
            all_of_them = False
    return found, all_of_them


def run_beside(engine: Engine, progress: Shown = silent) -> None:
    """Collective. Run decodes beside a prompt. Such steps have kernels of their own: none that writes fp8."""
    buckets, settings, drafts = engine.decode.buckets, engine.settings, every_drafts(engine)[-1]
    if settings.decodes:
        # Some kernels depend on the power of two that covers the rows, and drafts beside prompts are padded less.
        beside = {min(rows, settings.max_batch - 1) for rows in (1, 2, 4, *buckets)} - {0}
        for rows in progress(sorted(beside, reverse=True), "decodes beside prompts"):
            engine.compute(prompt_work(1, 1, engine.config.vocab_size, False, drafts, rows))


def most_prompt_tokens(engine: Engine) -> int:
    """Return the most prompt tokens of a step."""
    limit = min(engine.max_model_len, engine.kv_tokens)
    return min(engine.settings.max_tokens_per_step, engine.settings.max_batch * limit)


def run_every_size(engine: Engine, progress: Shown = silent) -> None:
    """Collective. Run steps of all sizes in which kernels differ."""
    vocab, buckets = engine.config.vocab_size, engine.decode.buckets
    limit, drafts = min(engine.max_model_len, engine.kv_tokens), every_drafts(engine)[-1]
    for size in progress(sizes_of_prompts(most_prompt_tokens(engine)), "prompts"):
        for overlapped in (False, True)[: 1 + engine.rule.in_prefill(size)]:
            engine.compute(prompt_work(size, limit, vocab, overlapped, drafts))
    pool = engine.pool
    page = torch.zeros(1, dtype=torch.int64, device=pool.device)
    packed = torch.empty_like(pool[:, :1], memory_format=torch.contiguous_format)
    engine.ops.pack_pages(pool, page, packed)
    engine.ops.unpack_pages(packed, pool, page)
    if drafts is not None:  # how many get a token in a step with prompts: drafts follow
        for rows in progress(buckets[::-1], "prompts with drafts"):
            engine.compute(prompt_work(rows, 1, vocab, False, drafts))
    if engine.captures.prompts:
        run_each(engine.prompt_graphs.run_padding, engine.captures.prompts, "prompts", progress)
    if engine.settings.decodes:
        run_each(partial(decode_nothing, engine), buckets, "decode steps", progress)


def run_each(step: Callable[[Size], object], sizes: Iterable[Size], what: str, progress: Shown) -> None:
    """Run `step(size)` of every size, the largest first."""
    for size in progress(sorted(sizes, reverse=True), what):
        step(size)


def capture(engine: Engine, progress: Shown = silent) -> None:
    """Collective. Capture `engine.captures` as CUDA graphs, after `run_every_size`."""
    graphs, captures = engine.graphs, engine.captures
    if captures.prompts:
        graphs.capture(engine.prompt_graphs.run_padding, captures.prompts, "captures of prompts", progress)
    if captures.decodes:
        decodes = partial(decode_nothing, engine)
        graphs.capture(decodes, engine.decode.buckets, "captures of decode steps", progress)


def decode_nothing(engine: Engine, rows: int) -> None:
    """Collective. Run a decode step of so many rows of padding."""
    for drafts in reversed(every_drafts(engine)):
        engine.compute(decode_work(rows, engine.overlaps(rows, drafts), drafts))


def every_drafts(engine: Engine) -> list[Drafts] | list[None]:
    """Return the drafts of steps that follow on their like, the most last."""
    return [Drafts(n, n) for n in engine.settings.drafts_per_step] if engine.speculation is not None else [None]


def sizes_of_prompts(most: int) -> list[int]:
    """Return the numbers of tokens of prompt steps, descending. `most` - 1, because odd sizes use other kernels."""
    return sorted({2**i for i in range(most.bit_length())} | {most, max(1, most - 1)}, reverse=True)


def prompt_work(tokens: int, limit: int, vocab: int, overlapped: bool, drafts: Drafts | None, decodes: int = 0) -> Work:
    """Return a step of `tokens` prompt tokens, in prompts of `limit` tokens, all computed to their ends.

    Beside them, `decodes` sequences decode.
    """
    lengths = [min(limit, tokens - at) for at in range(0, tokens, limit)]
    pages = list(range(1, pages_for(limit) + 1))
    prompts = [Sequence(Request(0, [i * 7919 % vocab for i in range(n)]), pages=pages) for n in lengths]
    decoding = [Sequence(Request(0, [0]), pages=pages) for _ in range(decodes)]
    plan = Plan(decoding, [(sequence, sequence.prompt_len) for sequence in prompts])
    chunks, columns = plan.prompt_chunks(), NO_WORK.next_decodes(decoding)
    sequences = plan.advance()
    return Work(plan, columns, chunks, None, overlapped, sequences, np.arange(len(sequences)), drafts=drafts)


def decode_work(rows: int, overlapped: bool, drafts: Drafts | None) -> Work:
    """Return a decode step of `rows` rows of padding."""
    return replace(NO_WORK, decode_rows=rows, overlapped=overlapped, drafts=drafts)
