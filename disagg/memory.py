"""What a rank's GPU memory goes to, before the KV pool is made: the pool gets what is left.

Everything here is arithmetic on shapes. The activations follow the tensors that are alive at the same time in
`model/transformer.py`, `mla.py`, `moe.py` and `parallel/dispatch.py`, with the GPU kernels of `kernels/` (their torch
twins take more). A layer has three moments at which it may be at its peak, [rows, columns] of the activations' dtype
unless said otherwise, with S the tokens of context and M the rows of the experts' groups:

    attention    x [T, D] | q [T, H (nope + R)], or what holds it and the latent | context [S, C + R] |
                 k_nope, v [S, H (nope + v)] | out [T, H v]; and k [S, H (nope + R)] where it must be whole
    experts      x, its operand, shared 3 [T / t, D] | arrived [M, D] | gate, up [M, 2 I] |
                 hidden [M, I], later with the output [M, D]
    combine      the same without gate, up, hidden | output [M, D] | sums [R T / t, D] | what came back

Before that, with the all-to-all, there are copies of what travels, as it is sent, as it arrives, and cut into columns,
of which the last stay until they are grouped. Routing is taken at its worst: every token of every rank wants as many of
MY experts as it can. All these tokens have their place, and so have their sums; of their rows M there are at most twice
as many as evenly spread tokens would have, for if more arrive the experts take them in slices (`parallel/dispatch.py`).
Without that, these formulas would have DeepSeek-V3's prefill on 32 ranks of 16,384 tokens keep 130 GiB for a routing
that never comes; so it is 17.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.batch import PAGE
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.dispatch import most_copies
from parallel.mesh import Mesh

GIB = 2**30
KV_TOKENS_ON_CPU = 65536
INDEX = 8  # bytes of an id or a row number
FLOAT = 4
WORKSPACES = 3 * 32 * 2**20  # cuBLAS takes 32 MiB (Hopper) for each stream: the step's, the shared expert's, capture's
SAMPLING = 14  # copies of the logits: 9 in `model/sampling.py`, and an estimate of what sorting takes
SPLITS, SPLIT_ROWS = 4, 66  # partial sums of a decode attention: up to 4 a sequence, of half the SMs or more sequences
KERNELS, KERNEL_BYTES = 30, 2048  # in a layer of a captured step; what a GPU keeps for each


@dataclass(frozen=True)
class Job:
    """What decides the size of a step's tensors on one rank, beside its tokens."""

    config: ModelConfig
    itemsize: int  # bytes of an activation
    fp8: bool = False  # projections, and rows that travel
    attn_tp: int = 1
    ranks: int = 1  # R, of the job
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


def contiguous_step(job: Job, tokens: int, context: int, max_batch: int) -> int:
    """Peak bytes of a step of `tokens` tokens, `max_batch` of them perhaps decodes, whose prompts see `context` tokens:
    prefill, or mixed."""
    mine = tokens // job.attn_tp
    received = job.ranks * mine
    copies, most = received * job.copies, most_copies(mine, job.config.num_experts_per_tok)
    rows = grouped_rows(min(copies, most), job.slots, job.alignment)
    sliced = max(1, most // job.copies) if copies > most and job.ranks > 1 else 0
    sent = mine * (1 + min(job.ranks - 1, job.config.num_experts_per_tok - job.copies))
    return max(
        _attention(job, tokens, max(_expanded(job, tokens, context), _absorbed(job, max_batch))),
        _dense(job, tokens),
        _experts(job, tokens, rows, sent, received, sliced),
        _head(job, tokens, max_batch),
    )


def masked_step(job: Job, tokens: int) -> int:
    """Peak bytes of a decode step of `tokens` rows, with the fixed rooms of the masked layout."""
    mine = tokens // job.attn_tp
    arriving = job.ranks * mine
    room = job.align(arriving) if job.capacity is None else job.ranks * job.capacity
    return max(
        _attention(job, tokens, _absorbed(job, tokens)),
        _dense(job, tokens),
        _experts(job, tokens, job.slots * room, arriving, arriving if job.capacity is None else mine),
        _head(job, tokens, tokens),
    )


def sampling(config: ModelConfig, rows: int) -> int:
    """Peak bytes of choosing a token for each row of logits [rows, V], the logits included."""
    return SAMPLING * rows * config.vocab_size * FLOAT


def graphs(job: Job, buckets: Sequence[int]) -> int:
    """An estimate of what the captured decode steps hold: one pool, as large as the most that a capture needed beside
    the logits of those before it (the largest bucket is first), and 60 KiB for each layer of each."""
    held, most = 0, 0
    for rows in sorted(buckets, reverse=True):
        most = max(most, held + masked_step(job, rows))
        held += rows * job.config.vocab_size * FLOAT
    return most + len(buckets) * job.config.num_hidden_layers * KERNELS * KERNEL_BYTES


def _attention(job: Job, tokens: int, inside: int) -> int:
    """`inside`: of the attention itself. Before it come the norm and the projections."""
    c, normed = job.config, job.operand(job.config.hidden_size) if job.fp8 else 0
    q = job.heads * c.qk_head_dim + (c.kv_dim if c.q_lora_rank is None else 0)
    latent = 0 if c.q_lora_rank is None else c.q_lora_rank + c.kv_dim
    widths = 3 if job.fp8 else 4  # x, what is added, their sum; and the norm of it, unless only its fp8 form is wanted
    before = max(
        job.row(widths * c.hidden_size) + normed,
        job.row(c.hidden_size + latent + q) + job.operand(c.hidden_size),
    )
    return max(tokens * before, tokens * job.row(c.hidden_size + q) + inside)


def _expanded(job: Job, tokens: int, context: int) -> int:
    c, heads = job.config, job.heads
    of_context = c.kv_dim + heads * (c.qk_nope_head_dim + c.v_head_dim) + job.whole_keys * heads * c.qk_head_dim
    return job.row(context * of_context + tokens * heads * c.v_head_dim) + context * INDEX


def _absorbed(job: Job, rows: int) -> int:
    c, heads = job.config, job.heads
    partial = SPLITS * max(rows, SPLIT_ROWS) * heads * c.kv_lora_rank * FLOAT
    return job.row(rows * heads * (c.kv_dim + c.kv_lora_rank)) + partial


def _dense(job: Job, tokens: int) -> int:
    c = job.config
    if not c.first_k_dense_replace:
        return 0
    width = c.intermediate_size // job.attn_tp
    inside = max(job.row(2 * width) + job.operand(width), job.operand(width) + job.row(c.hidden_size))
    return tokens * (job.row(c.hidden_size) + job.operand(c.hidden_size) + inside)


def _experts(job: Job, tokens: int, rows: int, sent: int, received: int, sliced: int = 0) -> int:
    """`rows`: M. `sent`, `received`: tokens on the wire; with DeepEP's low latency what is received IS the groups.
    `sliced`: tokens of a slice, if what is received does not fit into M rows."""
    c, mine = job.config, tokens // job.attn_tp
    if not c.num_moe_layers:
        return 0
    hidden, width, top_k = c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    held = mine * (job.row(2 * hidden) + job.operand(hidden) + top_k * INDEX)
    came_in, between, out = job.operand(hidden), job.operand(width), job.row(hidden)
    inside = rows * (FLOAT + max(came_in + job.row(2 * width), job.row(2 * width) + between, between + out))
    if job.ranks == 1:
        return held + mine * top_k * FLOAT + max(inside, rows * FLOAT + job.row((rows + mine) * hidden))
    routing = received * top_k * (INDEX + FLOAT)
    columns = received * job.operand(hidden)  # with ids and weights: what travels
    grouped = rows * (job.operand(hidden) + FLOAT)
    came = 0
    if job.capacity is None:
        travels = job.operand(hidden) + 2 * FLOAT * top_k
        came = max((sent + 2 * received) * travels, received * (travels + 2 * INDEX * top_k) + grouped)
    if sliced:
        of_slice = sliced * top_k * INDEX + max(inside, rows * FLOAT + job.row((rows + sliced) * hidden))
        return held + max(came, routing + columns + job.row(received * hidden) + of_slice)
    back = job.row((received + (sent if job.capacity is None else mine)) * hidden)
    return held + max(came, routing + max(inside, job.row(rows * hidden) + back))


def _head(job: Job, tokens: int, rows: int) -> int:
    c = job.config
    logits = rows * c.vocab_size * FLOAT
    if job.attn_tp > 1:  # mine, all as they were gathered, and in order
        logits = logits // job.attn_tp + 2 * logits
    return job.row((tokens + 2 * rows) * c.hidden_size) + logits


@dataclass(frozen=True)
class Budget:
    """What one rank may take of its GPU, and what goes to everything but KV, in bytes."""

    available: int
    why: str  # `available` as an equation
    parts: dict[str, int]
    page: int

    @property
    def left(self) -> int:
        return self.available - sum(self.parts.values())

    @property
    def most_pages(self) -> int:
        """That fit beside the null page."""
        return max(0, self.left // self.page - 1)

    def pages(self, tokens: int | None) -> int:
        """Pages of the pool without the null page: for so many tokens, rounded down, or (None) all that fit. ValueError
        if they do not."""
        pages = max(1, self.most_pages) if tokens is None else tokens // PAGE
        if pages <= self.most_pages:
            return pages
        size = (pages + 1) * self.page
        asked = "the least: a page and the null page" if tokens is None else f"--kv-tokens {tokens}"
        terms = [f"{name} {_gib(part)}" for name, part in self.parts.items() if part] + [f"KV {_gib(size)} ({asked})"]
        most = f"--kv-tokens (to at most {self.most_pages * PAGE}), " if tokens is not None and self.most_pages else ""
        raise ValueError(
            f"GPU memory: {' + '.join(terms)} = {_gib(sum(self.parts.values()) + size)} GiB is over "
            f"{self.why} = {_gib(self.available)} GiB; raise --gpu-memory-fraction, or lower {most}"
            f"--max-tokens-per-step, --max-batch or --max-model-len"
        )

    def table(self, pages: int) -> str:
        """Lines of part and GiB: what is taken, a pool of so many pages and the null page, and the limit."""
        pool = (pages + 1) * self.page
        sizes = {**self.parts, "KV": pool, "together": sum(self.parts.values()) + pool, "limit": self.available}
        notes = {"KV": f"  {pages:,} pages, {pages * PAGE:,} tokens", "limit": f"  {self.why}"}
        width = max(map(len, sizes))
        lines = [f"{name:>{width}}: {_gib(size):>8}{notes.get(name, '')}" for name, size in sizes.items()]
        return "\n".join([f"{'memory':>{width}}: {'GiB':>8}", *lines])


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def share_of_gpu(total: int, free: int, held: int, fraction: float, sharers: int) -> tuple[int, str]:
    """Bytes that one of `sharers` ranks on a GPU may use, and why: its share of `fraction` of all there is, or of what
    is free beside the `held` bytes that it has taken already."""
    allowed, there = int(fraction * total) // sharers, free // sharers + held
    among = f" / {sharers} ranks" if sharers > 1 else ""
    if allowed <= there:
        return allowed, f"--gpu-memory-fraction {fraction:g} x {_gib(total)}{among}"
    return there, f"free {_gib(free)}{among} + {_gib(held)} that this rank has taken"


def share_of_torch(total: int, buffers: int, fraction: float, sharers: int) -> float:
    """The fraction of the GPU that torch may hold for one of `sharers` ranks: its share, without the `buffers` that are
    not torch's, and half of what `fraction` leaves. The other half is for what else takes memory later, above all NCCL:
    groups and links connect when they are first used, and torch's cache could have grown over all there is by then."""
    return max(0.0, (1 + fraction) / 2 / sharers - buffers / total)


def pages_on_host(mesh: Mesh, tokens: int | None, page: int) -> int:
    """Pages of a CPU rank's pool without the null page: for `tokens`, rounded down, or (None) KV_TOKENS_ON_CPU.
    ValueError if the memory of a machine does not hold the pools of its ranks. All ranks together."""
    pages = (tokens or KV_TOKENS_ON_CPU) // PAGE
    machines: dict[str, list[int]] = {}
    for host, available in mesh.ep.exchange((socket.gethostname(), host_memory())):
        machines.setdefault(host, []).append(available)
    ranks = min(machines.values(), key=lambda seen: min(seen) // len(seen))  # of the machine with the least for each
    share, size = min(ranks) // len(ranks), (pages + 1) * page
    if size > share:
        among = f" / {len(ranks)} ranks = {_gib(share)} GiB" if len(ranks) > 1 else ""
        asked = f"--kv-tokens {tokens}" if tokens is not None else f"{KV_TOKENS_ON_CPU} tokens"
        most = (share // page - 1) * PAGE
        raise ValueError(
            f"{asked}: a KV pool of {size:,} bytes ({_gib(size)} GiB) is over the {_gib(min(ranks))} GiB of memory "
            f"that are available{among}; " + (f"--kv-tokens can be at most {most}" if most > 0 else "no page fits")
        )
    return pages


def host_memory() -> int:
    """Bytes that this machine can still give; where it does not say, all that it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_parts(
    model: Transformer,
    job: Job,
    buffers: int,
    buckets: Sequence[int],
    max_tokens_per_step: int,
    max_model_len: int,
    longest: int,
    captures: bool,
    spare_layers: int = 0,
    handoff: int = 0,
) -> dict[str, int]:
    """The table's rows without KV, in bytes. `buckets`: rows of decode steps; `longest`: tokens of KV that a request
    can have, which is what the one prompt that does not begin in a step can see beside the step's own tokens;
    `spare_layers`: whose experts may be on their way at once (`disagg/rebalance.py`); `handoff`: bytes of the buffers
    of KV that is on its way (`disagg/handoff/credits.py`)."""
    tokens = -(-max_tokens_per_step // job.attn_tp) * job.attn_tp
    most = max(buckets)
    steps = (
        contiguous_step(job, tokens, tokens + longest, most), masked_step(job, most), sampling(job.config, most)
    )  # fmt: skip
    weights, placement = weight_bytes(model), model.placement
    maps = placement.slot_of_expert.nbytes + placement.expert_of_slot.nbytes
    return weights | {
        "spare experts": spare_layers * weights["routed experts"] // max(job.config.num_moe_layers, 1),
        "tables": table_bytes(job.config, maps, max_model_len, most),
        "communication buffers": buffers,
        "KV handoff": handoff,
        "activations": max(steps),
        "CUDA graphs": graphs(job, buckets) if captures else 0,
        "cuBLAS workspaces": WORKSPACES,
    }


def claim_memory(mesh: Mesh, parts: dict[str, int], page: int, buffers: int, fraction: float) -> Budget:
    """This rank's share of what its GPU has free now, after the weights were made. From here on torch keeps to it
    (until `lift_limit`). All ranks of the job together."""
    sharers = mesh.ranks_on_my_gpu()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(mesh.device)
    held = torch.cuda.memory_reserved(mesh.device) + buffers
    torch.cuda.set_per_process_memory_fraction(share_of_torch(total, buffers, fraction, sharers), mesh.device.index)
    return Budget(*share_of_gpu(total, free, held, fraction, sharers), parts, page)


def lift_limit(device: torch.device) -> None:
    """Torch may have the whole GPU again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
