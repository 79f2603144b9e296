"""The memory budget of one rank: a table of what is not KV, and the pages that fit beside it.

`model/footprint.py` has the arithmetic on shapes. `memory.py` asks the GPU for its numbers.
"""

from collections import abc
from dataclasses import dataclass

from disagg.buckets import PromptSize
from model.footprint import (
    StepShape,
    contiguous_step,
    drafting,
    graphs,
    logits,
    masked_step,
    sampling,
    table_bytes,
    weight_bytes,
)
from model.pages import PAGE

GIB = 2**30
WORKSPACES = 3 * 32 * 2**20  # cuBLAS takes 32 MiB (Hopper) per stream: the step's, the shared expert's, capture's


@dataclass(frozen=True)
class Budget:
    """The bytes that one rank may use of its GPU, and the parts that are not KV."""

    available: int
    why: str  # `available` as an equation
    parts: dict[str, int]  # name -> bytes
    page: int  # bytes

    @property
    def left(self) -> int:
        return self.available - sum(self.parts.values())

    @property
    def most_pages(self) -> int:
        """Pages that fit in addition to the null page."""
        return max(0, self.left // self.page - 1)

    def pages(self, tokens: int | None) -> int:
        """Return the size of the pool, without the null page: `tokens` in pages, rounded down, or (None) all that fit.

        Raises ValueError if they do not fit.
        """
        pages = max(1, self.most_pages) if tokens is None else tokens // PAGE
        if pages <= self.most_pages:
            return pages
        asked = "the least: a page and the null page" if tokens is None else f"--kv-tokens {tokens}"
        most = f"--kv-tokens (to at most {self.most_pages * PAGE}), " if tokens is not None and self.most_pages else ""
        raise ValueError(
            f"{self.excess(pages, asked)}; raise --gpu-memory-fraction, or lower {most}"
            f"--max-tokens-per-step, --max-batch or --max-model-len"
        )

    def excess(self, pages: int, asked: str) -> str:
        """Return the sum that is over the limit, with a pool of `pages` pages plus the null page. `asked`: why."""
        size = (pages + 1) * self.page
        terms = [f"{name} {gib(part)}" for name, part in self.parts.items() if part] + [f"KV {gib(size)} ({asked})"]
        return (
            f"GPU memory: {' + '.join(terms)} = {gib(sum(self.parts.values()) + size)} GiB is over "
            f"{self.why} = {gib(self.available)} GiB"
        )

    def table(self, pages: int) -> str:
        """Return lines of name and GiB: each part, a pool of `pages` pages plus the null page, and the limit."""
        pool = (pages + 1) * self.page
        sizes = {**self.parts, "KV": pool, "together": sum(self.parts.values()) + pool, "limit": self.available}
        notes = {"KV": f"  {pages:,} pages, {pages * PAGE:,} tokens", "limit": f"  {self.why}"}
        width = max(map(len, sizes))
        lines = [f"{name:>{width}}: {gib(size):>8}{notes.get(name, '')}" for name, size in sizes.items()]
        return "\n".join([f"{'memory':>{width}}: {'GiB':>8}", *lines])


def gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def share_of_gpu(total: int, free: int, held: int, fraction: float, sharers: int) -> tuple[int, str]:
    """Return the bytes that one of `sharers` ranks on a GPU may use, and the equation for the log.

    It is the smaller of two limits. One is the rank's share of `fraction` of the `total` bytes. The other is its share
    of the `free` bytes, plus the `held` bytes that it has taken already.
    """
    allowed, obtainable = int(fraction * total) // sharers, free // sharers + held
    among = f" / {sharers} ranks" if sharers > 1 else ""
    if allowed <= obtainable:
        return allowed, f"--gpu-memory-fraction {fraction:g} x {gib(total)}{among}"
    return obtainable, f"free {gib(free)}{among} + {gib(held)} that this rank has taken"


def plan_parts(
    shape: StepShape,
    buffers: int,
    buckets: abc.Sequence[int],
    max_tokens_per_step: int,
    max_model_len: int,
    longest: int,
    captures_decodes: bool,
    spare_layers: int = 0,
    handoff: int = 0,
    drafts: abc.Sequence[int] = (0,),
    prompts: abc.Sequence[PromptSize] = (),
    decodes: bool = True,
) -> dict[str, int]:
    """Return the table's rows without KV: name -> bytes.

    `buffers`: bytes of the dispatcher's buffers. `buckets`: row counts of decode steps.
    `longest`: the most tokens of KV per request. At most one prompt in a step began earlier, and it can attend to that
    many tokens in addition to the step's own.
    `spare_layers`: layers whose experts may move at once (`disagg/rebalance.py`).
    `handoff`: bytes of the KV handoff's buffers (`disagg/handoff/credits.py`).
    `drafts`: how many of each decoding sequence a step may verify, the most last.
    `captures_decodes`: are decode steps captured? `prompts`: of steps of prompts, the sizes that are.
    `decodes`: False for a prefill job, in which no step verifies drafts.
    """
    tokens = shape.whole(max_tokens_per_step)
    most = max(buckets)
    rows = most * (1 + drafts[-1] if decodes else 1)  # tokens of decode steps, and rows of logits
    steps = [contiguous_step(shape, tokens, tokens + longest, rows), masked_step(shape, rows)]
    if drafts[-1]:
        steps = [drafting(shape, count, step) for count, step in zip((tokens, rows), steps, strict=True)]
    beside = tokens * shape.row(shape.config.hidden_size) if drafts[-1] else 0  # the main model's output
    steps.append(sampling(shape.config, rows) + beside)
    weights = weight_bytes(shape)
    return weights | {
        "spare experts": spare_layers * weights["routed experts"] // max(shape.config.num_moe_layers, 1),
        "tables": table_bytes(shape, max_model_len, most),
        "logits": logits(shape.config, rows),
        "communication buffers": buffers,
        "KV handoff": handoff,
        "activations": max(steps),
        "CUDA graphs": graphs(shape, buckets if captures_decodes else (), drafts, prompts),
        "cuBLAS workspaces": WORKSPACES,
    }
