"""The cost of one rank's step, MODELLED: how much each part computes and moves, and how long a GPU takes for it.

A part takes the longer of FLOP / ceiling and bytes / bandwidth. A step is the sum of its parts, one after another.

Every operand is read once and every result written once. Elementwise work is counted as fused: a norm with the
addition before it and the quantisation after it, silu with its multiplication. On one rank the experts take their rows
by index, so the weighted sum is the only permutation. Between ranks, prefill regroups the received rows; decode's sum
belongs to the communication. Communication, embedding, sampling arithmetic and launch gaps are not counted.

Ranks are balanced and routing is uniform. So the slots that are read on this rank are the expected number that its
tokens hit.

With drafts (`disagg/speculation.py`) the draft layer's KV is filled for all rows of the step: its input and the first
product of attention. Then the layer and the head run once per draft, on a row per sequence. How many drafts are right
is ASSUMED, and decides the tokens of a decode step.

Another count, for one GPU, leaves out the shared expert's silu, the latents' norms, the rotation of queries and the
sampler's pass over the logits. Its rates are up to 4 % higher in prefill, 1 % in decode (tests/test_roofline.py).
"""

from dataclasses import dataclass, replace
from math import comb

from model.config import ModelConfig

# Bytes per number.
BF16 = 2  # the KV cache too
SCALED = 1 + 4 / 128  # an fp8 activation and its share of a float32 scale
FLOAT32 = 4


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes/s. Without fp8 (None), fp8 parts run at bf16's rate."""

    bf16: float
    fp8: float | None
    bandwidth: float


@dataclass(frozen=True)
class Part:
    group: str
    name: str
    flop: float
    nbytes: float
    dtype: str = "bf16"  # or "fp8"

    def seconds(self, ceilings: Ceilings) -> float:
        rate = (ceilings.fp8 if self.dtype == "fp8" else None) or ceilings.bf16
        return max(self.flop / rate, self.nbytes / ceilings.bandwidth)


@dataclass(frozen=True)
class Cost:
    """The cost of a step of `tokens` tokens: for each kind of layer, the number of layers and the parts of one."""

    tokens: float
    kinds: dict[str, tuple[int, list[Part]]]

    def seconds(self, ceilings: Ceilings) -> float:
        return sum(count * total(parts, ceilings) for count, parts in self.kinds.values())

    def rate(self, ceilings: Ceilings) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds(ceilings)


def total(parts: list[Part], ceilings: Ceilings) -> float:
    return sum(part.seconds(ceilings) for part in parts)


def tokens_per_step(drafts: int, accept: float) -> float:
    """Return the tokens that a sequence gets of a step, on average. Each gets one, and those of the right drafts.

    `accept`: how likely a draft is right if all before it are. A wrong one ends the step's tokens.
    """
    return sum(accept**place for place in range(drafts + 1))


def decode(
    config: ModelConfig,
    batch: int,
    kv: float,
    ep: int = 1,
    local: int | None = None,
    attn_tp: int = 1,
    drafts: int = 0,
    accept: float = 0.0,
) -> Cost:
    """Return the cost of a step of `batch` sequences, which attend to `kv` tokens on average.

    With `attn_tp`, the sequences are those of a replica of that many ranks, and the cost is one rank's. The replica's
    all-reduces are not counted.
    The step verifies `drafts` drafts of each sequence, and drafts anew. `accept`: as in `tokens_per_step`.
    """
    split, each = _split(config, attn_tp), 1 + drafts
    spread, permutes = _Spread(config, batch * each / attn_tp, ep, local), ep == 1
    attention = _absorbed(split, batch, kv, each)
    work = _work(config, split, batch * each, batch * each, attention, spread, permutes)
    if not drafts:
        return work
    one = _Spread(config, batch / attn_tp, ep, local)
    kinds = _drafting(config, split, batch * each, drafts, batch, kv, one, permutes)
    return Cost(batch * tokens_per_step(drafts, accept), work.kinds | kinds)


def prefill(
    config: ModelConfig,
    tokens: int,
    prompt: int,
    ep: int = 1,
    local: int | None = None,
    attn_tp: int = 1,
    drafts: int = 0,
) -> Cost:
    """Return the cost of whole prompts of `prompt` tokens, `tokens` together; each yields its first token.

    `attn_tp`: as in `decode`. The step also drafts `drafts` tokens after each prompt.
    """
    split, sequences = _split(config, attn_tp), tokens / prompt
    attention = _expanded(split, tokens, sequences * prompt * (prompt + 1) / 2)
    spread = _Spread(config, tokens / attn_tp, ep, local)
    work = _work(config, split, tokens, sequences, attention, spread, permutes=True)
    if not drafts:
        return work
    one = _Spread(config, sequences / attn_tp, ep, local)
    kinds = _drafting(config, split, tokens, drafts, sequences, prompt, one, permutes=True)
    return replace(work, kinds=work.kinds | kinds)


def _drafting(
    config: ModelConfig,
    split: ModelConfig,
    rows: float,
    drafts: int,
    sequences: float,
    kv: float,
    one: "_Spread",
    permutes: bool,
) -> dict[str, tuple[int, list[Part]]]:
    """Return the draft layer's kinds: filled for all `rows` of a step, run on a row of each sequence; and its heads.

    `one`: the experts' load of a row of each sequence.
    """
    hidden, operand = config.hidden_size, SCALED if config.fp8 else BF16

    def joined(rows: float) -> list[Part]:
        return [
            Part("elementwise", "enorm, hnorm", 0, rows * 4 * hidden * BF16),
            _product("draft's input", "eh_proj", rows, hidden, 2 * hidden, fp8=False),
        ]

    fill = [
        *joined(rows),
        Part("elementwise", "norm", 0, rows * hidden * (BF16 + operand)),
        _first_projection(split, rows),
        Part("elementwise", "latent's norm, rope, KV write", 0, rows * 2 * config.kv_dim * BF16),
    ]
    attention = [*_absorbed(split, sequences, kv), *_norms(split, sequences)]
    layer = [*joined(sequences), *attention, *_moe(config, one.tokens, one, permutes)]
    return {
        "draft layer's fill": (1, fill),
        "draft layer": (drafts, layer),
        "draft layer's head": (drafts, _head(split, sequences)),
    }


def _split(config: ModelConfig, attn_tp: int) -> ModelConfig:
    """Return one rank's share of what a replica splits: heads, the dense layers' FFN, the vocabulary."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // attn_tp,
        intermediate_size=config.intermediate_size // attn_tp,
        vocab_size=config.vocab_size // attn_tp,
    )


class _Spread:
    """The experts' load on one rank. There are `ep` ranks with `local` slots each (E / ep if None).

    `tokens`: those that each rank dispatches.
    """

    def __init__(self, config: ModelConfig, tokens: float, ep: int, local: int | None) -> None:
        experts, top = config.n_routed_experts, config.num_experts_per_tok
        self.tokens = tokens
        self.ep, self.local = ep, local or -(-experts // ep)
        slots = self.ep * self.local
        self.rows = tokens * ep * top * self.local / slots
        self.hit = self.local * (1 - (1 - top / slots) ** (tokens * ep))
        groups, chosen = config.n_group, config.topk_group
        on_rank = max(1, groups // ep)  # groups with experts on a rank
        reached = ep * (1 - comb(groups - on_rank, chosen) / comb(groups, chosen))  # ranks with a chosen group
        self.received = tokens * reached * (1 - (1 - 1 / reached) ** top)  # a token counts once per rank


def _work(
    config: ModelConfig,
    split: ModelConfig,
    tokens: int,
    sequences: float,
    attention: list[Part],
    spread: _Spread,
    permutes: bool,
) -> Cost:
    around = [*attention, *_norms(split, tokens)]
    dense = [*around, *_ffn(split, "dense FFN", tokens, split.intermediate_size)]
    kinds = {
        "dense layer": (config.num_hidden_layers - config.num_moe_layers, dense),
        "MoE layer": (config.num_moe_layers, [*around, *_moe(config, spread.tokens, spread, permutes)]),
        "head": (1, _head(split, sequences)),
    }
    return Cost(tokens, {kind: (count, parts) for kind, (count, parts) in kinds.items() if count})


def _head(config: ModelConfig, rows: float) -> list[Part]:
    hidden, vocab, logits = config.hidden_size, config.vocab_size, rows * config.vocab_size * FLOAT32
    return [
        Part("LM head", "lm_head", 2 * rows * hidden * vocab, (vocab + rows) * hidden * BF16 + logits),
        Part("LM head", "the sampler's look at the logits", 0, logits),
    ]


def _product(
    group: str, name: str, rows: float, out: int, inner: int, fp8: bool, count: float = 1, read: float | None = None
) -> Part:
    """`count` products of [rows, inner] with weights [out, inner]. `read`: how many of the weights are read (all)."""
    weight, activation = (1, SCALED) if fp8 else (BF16, BF16)
    nbytes = (count if read is None else read) * out * inner * weight
    nbytes += count * rows * (inner * activation + out * BF16)
    return Part(group, name, 2 * count * rows * out * inner, nbytes, "fp8" if fp8 else "bf16")


def _first_projection(config: ModelConfig, tokens: float) -> Part:
    """Return the product that makes the latents, and what queries begin with."""
    first = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
    name = "q_a, kv_a" if config.q_lora_rank else "q, kv_a"
    return _product("MLA projections", name, tokens, first + config.kv_dim, config.hidden_size, config.fp8)


def _projections(config: ModelConfig, tokens: float) -> list[Part]:
    """Return the projections that both forms of attention share."""
    heads, fp8, group = config.num_attention_heads, config.fp8, "MLA projections"
    parts = [_first_projection(config, tokens)]
    if config.q_lora_rank:
        parts.append(_product(group, "q_b", tokens, heads * config.qk_head_dim, config.q_lora_rank, fp8))
    return [*parts, _product(group, "o_proj", tokens, config.hidden_size, heads * config.v_head_dim, fp8)]


def _absorbed(config: ModelConfig, batch: float, kv: float, each: int = 1) -> list[Part]:
    """Return the parts of absorbed attention. The `each` rows of a sequence share one reading of its KV."""
    heads, latent, width, rows = config.num_attention_heads, config.kv_lora_rank, config.kv_dim, batch * each
    flop = 2 * rows * heads * kv * (width + latent)
    nbytes = (batch * kv * width + rows * heads * (width + latent)) * BF16
    return [
        *_projections(config, rows),
        _product("MLA projections", "W_UK", rows, latent, config.qk_nope_head_dim, False, heads),
        _product("MLA projections", "W_UV", rows, config.v_head_dim, latent, False, heads),
        Part("MLA core", f"{width}/{latent}, absorbed", flop, nbytes),
    ]


def _expanded(config: ModelConfig, tokens: int, pairs: float) -> list[Part]:
    """Return the parts of expanded attention. `pairs`: pairs of a query and a key that it attends to."""
    heads, qk, v = config.num_attention_heads, config.qk_head_dim, config.v_head_dim
    up = heads * (config.qk_nope_head_dim + v)
    core = Part("MLA core", f"{qk}/{v}, causal", 2 * pairs * heads * (qk + v), 2 * tokens * heads * (qk + v) * BF16)
    return [
        *_projections(config, tokens),
        _product("MLA projections", "kv_b", tokens, up, config.kv_lora_rank, False),
        core,
    ]


def _norms(config: ModelConfig, tokens: float) -> list[Part]:
    """Return the elementwise work around attention."""
    operand = SCALED if config.fp8 else BF16
    attended = config.num_attention_heads * config.v_head_dim
    queries = (config.q_lora_rank or 0) * (BF16 + operand)
    queries += 2 * config.num_attention_heads * config.qk_rope_head_dim * BF16
    parts = [
        Part("elementwise", "2 x add, norm", 0, 2 * tokens * config.hidden_size * (3 * BF16 + operand)),
        Part("elementwise", "latents' norms, rope, KV write", 0, tokens * (queries + 2 * config.kv_dim * BF16)),
    ]
    if config.fp8:
        parts.append(Part("elementwise", "o_proj's input quantised", 0, tokens * attended * (BF16 + SCALED)))
    return parts


def _ffn(config: ModelConfig, group: str, tokens: float, width: int) -> list[Part]:
    return [
        _product(group, "gate, up", tokens, 2 * width, config.hidden_size, config.fp8),
        _product(group, "down", tokens, config.hidden_size, width, config.fp8),
        _silu(config, f"silu, {group}", tokens, width),
    ]


def _silu(config: ModelConfig, name: str, rows: float, width: int) -> Part:
    return Part("elementwise", name, 0, rows * width * (2 * BF16 + (SCALED if config.fp8 else BF16)))


def _moe(config: ModelConfig, tokens: float, spread: _Spread, permutes: bool) -> list[Part]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    each, fp8, group = spread.rows / spread.local, config.fp8, "routed experts"
    scores = (tokens + experts) * hidden * BF16 + tokens * experts * FLOAT32
    parts = [Part("router", "gate", 2 * tokens * hidden * experts, scores)]
    if config.n_shared_experts:
        parts += _ffn(config, "shared experts", tokens, config.n_shared_experts * width)
    parts += [
        _product(group, "gate, up", each, 2 * width, hidden, fp8, spread.local, spread.hit),
        _product(group, "down", each, hidden, width, fp8, spread.local, spread.hit),
        _silu(config, f"silu, {group}", spread.rows, width),
    ]
    if permutes and spread.ep == 1:
        parts.append(Part("EP permute", "weighted sum", 0, (spread.rows + tokens) * hidden * BF16))
    elif permutes:
        moved = (spread.received + spread.rows) * hidden
        parts.append(Part("EP permute", "rows to their experts", 0, moved * (SCALED if fp8 else BF16)))
        parts.append(Part("EP permute", "sums of a token's rows", 0, moved * BF16))
    return parts
