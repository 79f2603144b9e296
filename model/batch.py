"""Batch: the one object that crosses from the engine to the model. It knows tokens and pages, not requests.

A step's tokens lie in one flat row: first decode sequences (one token each, attended in absorbed form), then prefill
chunks (attended in expanded form). To verify drafts, every decode sequence has the same number of tokens, `q_len`:

    tokens     d0 d1 d2 | p0 p0 p0 p0 p1 p1       T = 3 decodes + 6 prefill tokens
    page_table [3, P]   |                         decode reads the pool through its pages
    q_starts            | 0           4     6     prefill: where each chunk's queries begin
    kv_starts           | 0                 9 12  and where its keys begin among context_rows

A token that the previous step sampled may so far be known only to the GPU. Its id is then -1 - r, for that step's r-th
sampled token.
"""

from collections import abc
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.pages import NULL_PAGE, PAGE


class Chunk(NamedTuple):
    """The next tokens of one sequence: `token_ids` stand at positions start, start + 1, ..."""

    token_ids: abc.Sequence[int]
    start: int
    pages: abc.Sequence[int]  # every page of the sequence, in order
    wants_logits: bool = True
    targets: abc.Sequence[int] = ()  # the tokens after the first rows, if their log probabilities are wanted
    top: int = 0  # with `targets`: that many likeliest tokens, too


class Decodes(NamedTuple):
    """The next token of each of B sequences, in columns. Equivalent to B chunks of one token."""

    ids: np.ndarray  # [B] int64
    positions: np.ndarray  # [B] int64
    pages: list[abc.Sequence[int]]  # per sequence, all its pages in order
    drafts: abc.Sequence[abc.Sequence[int]] = ()  # per sequence, of the tokens after its id, if the host knows any

    def chunks(self) -> list[Chunk]:
        columns = zip(self.ids.tolist(), self.positions.tolist(), self.pages, strict=True)
        return [Chunk((token,), position, pages) for token, position, pages in columns]


NO_DECODES = Decodes(np.zeros(0, np.int64), np.zeros(0, np.int64), [])


@dataclass(frozen=True)
class Batch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    kv_rows: Tensor  # [T] int64: row of the flat pool for each token's latent; in NULL_PAGE for padding
    page_table: Tensor  # [B, P] int32, the decode sequences' pages
    kv_lens: Tensor  # [B] int32, this step's token included; 0 for padding
    q_starts: Tensor  # [S + 1] int32
    kv_starts: Tensor  # [S + 1] int32
    context_rows: Tensor  # [sum of prefill kv lengths] int64: pool rows of their tokens so far, in order
    logit_rows: Tensor | None  # [N] int64: rows whose logits are wanted, decodes first; None: all
    max_q: int = 0
    max_kv: int = 0
    decode_plan: Any = None  # shared by all layers' mla_decode: `Ops.decode_plan`

    q_len: int = 1  # tokens of each decode sequence

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_decodes(self) -> int:
        return self.kv_lens.numel()

    @property
    def decode_tokens(self) -> int:
        return self.num_decodes * self.q_len

    @cached_property
    def is_token(self) -> Tensor:
        """[T] bool: False for padding, which must not be routed to any expert."""
        return self.kv_rows >= (NULL_PAGE + 1) * PAGE

    @classmethod
    def decode(cls, token_ids: Tensor, positions: Tensor, page_table: Tensor) -> "Batch":
        """Make a batch of Q tokens per sequence from token_ids, positions [B Q] int64 and page_table [B, P] int32.

        A sequence's tokens lie and stand in a row. One whose pages are all NULL_PAGE is padding. Tokens past its last
        page are, too: they write to NULL_PAGE. Nothing waits for the host: safe in a CUDA graph.
        """
        batch = len(page_table)
        q_len = max(1, len(token_ids) // max(1, batch))
        pages = page_table.gather(1, (positions // PAGE).view(batch, q_len))  # [B, Q]
        lens = positions.view(batch, q_len)[:, -1] + 1
        page = pages.view(-1)
        none = positions.new_zeros(1, dtype=torch.int32)
        return cls(
            token_ids=token_ids,
            positions=positions,
            kv_rows=page * PAGE + positions % PAGE,
            page_table=page_table,
            kv_lens=lens.where(pages[:, 0] != NULL_PAGE, 0).to(torch.int32),
            q_starts=none,
            kv_starts=none,
            context_rows=positions[:0],
            logit_rows=None,
            q_len=q_len,
        )

    @classmethod
    def join(cls, decodes: "Batch", prompts: "Batch") -> "Batch":
        """Put the sequences of `decode` before prompt chunks of `build`. All decode tokens want their logits."""
        assert prompts.num_decodes == 0 and prompts.logit_rows is not None
        first = torch.arange(decodes.num_tokens, device=prompts.logit_rows.device)
        return replace(
            prompts,
            token_ids=torch.cat((decodes.token_ids, prompts.token_ids)),
            positions=torch.cat((decodes.positions, prompts.positions)),
            kv_rows=torch.cat((decodes.kv_rows, prompts.kv_rows)),
            page_table=decodes.page_table,
            kv_lens=decodes.kv_lens,
            logit_rows=torch.cat((first, prompts.logit_rows + decodes.num_tokens)),
            q_len=decodes.q_len,
        )

    @classmethod
    def build(
        cls, decodes: abc.Sequence[Chunk], prefills: abc.Sequence[Chunk], device: torch.device | str, multiple: int = 1
    ) -> "Batch":
        """Lay out chunks. Pad with empty decode rows until T is a multiple of `multiple` (the attention TP size).

        There may be no chunks at all: every rank runs every step, even with nothing to do.
        """
        assert all(len(c.token_ids) == 1 for c in decodes), "a decode chunk is one token"
        decodes = pad(decodes, prefills, multiple)
        chunks = [*decodes, *prefills]
        lengths = [len(c.token_ids) for c in chunks]
        last_rows = np.cumsum(lengths, dtype=np.int64) - 1
        spans = [np.arange(c.start, c.start + n) for c, n in zip(chunks, lengths, strict=True)]
        contexts = [c.start + len(c.token_ids) for c in prefills]
        table = page_rows([c.pages for c in decodes])

        def tensor(parts: list, dtype: torch.dtype) -> Tensor:
            return to_device(torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts])).to(dtype), device)

        return cls(
            token_ids=tensor([c.token_ids for c in chunks], torch.int64),
            positions=tensor(spans, torch.int64),
            kv_rows=tensor([_rows(c.pages, span) for c, span in zip(chunks, spans, strict=True)], torch.int64),
            page_table=tensor([table.ravel()], torch.int32).view(table.shape),
            kv_lens=tensor([[c.start + 1 if c.pages else 0 for c in decodes]], torch.int32),
            q_starts=tensor([[0], np.cumsum(lengths[len(decodes) :])], torch.int32),
            kv_starts=tensor([[0], np.cumsum(contexts)], torch.int32),
            context_rows=tensor(
                [_rows(c.pages, np.arange(n)) for c, n in zip(prefills, contexts, strict=True)], torch.int64
            ),
            logit_rows=tensor([last_rows[[c.wants_logits for c in chunks]]], torch.int64),
            max_q=max(lengths[len(decodes) :], default=0),
            max_kv=max(contexts, default=0),
        )


def pad(decodes: abc.Sequence[Chunk], prefills: abc.Sequence[Chunk], multiple: int) -> list[Chunk]:
    """Append empty decodes until the number of tokens in all chunks is a multiple of `multiple`."""
    real = len(decodes) + sum(len(c.token_ids) for c in prefills)
    return [*decodes, *[Chunk((0,), 0, (), wants_logits=False)] * (-real % multiple)]


Chunks = tuple[list[Chunk], list[Chunk]]  # decodes, prefills


def split(decodes: abc.Sequence[Chunk], prefills: abc.Sequence[Chunk], multiple: int = 1) -> tuple[Chunks, Chunks]:
    """Cut a batch in two, at the multiple of `multiple` nearest to half of its tokens.

    A prompt chunk that lies across the cut is cut too: its second part attends to the first part's KV. The number of
    tokens must be a multiple of `multiple` (`pad`). Either half may be empty.
    """
    cut, first, second = split_behind(len(decodes), 1, prefills, multiple)
    return (list(decodes[:cut]), first), (list(decodes[cut:]), second)


def split_behind(
    decodes: int, each: int, prefills: abc.Sequence[Chunk], multiple: int = 1
) -> tuple[int, list[Chunk], list[Chunk]]:
    """Cut a batch of so many decode sequences, of `each` tokens, and chunks as `split` does.

    Returns how many sequences the first half has, its chunks, and those of the second half. No sequence is cut.
    """
    tokens = decodes * each + sum(len(c.token_ids) for c in prefills)
    assert tokens % multiple == 0, f"{tokens=} {multiple=}"
    room = round(tokens / 2 / multiple) * multiple - decodes * each  # prompt tokens that fit into the first half
    if room < 0:
        whole = multiple // gcd(each, multiple)  # so many sequences divide
        return (decodes * each + room) // each // whole * whole, [], list(prefills)
    first, second = [], []
    for chunk in prefills:
        taken = min(room, len(chunk.token_ids))
        room -= taken
        if taken == len(chunk.token_ids):
            first.append(chunk)
        elif taken == 0:
            second.append(chunk)
        else:
            first.append(chunk._replace(token_ids=chunk.token_ids[:taken], wants_logits=False))
            second.append(chunk._replace(token_ids=chunk.token_ids[taken:], start=chunk.start + taken))
    return decodes, first, second


def page_rows(pages: abc.Sequence[abc.Sequence[int]], width: int | None = None) -> np.ndarray:
    """Return lists of pages as a table [B, width], filled up with NULL_PAGE. `width` None: that of the longest list."""
    width = width or max(map(len, pages), default=0) or 1
    table = np.full((len(pages), width), NULL_PAGE, np.int64)
    for row, numbers in zip(table, pages, strict=True):
        row[: len(numbers)] = numbers
    return table


def _rows(pages: abc.Sequence[int], positions: np.ndarray) -> np.ndarray:
    """Return the pool rows of these positions. Padding has no pages and gets the null page's first row."""
    return np.asarray(pages or [NULL_PAGE])[positions // PAGE] * PAGE + positions % PAGE


def to_device(x: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Copy x from the host to the device, without waiting for the GPU. On a CPU it may stay where it is."""
    host = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if torch.device(device).type == "cuda":
        host = host.pin_memory()  # otherwise the copy would wait for the GPU's current step
    return host.to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Copy x to the host. A copy from the GPU is complete once an event recorded after this call is done."""
    if not x.is_cuda:
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
