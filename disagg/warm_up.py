"""The warm-up: steps of all sizes in which kernels differ. Their requests are made up, and get no answer."""

import gc
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from disagg.engine import Engine
from disagg.request import Request
from disagg.scheduler import Plan, Sequence
from disagg.step import NO_WORK, Drafts, Work
from disagg.warm_up_progress import Shown, silent
from model.batch import NO_DECODES
from model.pages import pages_for


def warm_up(engine: Engine, progress: Shown = silent) -> None:
    """Collective. Compile kernels before the first request, and capture some steps. No-op on a CPU.

    A step that decodes beside prompts may still compile some. `progress` shows how far it is.
    """
    if engine.mesh.device.type != "cuda":
        return
    run_every_size(engine, progress)
    torch.cuda.synchronize()
    for counter in engine.model.load_counters:
        counter.forget()
    gc.collect()
    gc.freeze()  # these objects live as long as the engine, so later collections can skip them


def run_every_size(engine: Engine, progress: Shown = silent) -> None:
    """Collective. Run steps of all sizes in which kernels differ, and capture those of `engine.captures`."""
    settings, vocab, buckets = engine.settings, engine.config.vocab_size, engine.decode.buckets
    limit, drafts = min(engine.max_model_len, engine.kv_tokens), every_drafts(engine)[-1]
    most = min(settings.max_tokens_per_step, settings.max_batch * limit)
    for size in progress(sizes_of_prompts(most), "prompts"):
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
        engine.prompt_graphs.capture(progress)
    if engine.captures.decodes:
        engine.graphs.capture(partial(decode_nothing, engine), buckets, "decode steps", progress)
    elif settings.decodes:
        for rows in progress(buckets[::-1], "decode steps"):
            decode_nothing(engine, rows)


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


def prompt_work(tokens: int, limit: int, vocab: int, overlapped: bool, drafts: Drafts | None) -> Work:
    """Return a step of `tokens` prompt tokens, in prompts of `limit` tokens, all computed to their ends."""
    lengths = [min(limit, tokens - at) for at in range(0, tokens, limit)]
    pages = list(range(1, pages_for(limit) + 1))
    prompts = [Sequence(Request(0, [i * 7919 % vocab for i in range(n)]), pages=pages) for n in lengths]
    plan = Plan([], [(sequence, sequence.prompt_len) for sequence in prompts])
    chunks = plan.prompt_chunks()
    return Work(plan, NO_DECODES, chunks, None, overlapped, plan.advance(), np.arange(len(prompts)), drafts=drafts)


def decode_work(rows: int, overlapped: bool, drafts: Drafts | None) -> Work:
    """Return a decode step of `rows` rows of padding."""
    return replace(NO_WORK, decode_rows=rows, overlapped=overlapped, drafts=drafts)
