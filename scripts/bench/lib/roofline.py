"""Model how fast one rank's step could be: the time of each part on a GPU with given ceilings.

python -m scripts.bench.lib.roofline decode --shape moonlight --batch 128 --kv 1088
python -m scripts.bench.lib.roofline decode --shape v3 --batch 256 --kv 2048 --ep 72 --local 4 --ceilings 798,1400,3.0
python -m scripts.bench.lib.roofline prefill --tokens 16384 --prompt 4096 --ep 32 --local 9 --ceilings 798,1400,3.0

A part takes the longer of FLOP / ceiling and bytes / bandwidth. A step is the sum of its parts, one after another.
Without --ceilings (bf16 TFLOP/s, fp8 TFLOP/s or -, TB/s) they are measured on this machine's GPU.

Every operand is read once and every result written once. Elementwise work is counted as fused: a norm with the
addition before it and the quantisation after it, silu with its multiplication. On one rank the experts take their rows
by index, so the weighted sum is the only permutation. Between ranks, prefill regroups the received rows; decode's sum
belongs to the communication. Communication, embedding, sampling arithmetic and launch gaps are not counted.

Ranks are balanced and routing is uniform. So the slots that are read on this rank are the expected number that its
tokens hit.

Another count, for one GPU, leaves out the shared expert's silu, the latents' norms, the rotation of queries and the
sampler's pass over the logits. Its rates are up to 4 % higher in prefill, 1 % in decode (tests/test_roofline.py).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import comb
from statistics import median

import torch

from model.config import ModelConfig
from scripts.bench.lib.flags import PHASES, SIZES, positive
from scripts.bench.lib.shapes import SHAPES

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

    tokens: int
    kinds: dict[str, tuple[int, list[Part]]]

    def seconds(self, ceilings: Ceilings) -> float:
        return sum(count * total(parts, ceilings) for count, parts in self.kinds.values())

    def rate(self, ceilings: Ceilings) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds(ceilings)


def total(parts: list[Part], ceilings: Ceilings) -> float:
    return sum(part.seconds(ceilings) for part in parts)


def decode(config: ModelConfig, batch: int, kv: float, ep: int = 1, local: int | None = None, attn_tp: int = 1) -> Cost:
    """Return the cost of one token for each of `batch` sequences, which attend to `kv` tokens on average.

    With `attn_tp`, the sequences are those of a replica of that many ranks, and the cost is one rank's. The replica's
    all-reduces are not counted.
    """
    split, spread = _split(config, attn_tp), _Spread(config, batch / attn_tp, ep, local)
    return _work(config, split, batch, batch, _absorbed(split, batch, kv), spread, permutes=ep == 1)


def prefill(
    config: ModelConfig, tokens: int, prompt: int, ep: int = 1, local: int | None = None, attn_tp: int = 1
) -> Cost:
    """Return the cost of whole prompts of `prompt` tokens, `tokens` together; each yields its first token.

    `attn_tp`: as in `decode`.
    """
    split, sequences = _split(config, attn_tp), tokens / prompt
    attention = _expanded(split, tokens, sequences * prompt * (prompt + 1) / 2)
    spread = _Spread(config, tokens / attn_tp, ep, local)
    return _work(config, split, tokens, sequences, attention, spread, permutes=True)


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


def _projections(config: ModelConfig, tokens: int) -> list[Part]:
    """Return the projections that both forms of attention share."""
    heads, fp8, group = config.num_attention_heads, config.fp8, "MLA projections"
    first = config.q_lora_rank or heads * config.qk_head_dim
    parts = [_product(group, "q_a, kv_a" if config.q_lora_rank else "q, kv_a", tokens, first + config.kv_dim,
                      config.hidden_size, fp8)]  # fmt: skip
    if config.q_lora_rank:
        parts.append(_product(group, "q_b", tokens, heads * config.qk_head_dim, config.q_lora_rank, fp8))
    return [*parts, _product(group, "o_proj", tokens, config.hidden_size, heads * config.v_head_dim, fp8)]


def _absorbed(config: ModelConfig, batch: int, kv: float) -> list[Part]:
    heads, latent, width = config.num_attention_heads, config.kv_lora_rank, config.kv_dim
    flop = 2 * batch * heads * kv * (width + latent)
    nbytes = batch * (kv * width + heads * (width + latent)) * BF16
    return [
        *_projections(config, batch),
        _product("MLA projections", "W_UK", batch, latent, config.qk_nope_head_dim, False, heads),
        _product("MLA projections", "W_UV", batch, config.v_head_dim, latent, False, heads),
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


def _norms(config: ModelConfig, tokens: int) -> list[Part]:
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


def measure_ceilings() -> Ceilings:
    """Measure the current GPU with random operands: products of 8192^3 (fp8 with one scale per operand), and a copy."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16, fp8 = 2 * side**3 / _median_seconds(lambda: a @ b.t()), None
    if torch.cuda.get_device_capability() >= (8, 9):
        x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        product = lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        fp8 = 2 * side**3 / _median_seconds(product)
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Ceilings(bf16, fp8, 2 * source.numel() / _median_seconds(lambda: target.copy_(source)))


def _median_seconds(call: Callable[[], object]) -> float:
    for _ in range(20):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for mark in marks:
        mark.record()
        call()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


def show(work: Cost, ceilings: Ceilings) -> None:
    fp8 = "no" if ceilings.fp8 is None else f"{ceilings.fp8 / 1e12:,.0f} TFLOP/s"
    print(f"ceilings: bf16 {ceilings.bf16 / 1e12:,.0f} TFLOP/s, fp8 {fp8}, {ceilings.bandwidth / 1e12:.2f} TB/s")
    groups: dict[str, float] = {}
    for kind, (count, parts) in work.kinds.items():
        print(f"\n{count} x {kind:50} {'GFLOP':>10} {'MB':>9} {'us':>9}  (modelled)")
        for part in parts:
            seconds = part.seconds(ceilings)
            groups[part.group] = groups.get(part.group, 0) + count * seconds
            limit = "bytes" if seconds == part.nbytes / ceilings.bandwidth else part.dtype
            _row(f"{part.group}: {part.name}", part.flop, part.nbytes, seconds, limit)
        _row("sum", sum(p.flop for p in parts), sum(p.nbytes for p in parts), total(parts, ceilings))
    print(f"\n{'the step, modelled':30} {'ms':>9} {'share':>6}")
    step = work.seconds(ceilings)
    for group, seconds in groups.items():
        print(f"{group:30} {1e3 * seconds:9.3f} {seconds / step:6.1%}")
    print(f"{'sum':30} {1e3 * step:9.3f}        {work.rate(ceilings):,.0f} tok/s")


def _row(name: str, flop: float, nbytes: float, seconds: float, limit: str = "") -> None:
    print(f"  {name:52} {flop / 1e9:10.2f} {nbytes / 1e6:9.2f} {1e6 * seconds:9.2f}  {limit}".rstrip())


def _given(text: str) -> Ceilings:
    try:
        bf16, fp8, bandwidth = (None if part == "-" else float(part) * 1e12 for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BF16,FP8,TB/S") from None
    if (
        bf16 is None
        or bandwidth is None
        or not all(0 < rate < math.inf for rate in (bf16, bandwidth, bf16 if fp8 is None else fp8))
    ):
        raise argparse.ArgumentTypeError(f"{text!r}: rates must be over 0 (and for fp8 - is none)")
    return Ceilings(bf16, fp8, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for phase, sizes in PHASES.items():
        add = phases.add_parser(phase).add_argument
        add("--shape", choices=SHAPES, default="moonlight", help="the model (moonlight)")
        for size in sizes:
            add(f"--{size}", type=positive, required=True, help=SIZES[size])
        add("--ep", type=positive, default=1, help="ranks over which the experts are spread (1)")
        add(
            "--local",
            type=positive,
            help="slots per rank, redundant ones included (default: an even share of the experts)",
        )
        add(
            "--ceilings",
            type=_given,
            metavar="BF16,FP8,TB/S",
            help="in TFLOP/s (- for no fp8) and TB/s (measured on the GPU)",
        )
    args = parser.parse_args()
    if args.local is not None and args.ep * args.local < SHAPES[args.shape].n_routed_experts:
        parser.error(f"--ep x --local must be at least the {SHAPES[args.shape].n_routed_experts} experts, not {args.ep}"
                     f" x {args.local} = {args.ep * args.local}")  # fmt: skip
    if args.phase == "prefill" and args.prompt > args.tokens:
        parser.error(f"--prompt must be at most --tokens ({args.tokens}), not {args.prompt}")
    if args.ceilings is None and not torch.cuda.is_available():
        parser.error("no GPU to measure the ceilings of: give --ceilings")
    ceilings, config = args.ceilings or measure_ceilings(), SHAPES[args.shape]
    if args.phase == "decode":
        work = decode(config, args.batch, args.kv, args.ep, args.local)
    else:
        work = prefill(config, args.tokens, args.prompt, args.ep, args.local)
    show(work, ceilings)


if __name__ == "__main__":
    main()
