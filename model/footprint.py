"""Footprint: the bytes that a step's tensors take on a GPU, from their shapes alone.

The activations follow the tensors that are alive at the same time in `transformer.py`, `mla.py`, `moe.py` and
`parallel/dispatch.py`, with the GPU kernels of `kernels/`; their torch twins take more. A test counts live bytes and
holds these formulas against them (tests/test_memory.py). A layer has three moments at which it may be at its peak.
Sizes are [rows, columns] of the activations' dtype unless said otherwise. S are the tokens of context, M the rows of
the experts' groups:

    attention    x [T, D] | q [T, H (nope + R)], or what holds it and the latent | context [S, C + R] |
                 k_nope, v [S, H (nope + v)] | out [T, H v]; and k [S, H (nope + R)] where it must be whole
    experts      x, its operand, shared 3 [T / t, D] | arrived [M, D] | gate, up [M, 2 I] |
                 hidden [M, I], later with the output [M, D]
    combine      the same without gate, up, hidden | output [M, D] | sums [R T / t, D] | what came back

With the all-to-all, copies of what travels exist before that: as sent, as arrived, and cut into columns. The columns
stay until they are grouped.

Routing is assumed to be the worst possible: every token of every rank picks as many experts on this rank as it can. All
these tokens and their sums are counted in full. Their rows M are capped at twice the balanced number, because beyond
that the experts work in slices (`parallel/dispatch.py`). Without the cap, DeepSeek-V3's prefill on 32 ranks of 16,384
tokens would reserve 130 GiB; with it, 17.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.batch import PAGE
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.dispatch import most_copies

INDEX = 8  # bytes of an id or a row number
FLOAT = 4
SAMPLING = 14  # copies of the logits: 9 in `sampling.py`, and an estimate of what sorting takes
# Split-KV partial sums of decode attention: SPLITS per sequence, for at least SPLIT_ROWS sequences (half the SMs).
SPLITS, SPLIT_ROWS = 4, 66
KERNELS, KERNEL_BYTES = 30, 2048  # per layer of a captured step; what a GPU keeps for each


@dataclass(frozen=True)
class StepShape:
    """What decides the size of a step's tensors on one rank, beside its tokens."""

    config: ModelConfig
    itemsize: int  # bytes of an activation
    fp8: bool = False  # projections, and rows that travel
    attn_tp: int = 1
    ranks: int = 1  # R, of the shape
    slots: int = 1  # L, on this rank
    alignment: int = 1  # of an expert's rows
    capacity: int | None = None  # of DeepEP's low-latency mode; None: another dispatcher
    whole_keys: bool = False  # does prefill attention take them in one piece?

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads // self.attn_tp

    @property
    def copies(self) -> int:
        """The most experts of this rank that one token can want."""
        return min(self.config.num_experts_per_tok, self.slots)

    def row(self, width: int) -> int:
        """Bytes of `width` activations."""
        return width * self.itemsize

    def operand(self, width: int) -> int:
        """Bytes of a row as a projection takes it: in fp8 with a float32 scale for each 128 columns."""
        return width + FLOAT * -(-width // 128) if self.fp8 else self.row(width)

    def align(self, rows: int) -> int:
        return -(-rows // self.alignment) * self.alignment


def weight_bytes(model: Transformer) -> dict[str, int]:
    """Bytes of the parameters on this rank, by part; scales count with their weights."""
    parts = dict.fromkeys(("attention", "dense FFN", "shared experts", "routed experts"), 0)
    parts |= dict.fromkeys(("gates and norms", "embedding", "LM head"), 0)
    for name, weight in model.named_parameters():
        parts[_part(name)] += weight.nbytes
    return parts


def _part(name: str) -> str:
    pieces = name.split(".")
    if "gate" in pieces or any("norm" in piece for piece in pieces):
        return "gates and norms"
    homes = {"self_attn": "attention", "experts": "routed experts", "shared_experts": "shared experts"}
    homes |= {"embed_tokens": "embedding", "lm_head": "LM head"}
    return next((homes[piece] for piece in pieces if piece in homes), "dense FFN")


def page_bytes(config: ModelConfig, itemsize: int) -> int:
    """A page of KV over all layers."""
    return config.num_hidden_layers * PAGE * config.kv_dim * itemsize


def table_bytes(config: ModelConfig, maps: int, max_model_len: int, max_batch: int) -> int:
    """Rope's cos and sin, float32, the decode step's page table, int32, and the placement's maps, of `maps` bytes."""
    rope = max_model_len * config.qk_rope_head_dim * FLOAT
    pages = max_batch * -(-max_model_len // PAGE) * 4
    return rope + pages + maps


def grouped_rows(copies: int, groups: int, alignment: int) -> int:
    """The most rows that so many copies take in groups padded to `alignment`: all but one of each group's last block
    may be padding."""
    groups = min(groups, copies)
    return (copies + groups * (alignment - 1)) // alignment * alignment


def contiguous_step(shape: StepShape, tokens: int, context: int, max_batch: int) -> int:
    """Peak bytes of a step of `tokens` tokens, `max_batch` of them perhaps decodes, whose prompts see `context` tokens:
    prefill, or mixed."""
    mine = tokens // shape.attn_tp
    received = shape.ranks * mine
    copies, most = received * shape.copies, most_copies(mine, shape.config.num_experts_per_tok)
    rows = grouped_rows(min(copies, most), shape.slots, shape.alignment)
    sliced = max(1, most // shape.copies) if copies > most and shape.ranks > 1 else 0
    sent = mine * (1 + min(shape.ranks - 1, shape.config.num_experts_per_tok - shape.copies))
    return max(
        _attention(shape, tokens, max(_expanded(shape, tokens, context), _absorbed(shape, max_batch))),
        _dense(shape, tokens),
        _experts(shape, tokens, rows, sent, received, sliced),
        _head(shape, tokens, max_batch),
    )


def masked_step(shape: StepShape, tokens: int) -> int:
    """Peak bytes of a decode step of `tokens` rows, with the fixed rooms of the masked layout."""
    mine = tokens // shape.attn_tp
    arriving = shape.ranks * mine
    room = shape.align(arriving) if shape.capacity is None else shape.ranks * shape.capacity
    return max(
        _attention(shape, tokens, _absorbed(shape, tokens)),
        _dense(shape, tokens),
        _experts(shape, tokens, shape.slots * room, arriving, arriving if shape.capacity is None else mine),
        _head(shape, tokens, tokens),
    )


def sampling(config: ModelConfig, rows: int) -> int:
    """Peak bytes of choosing a token for each row of logits [rows, V], the logits included."""
    return SAMPLING * rows * config.vocab_size * FLOAT


def graphs(shape: StepShape, buckets: Sequence[int]) -> int:
    """An estimate of what the captured decode steps hold: one pool, as large as the most that a capture needed beside
    the logits of those before it (the largest bucket is first), and 60 KiB for each layer of each."""
    held, most = 0, 0
    for rows in sorted(buckets, reverse=True):
        most = max(most, held + masked_step(shape, rows))
        held += rows * shape.config.vocab_size * FLOAT
    return most + len(buckets) * shape.config.num_hidden_layers * KERNELS * KERNEL_BYTES


def _attention(shape: StepShape, tokens: int, inside: int) -> int:
    """`inside`: of the attention itself. Before it come the norm and the projections."""
    c, normed = shape.config, shape.operand(shape.config.hidden_size) if shape.fp8 else 0
    q = shape.heads * c.qk_head_dim + (c.kv_dim if c.q_lora_rank is None else 0)
    latent = 0 if c.q_lora_rank is None else c.q_lora_rank + c.kv_dim
    widths = 3 if shape.fp8 else 4  # x, what is added, their sum; and its norm, unless only the fp8 form is wanted
    before = max(
        shape.row(widths * c.hidden_size) + normed,
        shape.row(c.hidden_size + latent + q) + shape.operand(c.hidden_size),
    )
    return max(tokens * before, tokens * shape.row(c.hidden_size + q) + inside)


def _expanded(shape: StepShape, tokens: int, context: int) -> int:
    c, heads = shape.config, shape.heads
    of_context = c.kv_dim + heads * (c.qk_nope_head_dim + c.v_head_dim) + shape.whole_keys * heads * c.qk_head_dim
    return shape.row(context * of_context + tokens * heads * c.v_head_dim) + context * INDEX


def _absorbed(shape: StepShape, rows: int) -> int:
    c, heads = shape.config, shape.heads
    partial = SPLITS * max(rows, SPLIT_ROWS) * heads * c.kv_lora_rank * FLOAT
    return shape.row(rows * heads * (c.kv_dim + c.kv_lora_rank)) + partial


def _dense(shape: StepShape, tokens: int) -> int:
    c = shape.config
    if not c.first_k_dense_replace:
        return 0
    width = c.intermediate_size // shape.attn_tp
    inside = max(shape.row(2 * width) + shape.operand(width), shape.operand(width) + shape.row(c.hidden_size))
    return tokens * (shape.row(c.hidden_size) + shape.operand(c.hidden_size) + inside)


def _experts(shape: StepShape, tokens: int, rows: int, sent: int, received: int, sliced: int = 0) -> int:
    """`rows`: M. `sent`, `received`: tokens on the wire; with DeepEP's low latency what is received IS the groups.
    `sliced`: tokens of a slice, if what is received does not fit into M rows."""
    c, mine = shape.config, tokens // shape.attn_tp
    if not c.num_moe_layers:
        return 0
    hidden, width, top_k = c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    held = mine * (shape.row(2 * hidden) + shape.operand(hidden) + top_k * INDEX)
    came_in, between, out = shape.operand(hidden), shape.operand(width), shape.row(hidden)
    inside = rows * (FLOAT + max(came_in + shape.row(2 * width), shape.row(2 * width) + between, between + out))
    if shape.ranks == 1:
        return held + mine * top_k * FLOAT + max(inside, rows * FLOAT + shape.row((rows + mine) * hidden))
    routing = received * top_k * (INDEX + FLOAT)
    columns = received * shape.operand(hidden)  # with ids and weights: what travels
    grouped = rows * (shape.operand(hidden) + FLOAT)
    came = 0
    if shape.capacity is None:
        travels = shape.operand(hidden) + 2 * FLOAT * top_k
        came = max((sent + 2 * received) * travels, received * (travels + 2 * INDEX * top_k) + grouped)
    if sliced:
        of_slice = sliced * top_k * INDEX + max(inside, rows * FLOAT + shape.row((rows + sliced) * hidden))
        return held + max(came, routing + columns + shape.row(received * hidden) + of_slice)
    back = shape.row((received + (sent if shape.capacity is None else mine)) * hidden)
    return held + max(came, routing + max(inside, shape.row(rows * hidden) + back))


def _head(shape: StepShape, tokens: int, rows: int) -> int:
    c = shape.config
    logits = rows * c.vocab_size * FLOAT
    if shape.attn_tp > 1:  # mine, all as they were gathered, and in order
        logits = logits // shape.attn_tp + 2 * logits
    return shape.row((tokens + 2 * rows) * c.hidden_size) + logits
