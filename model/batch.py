"""Batch: the one object that crosses from the engine to the model. It knows tokens and pages, not requests.

A step's tokens lie in one flat row, decode sequences first (one token each, attended in absorbed form), then prefill
chunks (attended in expanded form):

    tokens     d0 d1 d2 | p0 p0 p0 p0 p1 p1       T = 3 decodes + 6 prefill tokens
    page_table [3, P]   |                         decode reads the pool through its pages
    q_starts            | 0           4     6     prefill: where each chunk's queries begin
    kv_starts           | 0                 9 12  and where its keys begin among context_rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 64  # tokens a page
NULL_PAGE = 0  # padding rows write here; the allocator never hands it out


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: `token_ids` stand at positions start, start + 1, ..."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]  # every page of the sequence, in order
    wants_logits: bool = True


@dataclass(frozen=True)
class Batch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    kv_rows: Tensor  # [T] int64: the row of the flat pool where this token's latent goes; in NULL_PAGE for padding
    page_table: Tensor  # [B, P] int32, the decode sequences' pages
    kv_lens: Tensor  # [B] int32, this step's token included; 0 for padding
    q_starts: Tensor  # [S + 1] int32
    kv_starts: Tensor  # [S + 1] int32
    context_rows: Tensor  # [sum of prefill kv lengths] int64: pool rows of all their tokens so far, in order
    logit_rows: Tensor  # [N] int64: rows of T whose logits are wanted, decodes first
    max_q: int = 0
    max_kv: int = 0

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_decodes(self) -> int:
        return self.kv_lens.numel()

    @property
    def is_token(self) -> Tensor:
        """[T] bool: False for padding, which must route to no expert."""
        return self.kv_rows >= (NULL_PAGE + 1) * PAGE

    @classmethod
    def build(
        cls, decodes: Sequence[Chunk], prefills: Sequence[Chunk], device: torch.device | str, multiple: int = 1
    ) -> "Batch":
        """Lay out chunks; pad with empty decode rows until T is a multiple of `multiple` (the attention TP size).

        No chunks at all is what a rank with nothing to do runs, because every rank steps every time.
        """
        assert all(len(c.token_ids) == 1 for c in decodes), "a decode chunk is one token"
        real = len(decodes) + sum(len(c.token_ids) for c in prefills)
        padding = [Chunk((0,), 0, (), wants_logits=False)] * (-real % multiple)
        decodes = [*decodes, *padding]
        chunks = [*decodes, *prefills]

        token_ids, positions, kv_rows, logit_rows = [], [], [], []
        for chunk in chunks:
            token_ids.extend(chunk.token_ids)
            span = range(chunk.start, chunk.start + len(chunk.token_ids))
            positions.extend(span)
            kv_rows.extend(_row(chunk.pages, p) if chunk.pages else 0 for p in span)
            if chunk.wants_logits:
                logit_rows.append(len(token_ids) - 1)

        width = max((len(c.pages) for c in decodes), default=0) or 1
        page_table = [list(c.pages) + [NULL_PAGE] * (width - len(c.pages)) for c in decodes]
        q_starts, kv_starts, context_rows = [0], [0], []
        for chunk in prefills:
            length = chunk.start + len(chunk.token_ids)
            q_starts.append(q_starts[-1] + len(chunk.token_ids))
            kv_starts.append(kv_starts[-1] + length)
            context_rows.extend(_row(chunk.pages, p) for p in range(length))

        def tensor(values, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            token_ids=tensor(token_ids, torch.int64),
            positions=tensor(positions, torch.int64),
            kv_rows=tensor(kv_rows, torch.int64),
            page_table=tensor(page_table, torch.int32).view(len(decodes), width),
            kv_lens=tensor([c.start + 1 if c.pages else 0 for c in decodes], torch.int32),
            q_starts=tensor(q_starts, torch.int32),
            kv_starts=tensor(kv_starts, torch.int32),
            context_rows=tensor(context_rows, torch.int64),
            logit_rows=tensor(logit_rows, torch.int64),
            max_q=max((len(c.token_ids) for c in prefills), default=0),
            max_kv=max((c.start + len(c.token_ids) for c in prefills), default=0),
        )


def _row(pages: Sequence[int], position: int) -> int:
    return pages[position // PAGE] * PAGE + position % PAGE
