"""Footprint: the bytes that a rank's weights and a step's tensors take on a GPU, from their shapes alone.

No model is built and no GPU is asked, so `scripts/plan` counts with the same formulas as the engine. Those of steps
follow the tensors that are alive at the same time in `transformer.py`, `mla.py`, `moe.py` and `parallel/dispatch.py`.
They count the GPU kernels of `kernels/`; the torch twins take more. tests/test_memory.py counts live bytes and compares
them with these formulas.

A layer may peak at three moments. Sizes are [rows, columns] of the activations' dtype unless said otherwise. S is the
number of tokens of context, M the number of rows in the experts' groups:

    attention    x [T, D] | q [T, H (nope + R)], or what holds it and the latent | context [S, C + R] |
                 k_nope, v [S, H (nope + v)] | out [T, H v]; and k [S, H (nope + R)] if attention needs it whole
    experts      x, its operand, shared 3 [T / t, D] | received [M, D] | gate, up [M, 2 I] |
                 hidden [M, I], later with the output [M, D]
    combine      the same without gate, up, hidden | output [M, D] | sums [R T / t, D] | results received

With the all-to-all, the data that travels exists in three copies before that: as sent, as received, and cut into
columns. The columns stay until they are grouped.

Routing is assumed to be the worst possible: every token of every rank picks as many experts on this rank as it can. All
these tokens and their sums are counted in full. Their rows M are capped at twice the balanced number, because beyond
that the experts work in slices (`parallel/dispatch.py`). Without the cap, DeepSeek-V3's prefill on 32 ranks of 16,384
tokens would reserve 130 GiB; with it, 17.
"""

from collections import abc
from dataclasses import dataclass, replace

from kernels.fp8_format import BLOCK
from kernels.rooms import FEW_ROWS
from model.config import MOST_SIZE, ModelConfig
from model.pages import PAGE
from model.prompt_row import MAX_LOGPROBS, SLICE, row_bytes
from parallel.copies import grouped_rows, most_copies

INDEX = 8  # bytes of an id or a row number
FLOAT = 4
SAMPLING = 13  # copies of the logits beside them: 8 in `sampling.py`, and an estimate of 5 for sorting
# Split-KV partial sums of decode attention: SPLITS per sequence, for at least SPLIT_ROWS sequences (half the SMs), each
# with at least SPLIT_HEADS heads: several tokens of few heads have as many splits as one of 16.
SPLITS, SPLIT_ROWS, SPLIT_HEADS = 4, 66, 16
KERNELS, KERNEL_BYTES = 30, 2048  # kernels per layer of a captured step; bytes that a GPU keeps per kernel


@dataclass(frozen=True)
class StepShape:
    """Everything but the number of tokens that decides the size of a step's tensors on one rank."""

    config: ModelConfig
    itemsize: int  # bytes of an activation
    fp8: bool = False  # projections and rows that travel are in fp8
    attn_tp: int = 1
    ranks: int = 1  # R
    slots: int = 1  # L, on this rank
    alignment: int = 1  # an expert's rows are padded to a multiple of it
    capacity: int | None = None  # of DeepEP's low-latency mode; None: another dispatcher
    whole_keys: bool = False  # prefill attention copies each key into one piece
    normal: bool = True  # beside low latency, DeepEP's normal mode serves steps with prompts; else the all-to-all

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads // self.attn_tp

    @property
    def copies(self) -> int:
        """The most experts on this rank that one token can want."""
        return min(self.config.num_experts_per_tok, self.slots)

    def row(self, width: int) -> int:
        """Return the bytes of `width` activations."""
        return width * self.itemsize

    def operand(self, width: int) -> int:
        """Return the bytes of a row as a projection takes it. In fp8, it has a float32 scale per 128 columns."""
        return width + FLOAT * -(-width // BLOCK) if self.fp8 else self.row(width)

    def matrix(self, rows: int, columns: int) -> int:
        """Return the bytes of a projection's weight. In fp8, it has a float32 scale per 128x128 block."""
        if not self.fp8:
            return rows * self.row(columns)
        return rows * columns + FLOAT * -(-rows // BLOCK) * -(-columns // BLOCK)

    def whole(self, tokens: int) -> int:
        """Return the tokens of a step with `tokens` of requests: padding makes them divide over the replica's ranks."""
        return -(-tokens // self.attn_tp) * self.attn_tp

    def align(self, rows: int) -> int:
        return -(-rows // self.alignment) * self.alignment


def weight_bytes(shape: StepShape) -> dict[str, int]:
    """Return the bytes of a rank's parameters, by part. Scales count with their weights.

    The sizes are those that `transformer.py`, `mla.py`, `moe.py`, `ffn.py` and `head.py` allocate. tests/test_memory.py
    compares the parts with the parameters of built models.
    """
    c, heads, dense_layers = shape.config, shape.heads, shape.config.num_hidden_layers - shape.config.num_moe_layers
    hidden, itemsize = c.hidden_size, shape.itemsize
    queries, kv_up = heads * c.qk_head_dim, heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = shape.matrix((c.q_lora_rank or queries) + c.kv_dim, hidden)
    if c.q_lora_rank is not None:
        attention += shape.matrix(queries, c.q_lora_rank)
    attention += kv_up * c.kv_lora_rank * itemsize  # kv_b_proj: never in fp8
    attention += shape.matrix(hidden, heads * c.v_head_dim)
    norms = 2 * hidden + (c.q_lora_rank or 0) + c.kv_lora_rank  # per layer
    bias = FLOAT if c.topk_method == "noaux_tc" else 0  # the gate's, in float32
    gate = c.n_routed_experts * (hidden * itemsize + bias)
    parts = {
        "attention": c.num_hidden_layers * attention,
        "dense FFN": dense_layers * _ffn_bytes(shape, c.intermediate_size // shape.attn_tp),
        "shared experts": c.num_moe_layers * _ffn_bytes(shape, c.n_shared_experts * c.moe_intermediate_size),
        "routed experts": c.num_moe_layers * shape.slots * _ffn_bytes(shape, c.moe_intermediate_size),
        "gates and norms": (c.num_hidden_layers * norms + hidden) * itemsize + c.num_moe_layers * gate,
        "embedding": c.vocab_size * hidden * itemsize,
        "LM head": c.vocab_size // shape.attn_tp * hidden * itemsize,
    }
    if c.drafts:
        ffns = _ffn_bytes(shape, c.n_shared_experts * c.moe_intermediate_size)
        ffns += shape.slots * _ffn_bytes(shape, c.moe_intermediate_size)
        own = (3 + 2 * hidden) * hidden * itemsize  # enorm, hnorm, norm; eh_proj: never in fp8
        parts["draft layer"] = attention + norms * itemsize + gate + ffns + own
    return parts


def _ffn_bytes(shape: StepShape, width: int) -> int:
    hidden = shape.config.hidden_size
    return shape.matrix(2 * width, hidden) + shape.matrix(hidden, width)


def page_bytes(config: ModelConfig, itemsize: int) -> int:
    """Return the bytes of a KV page over all layers."""
    return config.kv_layers * PAGE * config.kv_dim * itemsize


def table_bytes(shape: StepShape, max_model_len: int, max_batch: int) -> int:
    """Return the bytes of a rank's tables.

    These are rope's cos and sin (float32), a decode step's page table (int32) and the placement's two maps (int64).
    """
    c = shape.config
    rope = max_model_len * c.qk_rope_head_dim * FLOAT
    pages = max_batch * -(-max_model_len // PAGE) * 4
    return rope + pages + (c.num_moe_layers + c.drafts) * (c.n_routed_experts + shape.ranks * shape.slots) * INDEX


def contiguous_step(shape: StepShape, tokens: int, context: int, max_batch: int) -> int:
    """Return the peak bytes of a step in the contiguous layout: prefill, or mixed.

    It has `tokens` tokens, of which up to `max_batch` are decodes. The prompts see `context` tokens.
    """
    return max(
        _contiguous_layers(shape, tokens, max(_expanded(shape, tokens, context), _absorbed(shape, max_batch))),
        _head(shape, tokens, max_batch),
        _scores(shape, tokens),
    )


def _contiguous_layers(shape: StepShape, tokens: int, inside: int) -> int:
    """Return the peak bytes of all layers of such a step. `inside`: the bytes of the attention itself."""
    if not shape.normal:
        shape = replace(shape, capacity=None)
    local_tokens = tokens // shape.attn_tp
    received = shape.ranks * local_tokens
    copies, max_copies = received * shape.copies, most_copies(local_tokens, shape.config.num_experts_per_tok)
    rows = most_rows(shape, tokens)
    sliced = max(1, max_copies // shape.copies) if copies > max_copies and shape.ranks > 1 else 0
    sent = local_tokens * (1 + min(shape.ranks - 1, shape.config.num_experts_per_tok - shape.copies))
    return max(
        _attention(shape, tokens, inside),
        _dense(shape, tokens),
        _experts(shape, tokens, rows, sent, received, sliced),
    )


def most_rows(shape: StepShape, tokens: int) -> int:
    """Return the most rows that the experts of a rank take at once in such a step."""
    local_tokens = tokens // shape.attn_tp
    max_copies = most_copies(local_tokens, shape.config.num_experts_per_tok)
    copies = min(shape.ranks * local_tokens * shape.copies, max_copies)
    return grouped_rows(copies, shape.slots, shape.alignment)


def room_for_context(shape: StepShape, tokens: int, least: int, max_batch: int) -> int:
    """Return the most tokens that the prompts of such a step may see without a higher peak than with `least`.

    Where experts make the peak, attention has room left. A tensor of all these tokens' keys and values stays below
    2**31 elements, unless `least` tokens have more.
    """
    c, peak = shape.config, contiguous_step(shape, tokens, least, max_batch)
    fixed = tokens * _attended_row(shape) + _expanded(shape, tokens, 0)
    most = MOST_SIZE // (shape.heads * (c.qk_nope_head_dim + c.v_head_dim))
    return max(least, min((peak - fixed) // _expanded(shape, 0, 1), most))


def masked_step(shape: StepShape, tokens: int) -> int:
    """Return the peak bytes of a decode step of `tokens` rows, with the fixed rooms of the masked layout."""
    local_tokens = tokens // shape.attn_tp
    arriving = shape.ranks * local_tokens
    room = shape.align(arriving) if shape.capacity is None else shape.ranks * shape.capacity
    return max(
        _attention(shape, tokens, _absorbed(shape, tokens)),
        _dense(shape, tokens),
        _experts(
            shape,
            tokens,
            shape.slots * room,
            arriving,
            arriving if shape.capacity is None else local_tokens,
            room=room,
        ),
        _head(shape, tokens, tokens),
    )


def drafting(shape: StepShape, tokens: int, step: int) -> int:
    """Return the peak bytes of a step that also drafts, if without that a step of `tokens` tokens takes `step`.

    The draft layer runs over fewer rows than the other layers with experts. While its KV is filled for all tokens,
    there are the main model's output, the embeddings, the norms of both, the two in one, and what eh_proj makes of it.
    """
    row = tokens * shape.row(shape.config.hidden_size)
    return max(step, 7 * row)


def logits(config: ModelConfig, rows: int) -> int:
    """Return the bytes of logits [rows, V]. Those of all steps lie in one buffer, which the sizes of steps exclude."""
    return rows * config.vocab_size * FLOAT


def sampling(config: ModelConfig, rows: int) -> int:
    """Return the peak bytes of choosing a token per row of logits [rows, V]."""
    return SAMPLING * logits(config, rows)


def graphs(
    shape: StepShape,
    buckets: abc.Sequence[int],
    drafts: abc.Sequence[int] = (0,),
    prompts: abc.Sequence[tuple[int, int]] = (),
) -> int:
    """Estimate the bytes that the captured steps hold: one shared pool, and 60 KiB per layer of each forward.

    Captures run from the largest to the smallest, prompts first. With drafts, the target's output stays in the pool. So
    a capture of a decode step needs its own step and all outputs before it. The pool is as large as the largest of
    these sums. A graph that drafts needs less than its target. Captured prompts share their inputs and their output,
    which are no part of the pool. `buckets`: of decode steps. `drafts`: how many these may have, the most last.
    `prompts`: the tokens and the context of each captured step of prompts.
    """
    c, kept, most = shape.config, 0, max(drafts)
    pool = max((_contiguous_layers(shape, n, _expanded(shape, n, seen)) for n, seen in prompts), default=0)
    tokens, context = (max(sizes) for sizes in zip((0, 0), *prompts, strict=True))
    shared = tokens * (shape.row(c.hidden_size) + 3 * INDEX) + context * INDEX
    output = shape.row(c.hidden_size) if most else 0
    for rows in sorted(buckets, reverse=True):
        for verified in reversed(drafts):
            tokens = rows * (1 + verified)
            pool = max(pool, kept + masked_step(shape, tokens))
            kept += tokens * output
    layers = c.num_hidden_layers * len(drafts) + most + (len(drafts) if most else 0)  # the last: those that fill
    layers = len(buckets) * layers + len(prompts) * c.num_hidden_layers
    return pool + shared + layers * KERNELS * KERNEL_BYTES


def _attention(shape: StepShape, tokens: int, inside: int) -> int:
    """Return the peak of norm, projections and attention. `inside`: the bytes of the attention itself."""
    c, normed = shape.config, shape.operand(shape.config.hidden_size) if shape.fp8 else 0
    q = shape.heads * c.qk_head_dim + (c.kv_dim if c.q_lora_rank is None else 0)
    latent = 0 if c.q_lora_rank is None else c.q_lora_rank + c.kv_dim
    # x, its addend, their sum; and the norm, unless only its fp8 form is wanted. With DeepEP there are two addends. But
    # then the experts have the higher peak: they hold received rows, at least twice as many as there are tokens.
    widths = 3 if shape.fp8 else 4
    before = max(
        shape.row(widths * c.hidden_size) + normed,
        shape.row(c.hidden_size + latent + q) + shape.operand(c.hidden_size),
    )
    return max(tokens * before, tokens * _attended_row(shape) + inside)


def _attended_row(shape: StepShape) -> int:
    """Return the bytes that live throughout the attention, per token: x, and the queries."""
    c = shape.config
    own = c.kv_dim if c.q_lora_rank is None else 0  # the projection's other columns, of which the queries are a view
    return shape.row(c.hidden_size + shape.heads * c.qk_head_dim + own)


def _expanded(shape: StepShape, tokens: int, context: int) -> int:
    c, heads = shape.config, shape.heads
    of_context = c.kv_dim + heads * (c.qk_nope_head_dim + c.v_head_dim) + shape.whole_keys * heads * c.qk_head_dim
    return shape.row(context * of_context + tokens * heads * c.v_head_dim) + context * INDEX


def _absorbed(shape: StepShape, rows: int) -> int:
    c, heads = shape.config, shape.heads
    partial = split_heads(rows, heads) * c.kv_lora_rank * FLOAT
    return shape.row(rows * heads * (c.kv_dim + c.kv_lora_rank)) + partial


def split_heads(rows: int, heads: int) -> int:
    """Return the most partial sums of decode attention for so many rows and heads."""
    return SPLITS * max(rows, SPLIT_ROWS) * max(heads, SPLIT_HEADS)


def _dense(shape: StepShape, tokens: int) -> int:
    c = shape.config
    if not c.first_k_dense_replace:
        return 0
    width = c.intermediate_size // shape.attn_tp
    inside = max(shape.row(2 * width) + shape.operand(width), shape.operand(width) + shape.row(c.hidden_size))
    return tokens * (shape.row(c.hidden_size) + shape.operand(c.hidden_size) + inside)


def _experts(
    shape: StepShape, tokens: int, rows: int, sent: int, received: int, sliced: int = 0, room: int | None = None
) -> int:
    """Return the peak of an MoE layer, from dispatch to combine.

    `rows`: M. `sent`, `received`: tokens on the wire. (With DeepEP's low latency, tokens arrive in the groups
    themselves.) `sliced`: tokens per slice, if the received tokens do not fit into M rows; else 0. `room`: rows of an
    expert's room, in the masked layout.
    """
    c, local_tokens = shape.config, tokens // shape.attn_tp
    if not c.num_moe_layers:
        return 0
    hidden, top_k = c.hidden_size, c.num_experts_per_tok
    outside = local_tokens * (shape.row(2 * hidden) + shape.operand(hidden) + top_k * INDEX)  # lives throughout
    inside = rows * (FLOAT + _expert_row(shape, room))
    if shape.ranks == 1:  # in the masked layout the next norm makes the sum: beside x, `plus`, the rows and its output
        gathering = rows * FLOAT + shape.row((rows + local_tokens) * hidden)
        return outside + local_tokens * top_k * FLOAT + max(inside, gathering)
    routing = received * top_k * (INDEX + FLOAT)
    columns = received * shape.operand(hidden)  # the received tokens, without ids and weights
    grouped = rows * (shape.operand(hidden) + FLOAT)
    arrival = 0
    if shape.capacity is None:
        wire_row = shape.operand(hidden) + 2 * FLOAT * top_k
        arrival = max((sent + 2 * received) * wire_row, received * (wire_row + 2 * INDEX * top_k) + grouped)
    if sliced:
        of_slice = sliced * top_k * INDEX + max(inside, rows * FLOAT + shape.row((rows + sliced) * hidden))
        return outside + max(arrival, routing + columns + shape.row(received * hidden) + of_slice)
    returning = shape.row((received + (sent if shape.capacity is None else local_tokens)) * hidden)
    return outside + max(arrival, routing + max(inside, shape.row(rows * hidden) + returning))


def _expert_row(shape: StepShape, room: int | None) -> int:
    """Return the most bytes of an expert's row, from the first product to the last."""
    hidden, width = shape.config.hidden_size, shape.config.moe_intermediate_size
    given, gate_up, between, out = (
        shape.operand(hidden),
        shape.row(2 * width),
        shape.operand(width),
        shape.row(hidden),
    )
    if room is None or shape.fp8:
        return max(given + gate_up, gate_up + between, between + out)
    few = room <= FEW_ROWS and shape.itemsize < FLOAT  # then one kernel makes `between`; else the op has `gate_up`, too
    return max(given + between + (0 if few else gate_up), between + out)


def _head(shape: StepShape, tokens: int, rows: int) -> int:
    return shape.row((tokens + 2 * rows) * shape.config.hidden_size) + _gathered(shape, rows)


def _gathered(shape: StepShape, rows: int) -> int:
    """Return the bytes of logits before they are in order: with attention TP this rank's, and all as gathered."""
    whole = logits(shape.config, rows)
    return whole // shape.attn_tp + whole if shape.attn_tp > 1 else 0


def _scores(shape: StepShape, tokens: int) -> int:
    """Return the peak of a step in which all tokens are of prompts that want MAX_LOGPROBS (`prompt_logprobs.py`).

    The head runs on a slice of the rows: its logits, then with their log softmax. What is kept grows with the tokens,
    not with the vocabulary.
    """
    c, rows = shape.config, min(SLICE, tokens)
    kept = tokens * (2 * INDEX + row_bytes(MAX_LOGPROBS, c.vocab_size))
    head = shape.row(2 * rows * c.hidden_size) + _gathered(shape, rows) + logits(c, rows)
    return shape.row(tokens * c.hidden_size) + kept + max(head, 2 * logits(c, rows))
