"""Logits processors: how a request changes the model's logits before a token is chosen.

In transformers' order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty, then the tokens that
min_tokens bans. Temperature, top-k, top-p and min-p come after them, in `sampling.py`.

A place is a number in flattened logits [N, V]: row * V + token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalties:
    """Penalties for M of the N rows. Their places are those of logits [M, V]."""

    rows: Tensor  # [M] int64
    repetition: Tensor  # [M] float32: divides positive logits and multiplies negative ones; 1 = off
    presence: Tensor  # [M] float32: subtracted once; 0 = off
    frequency: Tensor  # [M] float32: subtracted once per occurrence; 0 = off
    prompt: Tensor  # int64: places of prompt tokens, which only `repetition` looks at
    generated: Tensor  # int64: places of generated tokens, one per occurrence


def add_bias(logits: Tensor, places: Tensor, bias: Tensor) -> None:
    """Add `bias` float32 to contiguous logits [N, V] at `places` int64, which do not repeat, in place."""
    logits.view(-1)[places] += bias


def penalize(logits: Tensor, penalties: Penalties) -> None:
    """Apply penalties to logits [N, V] float32, in place.

    repetition_penalty is that of Keskar et al. 2019 (arXiv 1909.05858), as in transformers. The others are OpenAI's.
    """
    rows = logits[penalties.rows]
    one, zero = rows.new_ones(1), rows.new_zeros(1)
    count = torch.zeros_like(rows)
    count.view(-1).scatter_add_(0, penalties.generated, one.expand(len(penalties.generated)))
    generated = count > 0
    repeated = generated.clone()
    repeated.view(-1)[penalties.prompt] = True
    factor = penalties.repetition[:, None].where(repeated, one)
    rows = (rows * factor).where(rows < 0, rows / factor)
    rows -= count.mul_(penalties.frequency[:, None])
    rows -= penalties.presence[:, None].where(generated, zero)
    logits[penalties.rows] = rows


def ban(logits: Tensor, places: Tensor) -> None:
    """Set contiguous logits [N, V] to -inf at `places` int64, in place."""
    logits.view(-1)[places] = float("-inf")
