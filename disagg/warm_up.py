"""Steps for the warm-up, of all sizes in which kernels differ. Their requests are made up, and get no answer."""

from dataclasses import replace

import numpy as np

from disagg.request import Request
from disagg.scheduler import Plan, Sequence
from disagg.step import NO_WORK, Drafts, Work
from model.batch import NO_DECODES
from model.pages import pages_for


def prompt_sizes(most: int) -> list[int]:
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
