"""How long DeepEP's dispatches and combines take in a large deployment: MODELLED from what was published.

Both tables are of DeepEP V1 on H800 with 400 Gb/s InfiniBand, hidden 7168, top 8 (its docs/legacy.md).

Low latency. Microseconds for 128 tokens a rank, dispatch in fp8 and combine in bf16. At each number of ranks the two
differ only in bytes, so a line goes through them: a fixed time, and a time for each byte. At 64 ranks that is 22 us and
50 GB/s, which is the network card's rate. Of that time the send and receive kernels hold SMs: SGLang's report
(2025-05-05) shows 60 us of dispatch and 77 us of combine for 256 tokens in its unit tests (digitised from its figure);
here they are proportional to the tokens, and half of them the send's.

Normal. GB/s at the bottleneck: NVLink within a node, and beyond it the card, which each token crosses once for each
node that wants it (the own one counts too, as in DeepEP's tests). There is no fixed time in what was published, so
there is none here. For 16,384 tokens at EP32 this gives 6.1 ms + 12.1 ms; SGLang's unit tests 7.3 + 14.3.

Between the published numbers of ranks: linear in the logarithm; outside them, the nearest.
"""

from math import log2

from model.config import ModelConfig
from scripts.bench.one_rank.loopback import share_of_tokens
from scripts.bench.one_rank.simulated_link import Delay, DelayModel

LOW_LATENCY = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
LOW_LATENCY_BYTES = 128 * 8 * (7168 + 224 + 16), 128 * 8 * 2 * 7168  # of 128 tokens
SM_TIME, SM_TIME_TOKENS = {"dispatch": 60e-6, "combine": 77e-6}, 256
NORMAL = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
NODE = 8  # ranks


def between(table: dict[int, tuple[float, float]], ranks: int) -> tuple[float, float]:
    """The row of `ranks`: a dispatch's number and a combine's."""
    if ranks in table or not min(table) < ranks < max(table):
        return table[min(table, key=lambda known: abs(log2(known / ranks)))]
    low, high = max(n for n in table if n < ranks), min(n for n in table if n > ranks)
    part = log2(ranks / low) / log2(high / low)
    dispatch, combine = (a + part * (b - a) for a, b in zip(table[low], table[high], strict=True))
    return dispatch, combine


def low_latency(config: ModelConfig, ranks: int) -> DelayModel:
    """Of a decode rank among so many."""
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
    """Of a prefill rank among so many."""
    rates, hidden = dict(zip(("dispatch", "combine"), between(NORMAL, ranks), strict=True)), config.hidden_size
    places = ranks if ranks <= NODE else -(-ranks // NODE)
    share = share_of_tokens(
        config.n_routed_experts, places, config.num_experts_per_tok, config.n_group, config.topk_group
    )
    rows = {"dispatch": hidden + hidden // 32 if config.fp8 else 2 * hidden, "combine": 2 * hidden}

    def transfer(what: str, tokens: int) -> Delay:
        return Delay(tokens * places * share * rows[what] / (rates[what] * 1e9))

    return transfer
