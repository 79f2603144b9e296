"""Buckets: the few sizes that a decode step can have, and those in which steps of prompts are captured."""

from collections.abc import Callable
from typing import NamedTuple

MOST_TOKENS = 2048  # in larger steps of prompts the GPU has more to do than the host
CONTEXT = 4096  # tokens that the prompts of a captured step may see, if they have cached prefixes or earlier chunks


def make_buckets(most: int, multiple: Callable[[int], int] = lambda rows: 1) -> list[int]:
    """Return the row counts of decode steps, ascending: 1, 2, 4, 8, then two per doubling, up to `most`.

    Each is rounded up to a multiple of `multiple(rows)`.
    """
    sizes = [2**i for i in range(most.bit_length())]
    sizes += [size * 3 // 2 for size in sizes if size >= 16]
    return sorted({-(-size // multiple(size)) * multiple(size) for size in [*(s for s in sizes if s < most), most]})


class PromptSize(NamedTuple):
    """The size of a captured step of prompts, padding included."""

    tokens: int
    context: int  # of all sequences together


def make_prompt_sizes(most_tokens: int, most_context: int) -> tuple[PromptSize, ...]:
    """Return the sizes of captured steps of prompts, ascending. The arguments bound them, and the first the second.

    For each number of tokens there are two: for prompts that are computed whole, and for those with tokens before.
    """
    most = min(most_tokens, MOST_TOKENS)
    tokens = [*(size for size in (64, 128, 256, 512, 768, 1024, 1536) if size < most), most]
    return tuple(PromptSize(n, context) for n in tokens for context in sorted({n, min(CONTEXT, most_context)}))
