"""The memory table: its parts equal the code's allocations, the rest is the KV pool, and refusals give the reason."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from disagg.budget import GIB, WORKSPACES, Budget, plan_parts, share_of_gpu
from disagg.captures import Captures
from disagg.config import EngineConfig, Rebalance
from disagg.engine import Engine
from disagg.memory import budget_of_all, host_memory, pages_on_host, share_of_torch
from disagg.request import Request
from disagg.sampler import process, sampling_rows
from disagg.scheduler import Sequence
from kernels.ops import Ops
from model.batch import Batch, Chunk, split
from model.config import ModelConfig
from model.footprint import (
    StepShape,
    contiguous_step,
    drafting,
    graphs,
    masked_step,
    page_bytes,
    room_for_context,
    sampling,
    weight_bytes,
)
from model.kv_cache import make_pool
from model.pages import PAGE
from model.prompt_logprobs import PromptLogprobs
from model.prompt_row import MAX_LOGPROBS
from model.sampling import SamplingRows, sample
from model.transformer import Transformer
from parallel.copies import grouped_rows, most_copies
from parallel.dispatchers import plain_dispatchers
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from scripts.bench.one_rank.loopback import LoopbackContiguous
from scripts.bench.one_rank.simulated_load import SimulatedLoad
from tests.tracing import FakeGroup, Peak, allocating_ops

V3 = ModelConfig(  # DeepSeek-V3's widths, of each kind of layer two
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=4,
    num_attention_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    q_lora_rank=1536, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=2,
)  # fmt: skip
SMALL = replace(
    V3, vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_attention_heads=8,
    q_lora_rank=384, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1,
)  # fmt: skip


def make(config: ModelConfig, ranks: int = 1, attn_tp: int = 1, dtype: torch.dtype = torch.bfloat16, fp8: bool = False,
         device: str = "cpu") -> Transformer:  # fmt: skip
    attn, ep = (FakeGroup(size) if size > 1 else Group() for size in (attn_tp, ranks))
    mesh = Mesh(0, ranks, torch.device(device), attn, ep)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, ranks)
    return Transformer(config, mesh, placement, allocating_ops(128), dtype, 64, fp8)


def test_parts_of_v3_are_known_sums() -> None:
    """On one of 32 ranks, in bf16. Attention: q_a and kv_a, q_b, kv_b, o; then three matrices for each FFN."""
    parts = weight_bytes(StepShape(V3, 2, ranks=32, slots=8))
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    assert parts == {
        "attention": 2 * 4 * attention,
        "dense FFN": 2 * 2 * 3 * 18432 * 7168,
        "shared experts": 2 * 2 * 3 * 2048 * 7168,
        "routed experts": 2 * 2 * 8 * 3 * 2048 * 7168,
        "gates and norms": 2 * (4 * (2 * 7168 + 1536 + 512) + 7168) + 2 * (2 * 256 * 7168 + 4 * 256),
        "embedding": 2 * 129280 * 7168,
        "LM head": 2 * 129280 * 7168,
    }


def parameter_bytes(model: Transformer) -> dict[str, int]:
    """The bytes of a built model's parameters, by the parts' names."""
    homes = {"mtp.": "draft layer", "norm": "gates and norms", "gate.": "gates and norms", "self_attn": "attention"}
    homes |= {"shared_experts": "shared experts", "experts": "routed experts"}
    homes |= {"embed_tokens": "embedding", "lm_head": "LM head", "mlp": "dense FFN"}
    parts = dict.fromkeys(list(homes.values())[0 if model.config.drafts else 1 :], 0)
    for name, weight in model.named_parameters():
        parts[next(part for piece, part in homes.items() if piece in name)] += weight.numel() * weight.element_size()
    return parts


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("ranks", "attn_tp"), [(1, 1), (4, 2)])
def test_parts_are_the_parameters(tiny: str, ranks: int, attn_tp: int, fp8: bool) -> None:
    shared, small = replace(V3, n_shared_experts=2, q_lora_rank=None), ModelConfig.from_pretrained(tiny)
    bare, dense = replace(V3, n_shared_experts=0, first_k_dense_replace=0), replace(V3, first_k_dense_replace=9)
    biasless = replace(V3, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
    drafts = [replace(config, drafts=True) for config in (V3, shared, bare)]
    for config in [V3, shared, bare, dense, biasless, *drafts, *([] if fp8 else [small, small.drafting()])]:
        model = make(config, ranks, attn_tp, fp8=fp8, device="meta")
        shape = StepShape(config, 2, fp8, attn_tp, ranks, config.n_routed_experts // ranks)
        assert weight_bytes(shape) == parameter_bytes(model)
    assert all(weight_bytes(replace(shape, config=V3, slots=9)).values())


def test_a_page_is_what_the_pool_takes() -> None:
    pool = make_pool(V3, 3, torch.bfloat16, "meta")
    assert pool.nbytes == 3 * page_bytes(V3, 2) == 3 * 4 * 64 * 576 * 2
    drafting = replace(V3, drafts=True)
    assert make_pool(drafting, 3, torch.bfloat16, "meta").nbytes == 3 * page_bytes(drafting, 2) == 3 * 5 * 64 * 576 * 2


@pytest.mark.parametrize(
    ("copies", "groups", "alignment", "want"),
    [(0, 8, 128, 0), (1, 8, 128, 128), (5, 8, 128, 5 * 128), (1000, 8, 1, 1000), (1024, 8, 128, 15 * 128)],
)
def test_padding_at_its_worst(copies: int, groups: int, alignment: int, want: int) -> None:
    """1,024 copies: seven groups of one row each take seven blocks, the other 1,017 rows eight."""
    assert grouped_rows(copies, groups, alignment) == want


HAND = StepShape(  # D 512, H 8, I 256, K 4, dense 1,024
    SMALL, itemsize=2, slots=16, alignment=128
)


def test_prefill_by_hand() -> None:
    """4,096 tokens on 9,000 of context. The experts: 16,384 copies, and 16 x 127 rows of padding: 18,304 in 128s."""
    rows = 18304
    layer = 3 * 4096 * 512 * 2  # x, its operand, and the shared expert's part
    routing = 4096 * 4 * (8 + 4) + rows * 4  # rows and weights of copies; each row's expert
    combine = rows * 512 * 2 + 4096 * 512 * 2  # the output, what comes back
    experts = layer + routing + rows * (512 + 2 * 256) * 2  # arrived, and gate and up of it
    queries = 512 + 8 * 192  # of a token: x, q
    context = 576 + 8 * 256  # of a token: the cache's row; k_nope and v
    attention = 4096 * (queries + 8 * 128) * 2 + 9000 * (context * 2 + 8)
    assert layer + routing + combine < experts < attention
    assert contiguous_step(HAND, 4096, 9000, 64) == attention
    whole = replace(HAND, whole_keys=True)  # nope and rope of every head in one piece
    assert contiguous_step(whole, 4096, 9000, 64) == attention + 9000 * 8 * 192 * 2
    many = replace(HAND, config=replace(SMALL, num_experts_per_tok=8))
    rows = 34688  # 32,768 + 16 x 127, in 128s
    experts = layer + 4096 * 8 * 12 + rows * 4 + rows * (512 + 2 * 256) * 2
    assert contiguous_step(many, 4096, 5000, 64) == experts
    room = room_for_context(many, 4096, 5000, 64)
    assert contiguous_step(many, 4096, room, 64) <= experts < contiguous_step(many, 4096, room + 1, 64)
    assert room_for_context(HAND, 4096, 9000, 64) == 9000, "attention makes the peak"


def test_room_for_context_ends_where_kernels_cannot_count() -> None:
    """DeepSeek-V3's prefill on 32 ranks: keys and values of 128 heads, 256 columns each."""
    job = StepShape(V3, 2, fp8=True, ranks=32, slots=9, alignment=128)
    assert room_for_context(job, 16384, 16384 + 4096, 256) == (2**31 - 1) // (128 * 256) == 65535
    assert room_for_context(job, 16384, 100_000, 256) == 100_000


def test_prefill_by_hand_over_the_wire_in_fp8() -> None:
    """Two ranks of 2,048 tokens, all of whose 4 copies come to my 8 experts. Row on the wire: fp8, 4 scales, 4 ids and
    4 weights: 512 + 16 + 32 bytes."""
    job = replace(HAND, fp8=True, ranks=2, slots=8)
    rows = 4 * 4096 + 8 * 127 - (4 * 4096 + 8 * 127) % 128
    layer = 2 * 2048 * 512 * 2 + 2048 * 528  # x, shared; the operand in fp8
    routing = 2048 * 4 * 8 + rows * 4 + 4096 * 4 * 12
    wire = (2048 + 2 * 4096) * (512 + 16 + 32)  # sent, received, and that in columns, before anything else
    arrived, back = rows * 528, (4096 + 2048) * 512 * 2
    gate_up, hidden, output = rows * 2 * 256 * 2, rows * (256 + 8), rows * 512 * 2
    most = max(arrived + gate_up, gate_up + hidden, hidden + output, output + back)
    assert wire < routing + most == routing + arrived + gate_up
    assert contiguous_step(job, 2048, 2048, 64) == layer + routing + most


def test_prefill_by_hand_in_slices() -> None:
    """Eight ranks of 2,048 tokens, all of whose 4 copies come to my 4 experts: 65,536, eight times the mean. At most
    twice the mean, 16,384, are grouped at once: the copies of 4,096 of the 16,384 tokens."""
    job = replace(HAND, fp8=True, ranks=8, slots=4)
    rows = 16384 + 4 * 127 - (16384 + 4 * 127) % 128
    layer, routing = 2 * 2048 * 512 * 2 + 2048 * 528, 2048 * 4 * 8 + 16384 * 4 * 12
    columns, sums = 16384 * 528, 16384 * 512 * 2  # of all tokens
    one = rows * 4 + 4096 * 4 * 8  # whose expert each of a slice's rows is, and where each copy went
    inside = max(rows * (528 + 2 * 2 * 256), (rows + 4096) * 512 * 2)
    assert contiguous_step(job, 2048, 2048, 64) == layer + routing + columns + sums + one + inside


def test_deepseek_v3s_prefill_fits() -> None:
    """16,384 tokens on each of 32 ranks of 9 experts, whatever the routing; nearly 130 GiB if all were grouped at once.
    A rank's weights take under 40 GiB of the 72 GiB that it may use of an 80 GB GPU."""
    config = replace(V3, num_hidden_layers=61, first_k_dense_replace=3)
    job = StepShape(config, 2, fp8=True, ranks=32, slots=9, alignment=128)
    assert 15 * GIB < contiguous_step(job, 16384, 16384 + 4096, 256) < 20 * GIB


def test_decode_by_hand() -> None:
    """256 tokens: each of the 16 experts has a room for all of them, with its rows, the first product and silu_mul."""
    job = replace(HAND, config=replace(SMALL, kv_lora_rank=64))
    layer, routing = 3 * 256 * 512 * 2, 256 * 4 * 12 + 16 * 256 * 4
    assert masked_step(job, 256) == layer + routing + 16 * 256 * (512 + 3 * 256) * 2
    small = 3 * 128 * 512 * 2 + 128 * 4 * 12 + 16 * 128 * 4  # rooms in which one kernel makes silu_mul
    assert masked_step(job, 128) == small + 16 * 128 * (512 + 256) * 2
    deepep = replace(job, ranks=2, slots=8, capacity=300)  # rooms for what two ranks may ever send
    rows, routing = 8 * 2 * 300, 256 * 4 * 8 + 8 * 2 * 300 * 4 + 256 * 4 * 12
    assert masked_step(deepep, 256) == layer + routing + rows * (512 + 3 * 256) * 2


def test_prompts_take_what_the_all_to_all_takes_where_deepep_serves_decode_steps_alone() -> None:
    deepep = replace(HAND, ranks=4, slots=1, capacity=300)
    mixed, plain = replace(deepep, normal=False), replace(deepep, capacity=None)
    assert masked_step(mixed, 1024) == masked_step(replace(mixed, normal=True), 1024)
    sizes = [contiguous_step(shape, 16384, 16384, 1) for shape in (deepep, mixed, plain)]
    assert sizes[0] < sizes[1] == sizes[2]


def test_graphs_share_their_memory_and_keep_the_targets_output_alone() -> None:
    """The largest is captured first, so the others fit into its memory. No graph has logits of its own."""
    job = replace(HAND, config=replace(SMALL, kv_lora_rank=64))
    for vocabulary in (2048, 100_000):
        one = replace(job, config=replace(job.config, vocab_size=vocabulary))
        assert masked_step(one, 128) < masked_step(one, 256) == graphs(one, [128, 256]) - 2 * 4 * 30 * 2048
    # With two drafts a bucket has four graphs: the target's over 3 tokens a row, one that fills, and two that draft.
    output, steps = 128 * 512 * 2, [masked_step(job, rows) for rows in (128, 256, 384)]
    assert steps[0] + 3 * output < steps[2]
    assert graphs(job, [128], (2,)) == steps[2] + (4 + 2 + 1) * 30 * 2048
    # With zero to two, the target's over 2 tokens and over 1, too, and two more that fill.
    assert graphs(job, [128], range(3)) == steps[2] + (3 * 4 + 2 + 3) * 30 * 2048
    # Where buckets are nearly equal, the last one's step is beside the outputs of the others.
    assert masked_step(job, 381) + 3 * output > masked_step(job, 384)
    assert graphs(job, [127, 128], (2,)) == masked_step(job, 381) + 3 * output + 2 * 7 * 30 * 2048


def test_graphs_of_prompts_share_what_goes_in_and_comes_out() -> None:
    """And the pool of those that decode. The larger of two contexts may make the peak."""
    job = replace(HAND, ranks=1, slots=16, config=replace(SMALL, kv_lora_rank=64))
    kernels, shared = 4 * 30 * 2048, 256 * (512 * 2 + 3 * 8)
    layers = graphs(job, [], prompts=[(256, 256)]) - kernels - shared - 256 * 8
    assert 0 < layers <= contiguous_step(job, 256, 256, 1)
    assert graphs(job, [], prompts=[(64, 64), (256, 256)]) == layers + 2 * kernels + shared + 256 * 8
    wide = graphs(job, [], prompts=[(256, 256), (256, 65536)])
    assert wide - 2 * kernels - shared - 65536 * 8 > 65536 * (64 + 2 * 128) * 2 > layers
    decodes = graphs(job, [512])
    assert decodes - kernels > layers, "the pool is that of the larger"
    assert graphs(job, [512], prompts=[(256, 256)]) == decodes + kernels + shared + 256 * 8


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("ranks", "attn_tp"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_formulas_follow_the_code(ranks: int, attn_tp: int, fp8: bool) -> None:
    """Within 1 % of the tensors that the model's code has alive at once, whichever part of a layer is the largest."""
    latent = {"kv_lora_rank": 64, "moe_intermediate_size": 512, "n_routed_experts": 32, "vocab_size": 256}
    cases = {
        "experts": ({}, 1024, 1024, 64),
        "no q_lora": ({"q_lora_rank": None, "n_shared_experts": 2}, 1024, 1024, 64),
        "long context": ({"num_experts_per_tok": 1}, 1024, 9000, 64),
        "dense": ({"intermediate_size": 8192, "num_experts_per_tok": 1}, 1024, 1024, 64),
        "more wanted than there are": ({"n_routed_experts": max(4, ranks)}, 1024, 1024, 64),
        "decode, wide experts": (latent, 512, 512, 512),
        "decode, wide rows": (latent | {"hidden_size": 2048, "moe_intermediate_size": 128}, 512, 512, 512),
        "decode, few experts": (
            latent | {"hidden_size": 2048, "moe_intermediate_size": 128, "n_routed_experts": max(4, ranks)},
            64,
            64,
            64,
        ),
        "logits": ({"vocab_size": 50_000}, 512, 512, 512),
        "prompts' log probabilities": ({"vocab_size": 20_000}, 512, 512, 4),
    }
    for name, (changes, tokens, context, most) in cases.items():
        config, scores = replace(SMALL, **changes), name in ("logits", "prompts' log probabilities")
        net = make(config, ranks, attn_tp, fp8=fp8)
        contiguous, masked = plain_dispatchers(
            Group() if ranks == 1 else FakeGroup(ranks), net.placement.num_slots, net.ops,
            most_copies(tokens // attn_tp, config.num_experts_per_tok),
        )  # fmt: skip
        job = StepShape(config, 2, fp8, attn_tp, ranks, net.placement.slots_per_rank, 128)
        ids, rows = torch.zeros(tokens).long(), torch.zeros(context).long()
        logits = torch.empty(most, config.vocab_size)  # where those of all steps go, which no step's size has
        bounds = torch.zeros(2)
        # With one decode among the prompts, prefill attention is at its largest, and with many that of the decodes.
        mixed = [
            Batch(ids, ids, ids + PAGE, torch.zeros(n, 2).int(), torch.ones(n).int(), bounds, bounds, rows, ids[:most],
                  tokens, context) for n in (1, most)
        ]  # fmt: skip
        prompt = Chunk([0] * tokens, 0, [], targets=[0] * tokens, top=MAX_LOGPROBS)
        decode = Batch.decode(ids[:most], ids[:most], torch.ones(most, 2, dtype=torch.int32))
        pool = make_pool(config, 2, torch.bfloat16, "cpu")
        for batches, dispatcher, prompts, want in (
            (mixed, contiguous, [prompt], contiguous_step(job, tokens, context, most)),
            ([decode], masked, [], masked_step(job, most)),
        ):
            peaks = []
            for batch in batches:
                with Peak() as peak:
                    scored = PromptLogprobs(prompts, "cpu") if scores and prompts else None
                    net.head(net.body(batch, pool, dispatcher, scored=scored), batch, logits)
                peaks.append(peak.most)
            assert want == pytest.approx(max(peaks), rel=0.01), f"{name}: {len(batches)=}"


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("ranks", "attn_tp"), [(1, 1), (4, 2)])
def test_drafting_fits_beside_the_step(ranks: int, attn_tp: int, fp8: bool) -> None:
    """What a step that verifies and drafts has alive at once, as `disagg/speculation.py` runs them."""
    for name, config, tokens in (
        ("wide experts", replace(SMALL, kv_lora_rank=64, n_routed_experts=32, drafts=True), 1024),
        ("wide rows", replace(SMALL, hidden_size=4096, moe_intermediate_size=128, kv_lora_rank=64, drafts=True), 256),
    ):
        net, group = make(config, ranks, attn_tp, fp8=fp8), Group() if ranks == 1 else FakeGroup(ranks)
        contiguous, masked = plain_dispatchers(
            group, net.placement.num_slots, net.ops, most_copies(tokens // attn_tp, config.num_experts_per_tok)
        )
        job = StepShape(config, 2, fp8, attn_tp, ranks, net.placement.slots_per_rank, 128)
        pool, ids = make_pool(config, 2, torch.bfloat16, "cpu"), torch.zeros(tokens).long()
        logits = torch.empty(tokens, config.vocab_size)
        prompt = Batch.build([], [Chunk([0] * 64, 0, [1])] * (tokens // 64), "cpu")
        table = torch.ones(tokens // 4, 2, dtype=torch.int32)
        for batch, dispatcher, step, rows in (
            (prompt, contiguous, contiguous_step(job, tokens, tokens, 64), tokens // 64),
            (Batch.decode(ids, ids, table), masked, masked_step(job, tokens), tokens // 4),
        ):
            with Peak() as peak:
                hidden = net.head.norm(net.body(batch, pool, dispatcher))
                net.head.project(hidden if batch.logit_rows is None else hidden[batch.logit_rows], logits)
                net.fill_draft(hidden, batch, pool)
                latest = hidden[:rows]
                del hidden
                net.draft(latest, Batch.decode(ids[:rows], ids[:rows], table[:rows]), pool, dispatcher)
            assert peak.most <= 1.01 * drafting(job, tokens, step) <= 1.15 * peak.most, name


def test_two_micro_batches_take_little_over_half() -> None:
    """DeepSeek-V3's proportions at a seventh, prompts on one of 32 ranks of 9 experts: the peak is that of a half's
    experts."""
    config = replace(
        V3, vocab_size=1024, hidden_size=1024, intermediate_size=2560, moe_intermediate_size=256, q_lora_rank=256,
        num_attention_heads=18, kv_lora_rank=128,
    )  # fmt: skip
    net, tokens = make(config, fp8=True), 1024
    arriving = lambda count: (SimulatedLoad.even(count, 32, 8, 288, distinct=0.2),)  # noqa: E731
    like = net.ops.quantize_1x128(torch.zeros(1, 1024, dtype=torch.bfloat16))
    loopback = LoopbackContiguous(arriving, tokens, 1024, 8, net.ops, like)
    prompt = Chunk([1] * tokens, 0, range(1, 1 + tokens // PAGE))
    whole = Batch.build([], [prompt], "cpu")
    halves = tuple(Batch.build(*half, "cpu") for half in split([], [prompt]))
    pool = make_pool(config, 1 + tokens // PAGE, torch.bfloat16, "cpu")

    def peak(halves: tuple[Batch, Batch] | None) -> int:
        net(whole, pool, loopback, halves)  # what the loopback makes once
        with Peak() as counted:
            net(whole, pool, loopback, halves)
        return counted.most

    assert peak(halves) < 0.6 * peak(None)


def test_sampling_has_room() -> None:
    rows, vocab = 16, 5000
    logits = torch.randn(rows, vocab)
    parameters = SamplingRows.build([(0.9, 0.95, 50, 1, 10)] * rows, "cpu")
    with Peak() as peak:
        sample(logits, parameters)
    assert peak.most < sampling(replace(SMALL, vocab_size=vocab), rows) < 2 * peak.most
    fields = {"presence_penalty": 1.0, "repetition_penalty": 2.0, "min_p": 0.1, "temperature": 0.9}
    sequences = [Sequence(Request(0, [1], **fields), (2,), [1, 3, 3]) for _ in range(rows)]
    for sequence in sequences:
        sequence.computed = 3
    with Peak() as more:  # in the same room: the processors' tensors are gone when a token is sampled
        mine = logits[torch.arange(rows)]
        process(mine, sequences, torch.full((rows,), 3))
        sample(mine, sampling_rows(sequences, torch.device("cpu")))
    assert more.most < sampling(replace(SMALL, vocab_size=vocab), rows)


def test_the_table_of_a_plan() -> None:
    longest = {"max_model_len": 512, "longest": 512}
    parts = plan_parts(HAND, 5000, [1, 2, 64], 1000, **longest, captures_decodes=False, handoff=70)
    assert parts["communication buffers"] == 5000 and parts["cuBLAS workspaces"] == WORKSPACES
    assert parts["KV handoff"] == 70
    assert parts["tables"] == 512 * 64 * 4 + 64 * 8 * 4 + 2 * 2 * 16 * 8
    assert parts["logits"] == 64 * 2048 * 4
    assert parts["activations"] == contiguous_step(HAND, 1000, 1512, 64)
    assert parts["CUDA graphs"] == parts["spare experts"] == 0


def test_a_plan_that_drafts_has_room_for_them() -> None:
    """One whose logits are the largest part: 3 rows of them for each of 64 sequences, beside the model's output."""
    shape = replace(HAND, config=replace(SMALL, vocab_size=100_000, drafts=True))
    parts = plan_parts(shape, 0, [1, 64], 1000, 512, 512, captures_decodes=True, drafts=(2,))
    assert parts["logits"] == 3 * 64 * 100_000 * 4
    assert parts["activations"] == sampling(shape.config, 3 * 64) + 1000 * 512 * 2
    assert parts["CUDA graphs"] == graphs(shape, [1, 64], (2,)) > graphs(shape, [1, 64])
    prefill = plan_parts(shape, 0, [1, 64], 1000, 512, 512, captures_decodes=False, drafts=(2,), decodes=False)
    assert prefill["logits"] == 64 * 100_000 * 4, "no step verifies"
    assert prefill["activations"] == sampling(shape.config, 64) + 1000 * 512 * 2


def test_spare_experts_are_what_the_rebalancer_makes(tiny: str) -> None:
    """Of two layers of slots; of V3 in fp8 an expert is 44 MB."""
    config = ModelConfig.from_pretrained(tiny)
    settings = EngineConfig(
        kv_tokens=1024, max_model_len=64, redundant_experts=4, rebalance=Rebalance(1, layers_per_step=2)
    )
    engine = Engine.from_pretrained(settings, config, tiny, Mesh(), Ops())
    spare = engine.rebalancer.spare
    job = StepShape(config, 4, slots=36)
    parts = plan_parts(job, 0, [1], 64, 64, 64, captures_decodes=False, spare_layers=2)
    identities = 2 * 36 * 8
    assert parts["spare experts"] + identities == sum(tensor.nbytes for tensor in spare.tensors.values())
    engine.close()
    v3 = StepShape(V3, 2, True, ranks=64, slots=4)
    parts = plan_parts(v3, 0, [1], 64, 64, 64, captures_decodes=False, spare_layers=1)
    assert parts["spare experts"] == 4 * 3 * 7168 * 2048 * (1 + 4 / 128**2)


def test_a_closed_engine_can_be_collected(tiny: str) -> None:
    config = ModelConfig.from_pretrained(tiny)
    engine = Engine.from_pretrained(EngineConfig(kv_tokens=1024, max_model_len=64), config, tiny, Mesh(), Ops())
    pool = weakref.ref(engine.pool)
    gc.freeze()  # as warm_up does on a GPU
    engine.close()
    del engine
    gc.collect()
    assert pool() is None


BUDGET = Budget(10 * GIB, "0.5 x 20", {"attention": 2 * GIB, "dense FFN": 0, "activations": 3 * GIB}, page=GIB // 4)


def test_what_is_left_is_kv() -> None:
    """5 GiB are 20 pages, one of them the null page."""
    assert (BUDGET.left, BUDGET.most_pages) == (5 * GIB, 19)
    assert BUDGET.pages(None) == BUDGET.pages(19 * 64) == 19
    assert BUDGET.pages(64) == BUDGET.pages(127) == 1
    assert replace(BUDGET, available=10 * GIB - 1).pages(None) == 18


def test_the_table_is_aligned() -> None:
    assert BUDGET.table(18).splitlines() == [
        "     memory:      GiB",
        "  attention:    2.000",
        "  dense FFN:    0.000",
        "activations:    3.000",
        "         KV:    4.750  18 pages, 1,152 tokens",
        "   together:    9.750",
        "      limit:   10.000  0.5 x 20",
    ]


def test_too_small_says_the_equation() -> None:
    with pytest.raises(ValueError) as error:
        BUDGET.pages(20 * 64)
    assert str(error.value) == (
        "GPU memory: attention 2.000 + activations 3.000 + KV 5.250 (--kv-tokens 1280) = 10.250 GiB is over "
        "0.5 x 20 = 10.000 GiB; raise --gpu-memory-fraction, or lower --kv-tokens (to at most 1216), "
        "--max-tokens-per-step, --max-batch or --max-model-len"
    )
    none = replace(BUDGET, available=5 * GIB)
    for tokens, asked in ((None, "the least: a page and the null page"), (64, "--kv-tokens 64")):
        with pytest.raises(ValueError) as error:
            none.pages(tokens)
        assert f"KV 0.500 ({asked}) = 5.500 GiB is over 0.5 x 20 = 5.000 GiB" in str(error.value)
        assert "lower --max-tokens-per-step" in str(error.value)
    assert replace(BUDGET, available=GIB).most_pages == 0


def test_a_share_of_a_gpu() -> None:
    total = 80 * GIB
    assert share_of_gpu(total, 60 * GIB, 15 * GIB, 0.5, 1) == (40 * GIB, "--gpu-memory-fraction 0.5 x 80.000")
    assert share_of_gpu(total, 40 * GIB, 15 * GIB, 0.5, 2) == (20 * GIB, "--gpu-memory-fraction 0.5 x 80.000 / 2 ranks")
    taken = share_of_gpu(total, 10 * GIB, 15 * GIB, 0.5, 2)  # others have 40
    assert taken == (20 * GIB, "--gpu-memory-fraction 0.5 x 80.000 / 2 ranks")
    taken = share_of_gpu(total, 6 * GIB, 15 * GIB, 0.5, 2)
    assert taken == (18 * GIB, "free 6.000 / 2 ranks + 15.000 that this rank has taken")


class Hosts(Group):
    """Ranks of which two are on my GPU; the one beside me has a GiB less left."""

    def exchange(self, item: Any, kind: Any) -> list[Any]:
        if isinstance(item, Budget):
            return [item, replace(item, available=item.available - GIB)]
        return [item, item, "another", "and another"]


def test_ranks_that_share_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.mesh.gpu_id", lambda device: f"GPU {device.index}")
    assert Mesh(0, 4, torch.device("cuda", 0), ep=Hosts(4)).ranks_on_my_gpu() == 2
    assert Mesh(device=torch.device("cuda", 0)).ranks_on_my_gpu() == 1


@pytest.mark.parametrize(("sharing", "free", "left"), [(False, 79, 40), (True, 79, 20), (True, 30, 17)])
def test_an_engine_takes_its_share(
    tiny: str, sharing: bool, free: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a GPU of 80 GiB, shared or not; what others took of it counts; the fullest rank decides."""
    monkeypatch.setattr("parallel.mesh.gpu_id", lambda device: "mine")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    config = ModelConfig.from_pretrained(tiny)
    settings = EngineConfig(kv_tokens=1024, max_model_len=512, gpu_memory_fraction=0.5)
    engine = Engine.from_pretrained(settings, config, tiny, Mesh(), Ops())
    mesh = Mesh(device=torch.device("cuda", 0), ep=Hosts(5) if sharing else Group())
    budget = budget_of_all(settings, engine.model, mesh, engine.dispatchers, [1, 2, 64], Captures(False, (), ""), 0)
    assert budget.available == (left - sharing) * GIB
    assert sum(budget.parts.values()) < GIB / 2
    assert budget.most_pages == (budget.available - sum(budget.parts.values())) // (5 * 64 * 80 * 4) - 1
    assert limits == [(0.375 if sharing else 0.75, 0)]


def test_torch_leaves_room_for_others() -> None:
    assert share_of_torch(80 * GIB, 4 * GIB, 0.9, 1) == pytest.approx(0.95 - 0.05)
    assert share_of_torch(80 * GIB, 4 * GIB, 0.9, 2) == pytest.approx(0.475 - 0.05)
    assert share_of_torch(80 * GIB, 0, 1.0, 1) == 1
    assert share_of_torch(80 * GIB, 60 * GIB, 0.2, 1) == 0


def test_flags_are_checked() -> None:
    for fraction in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"--gpu-memory-fraction is .*; it must be in \(0, 1\]"):
            EngineConfig(gpu_memory_fraction=fraction)
    with pytest.raises(ValueError, match="--kv-tokens is 63; it must be at least a page of 64"):
        EngineConfig(kv_tokens=63)
    assert EngineConfig(gpu_memory_fraction=1.0, kv_tokens=64).kv_tokens == 64


def test_a_cpu_has_a_pool_of_fixed_size(tiny: str) -> None:
    config, mesh = ModelConfig.from_pretrained(tiny), Mesh()
    for tokens, said in (
        (None, ["        KV: 1,024 pages, 65,536 tokens"]),
        (700, ["        KV: 10 pages, 640 tokens", "warning: the longest request is 640 tokens, all that the KV pool "
               "holds, under max_model_len (2048)"]),
    ):  # fmt: skip
        lines = []
        engine = Engine.from_pretrained(EngineConfig(kv_tokens=tokens), config, tiny, mesh, Ops(), lines.append)
        assert lines == said
        assert engine.pool.shape[1] == engine.kv_tokens // PAGE + 1


def test_a_pool_over_a_machines_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a GiB; beside me on this machine a rank that sees 10 GiB, elsewhere one alone that sees 6."""
    monkeypatch.setattr("disagg.memory.host_memory", lambda: 10 * GIB)
    assert pages_on_host(Mesh(), 9 * 64, GIB) == 9
    with pytest.raises(ValueError) as error:
        pages_on_host(Mesh(), 10 * 64, GIB)
    assert str(error.value) == (
        "--kv-tokens 640: a KV pool of 11,811,160,064 bytes (11.000 GiB) is over the 10.000 GiB of memory that are "
        "available; --kv-tokens can be at most 576"
    )

    class Machines(Group):
        def exchange(self, item: Any, kind: Any) -> list[Any]:
            return [item, item, ("elsewhere", 6 * GIB)]

    mesh = Mesh(0, 3, ep=Machines(3))
    assert pages_on_host(mesh, 4 * 64, GIB) == 4
    with pytest.raises(ValueError, match=r"10\.000 GiB of memory that are available / 2 ranks = 5\.000 GiB; .* 256"):
        pages_on_host(mesh, 5 * 64, GIB)
    with pytest.raises(ValueError, match="^65536 tokens: a KV pool of .* no page fits"):
        pages_on_host(Mesh(), None, 6 * GIB)


def test_the_host_says_what_it_has() -> None:
    assert 2**20 < host_memory() < 2**50
