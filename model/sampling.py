"""From logits to tokens.

A row's token depends only on the row's logits, parameters, seed and position. It never depends on the other rows of the
batch, the device or the number of ranks. So the same request gives the same tokens anywhere.

Drafts keep that property. The model chooses its own token at every place that a draft has filled, as it would without
drafts, and a draft is right if it is that token. Draft and model add the same noise, that of the seed and the position,
to logits that are much alike. So they often choose the same token at any temperature (Daliri et al., arXiv 2408.07978,
bound how often). Rejection sampling would accept a little more, but its tokens would depend on what was drafted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import to_device

COLDEST = 1e-5  # at or below this, dividing by the temperature overflows: greedy
NO_TOKEN = -1  # in place of a token, where the model's logits are not finite


@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters, one per row of logits, all [N]."""

    temperature: Tensor  # float32; 0 = greedy
    top_p: Tensor  # float32 in (0, 1]
    top_k: Tensor  # int64; 0 = off
    seed: Tensor  # int64
    position: Tensor  # int64: the number of tokens before the sampled one
    min_p: Tensor | None = None  # float32 in [0, 1]; 0 = off; None: off in all rows

    @classmethod
    def build(
        cls,
        rows: list[tuple[float, float, int, int, int]],
        device: torch.device | str,
        min_p: list[float] | None = None,
    ) -> "SamplingRows":
        """`rows`: temperature, top_p, top_k, seed and position of each."""
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 5
        kinds = [torch.float32, torch.float32, torch.int64, torch.int64, torch.int64]
        if min_p is not None:
            columns.append(min_p)
            kinds.append(torch.float32)
        return cls(*(to_device(torch.tensor(c, dtype=k), device) for c, k in zip(columns, kinds, strict=True)))


def likeliest(logits: Tensor) -> Tensor:
    """Return the argmax [N] int64 of each row of logits [N, V] float32, or NO_TOKEN if the row has NaN or +inf."""
    tokens = logits.argmax(-1)  # to which NaN is the largest number
    best = logits.gather(1, tokens[:, None])[:, 0]
    return tokens.masked_fill(best - best != 0, NO_TOKEN)  # inf - inf is NaN


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Return a token [N] int64 per row of logits [N, V] float32: the argmax if temperature is 0, else a sample.

    Samples obey temperature, then top-k, top-p and min-p. The argmax of logits plus Gumbel noise is a sample from their
    softmax.
    """
    greedy = logits.argmax(-1)
    warm = rows.temperature > COLDEST
    scaled = logits / rows.temperature.where(warm, 1.0)[:, None]
    noisy = keep_top(scaled, rows.top_k, rows.top_p, rows.min_p) + gumbel(rows.seed, rows.position, logits.shape[1])
    return noisy.argmax(-1).where(warm, greedy)


def accepted(drafts: Tensor, chosen: Tensor) -> Tensor:
    """Return how many of each sequence's drafts [B, N] are right, [B] int64: those before the first wrong one.

    chosen [B, N + 1]: the model's own choice at the place of each draft, and at the one after the last. Its choices
    after a wrong draft follow on that draft, so they count for nothing.
    """
    return (drafts == chosen[:, :-1]).long().cumprod(-1).sum(-1)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None) -> Tensor:
    """Set logits to -inf outside the k likeliest tokens, then outside their smallest set with probability >= top_p.

    With min_p, also those less than min_p times as likely as the likeliest token (Nguyen et al., arXiv 2407.01082).
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = top_k.where(top_k > 0, logits.shape[1])[:, None]
    ordered = ordered.masked_fill(rank >= limit, float("-inf"))
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # of likelier tokens; 0 for the first, so one always stays
    enough = top_p.where(top_p < 1, float("inf"))[:, None]  # a rounded sum may reach 1 too early
    ordered = ordered.masked_fill((before >= enough) & (rank > 0), float("-inf"))
    if min_p is not None:
        ordered = ordered.masked_fill(probability < min_p[:, None] * probability[:, :1], float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


def gumbel(seed: Tensor, position: Tensor, width: int) -> Tensor:
    """Return Gumbel noise [N, width] from a counter-based integer generator: a pure function of seed, position, column.

    seed, position [N] int64.
    """
    row = _mix(_mix(seed ^ (seed >> 32)) ^ position)
    bits = _mix(row[:, None] ^ _mix(torch.arange(width, device=seed.device)))
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # 24 bits: exact in float32, never 0 or 1
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    """Hash the low 32 bits of x: a finaliser (multiply and xor-shift, twice) in int64 arithmetic."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ids and log probabilities, both [N, count + 1]: the `count` likeliest tokens, then the chosen one.

    The likeliest token is first. Probabilities are the model's own: before logits processors, temperature, top-k,
    top-p and min-p.
    """
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    chosen = tokens[:, None]
    return torch.cat((best.indices, chosen), 1), torch.cat((best.values, logprobs.gather(1, chosen)), 1)


def logprob_pairs(ids: list[int], values: list[float], count: int) -> list[tuple[int, float]]:
    """Return a row of `top_logprobs` as pairs (token, log probability): the `count` likeliest, and the chosen token."""
    pairs = list(zip(ids[:-1], values[:-1], strict=True))[:count]
    return pairs if ids[-1] in ids[:count] else [*pairs, (ids[-1], values[-1])]
