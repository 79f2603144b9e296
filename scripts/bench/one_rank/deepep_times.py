"""The time of DeepEP's dispatches and combines in a large deployment, MODELLED from published tables.

Both tables are for DeepEP V1 on H800 with 400 Gb/s InfiniBand, hidden 7168, top 8 (its docs/legacy.md).

Low latency: microseconds for 128 tokens per rank, dispatch in fp8 and combine in bf16. At each number of ranks the two
differ only in bytes. So a line through them gives a fixed time and a time per byte. At 64 ranks that is 22 us and
50 GB/s, the rate of the network card. During a part of the time the send and receive kernels hold SMs. SGLang's report
(2025-05-05) shows 60 us for dispatch and 77 us for combine, with 256 tokens, in a figure of its unit tests. Here that
time is proportional to the tokens, and send and receive take half of it each.

Normal mode: GB/s at the bottleneck. Within a node that is NVLink, between nodes the network card. A token crosses the
card once per node that needs it; its own node counts too, as in DeepEP's tests. The tables show no fixed time, so there
is none here. For 16,384 tokens at EP32 this gives 6.1 ms + 12.1 ms; SGLang's unit tests 7.3 + 14.3.

Between the published numbers of ranks the tables are interpolated linearly in the logarithm. Outside, the nearest
number counts.
"""

from math import log2

from model.config import ModelConfig
from scripts.bench.one_rank.delay import Delay, DelayModel
from scripts.bench.one_rank.simulated_load import share_of_tokens

LOW_LATENCY = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
LOW_LATENCY_BYTES = 128 * 8 * (7168 + 224 + 16), 128 * 8 * 2 * 7168  # for 128 tokens
SM_TIME, SM_TIME_TOKENS = {"dispatch": 60e-6, "combine": 77e-6}, 256
NORMAL = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
NODE = 8  # ranks


def between(table: dict[int, tuple[float, float]], ranks: int) -> tuple[float, float]:
    """Return the table's numbers for `ranks` ranks, interpolated: dispatch, combine."""
    if ranks in table or not min(table) < ranks < max(table):
        return table[min(table, key=lambda known: abs(log2(known / ranks)))]
    low, high = max(n for n in table if n < ranks), min(n for n in table if n > ranks)
    weight = log2(ranks / low) / log2(high / low)
    dispatch, combine = (a + weight * (b - a) for a, b in zip(table[low], table[high], strict=True))
    return dispatch, combine


def low_latency(config: ModelConfig, ranks: int) -> DelayModel:
    """Return the delays of low-latency mode for a decode rank among `ranks`."""
    times, sizes, hidden = between(LOW_LATENCY, ranks), LOW_LATENCY_BYTES, config.hidden_size
    per_byte = (times[1] - times[0]) / (sizes[1] - sizes[0])
    fixed = times[0] - per_byte * sizes[0]
    rows = {"dispatch": hidden + hidden // 32 + 16 if config.fp8 else 2 * hidden, "combine": 2 * hidden}

    def transfer(what: str, tokens: int) -> Delay:
        total = (fixed + per_byte * tokens * config.num_experts_per_tok * rows[what]) * 1e-6
        busy = min(total, SM_TIME[what] * tokens / SM_TIME_TOKENS)
        return Delay(total - busy, busy / 2, busy / 2)

    return transfer


def normal(config: ModelConfig, ranks: int) -> DelayModel:
    """Return the delays of normal mode for a prefill rank among `ranks`."""
    rates, hidden = dict(zip(("dispatch", "combine"), between(NORMAL, ranks), strict=True)), config.hidden_size
    places = ranks if ranks <= NODE else -(-ranks // NODE)
    share = share_of_tokens(
        config.n_routed_experts, places, config.num_experts_per_tok, config.n_group, config.topk_group
    )
    rows = {"dispatch": hidden + hidden // 32 if config.fp8 else 2 * hidden, "combine": 2 * hidden}

    def transfer(what: str, tokens: int) -> Delay:
        return Delay(tokens * places * share * rows[what] / (rates[what] * 1e9))

    return transfer
