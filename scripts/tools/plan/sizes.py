"""Which numbers of ranks a job can have: the engine's own rules, and what each number needs.

A job's routed experts and their redundant copies must divide by its ranks. So 256 experts need 32 redundant ones on 72
ranks, because 288 / 72 = 4 slots per rank. On 12 ranks they need 8, and 32 do as well: 288 / 12 = 24.
"""

from collections.abc import Iterator
from math import sqrt

from model.config import ModelConfig
from model.divisibility import check_slots, check_split

MOST_EXPERTS = 1024  # the model of routing counts combinations of experts, which takes long beyond this


def job_sizes(config: ModelConfig, gpus: int, per_host: int) -> list[int]:
    """Return the numbers of ranks to consider: on one host 1, 2, 4, ... and all its GPUs; then whole hosts.

    More ranks than experts are left out, because the further ranks would only hold copies.
    """
    most = min(gpus, max(config.n_routed_experts, per_host))
    within = min(most, per_host)
    sizes = {2**i for i in range(within.bit_length())} | {within}
    return sorted(sizes | set(range(per_host, most + 1, per_host)))


def least_redundant(config: ModelConfig, ranks: int) -> int:
    """Return the fewest redundant experts with which the slots divide by `ranks`."""
    return -config.n_routed_experts % ranks


def check_job(config: ModelConfig, ranks: int, attn_tp: int, redundant: int) -> None:
    """Raise ValueError, with the equation, for a job that the engine would refuse."""
    if ranks % attn_tp:
        raise ValueError(f"ranks % --attn-tp must be 0, not {ranks} % {attn_tp} = {ranks % attn_tp}")
    check_split(config, attn_tp)
    check_slots(config.n_routed_experts, redundant, ranks)


def splits(config: ModelConfig, ranks: int, redundant: int, per_host: int) -> Iterator[int]:
    """Yield the attention TP sizes that are legal for `ranks`, ascending. A replica stays within a host."""
    for attn_tp in range(1, min(ranks, per_host) + 1):
        try:
            check_job(config, ranks, attn_tp, redundant)
        except ValueError:
            continue
        yield attn_tp


def dense_ffn_split(config: ModelConfig, tokens: int, graph_copies: int) -> float:
    """Return the TP size at which a dense FFN takes the least memory per rank, by the formula of SGLang's report.

    Memory(TP) = weights / TP + (1 + graph_copies) x activations x TP, so the best TP is the root of their quotient.
    As there, weights are two matrices in fp8, and activations are `tokens` rows of bf16. (A SwiGLU has three matrices,
    which makes the best size 1.22 times as large.) Source: SGLang's report on large-scale EP of 2025-05-05.
    """
    weights = 2 * config.hidden_size * config.intermediate_size
    return sqrt(weights / ((1 + graph_copies) * tokens * config.hidden_size * 2))
