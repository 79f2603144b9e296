"""Every op of kernels/ref.py equals an independent formulation, and undefined memory (NaN here) reaches no result."""

import math
import random
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kernels import ref
from kernels.groups import Groups, check_groups

NAN = float("nan")


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(5, 3, 24) * 3, torch.rand(24) + 0.5
    assert_close(ref.rms_norm(x, weight, 0.1), F.rms_norm(x, (24,), weight, 0.1))
    half = x.bfloat16()
    assert ref.rms_norm(half, weight.bfloat16(), 1e-6).dtype == torch.bfloat16
    tiny = torch.full((1, 24), 1e-4).half()  # its square is 0 in float16
    assert_close(ref.rms_norm(tiny, torch.ones(24).half(), 0.0), torch.ones(1, 24).half(), atol=2e-3, rtol=0)


def test_add_rms_norm_norms_the_rounded_sum() -> None:
    """And leaves both terms alone."""
    x, residual, weight = torch.randn(5, 24).bfloat16(), torch.randn(5, 24).bfloat16() * 50, torch.rand(24).bfloat16()
    before = x.clone(), residual.clone()
    normed, total = ref.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual) and total.dtype == torch.bfloat16
    assert_close(normed, F.rms_norm((x + residual).float(), (24,), weight.float(), 1e-6).bfloat16(), rtol=2e-2, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_linear_float32_rounds_nothing_and_fills_the_rows_that_it_is_given() -> None:
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(7, 40).bfloat16()
    want = torch.einsum("td,nd->tn", x.double(), weight.double()).float()
    assert_close(ref.linear_float32(x, weight), want)
    room = torch.full((4, 7), NAN)
    out = ref.linear_float32(x, weight, room[:3])
    assert out.data_ptr() == room.data_ptr() and room[3].isnan().all()
    assert_close(room[:3], want)


@pytest.mark.parametrize("dim", [128, 384])
def test_rms_norm_quant_quantises_what_the_norm_gives(dim: int) -> None:
    x, residual = torch.randn(2, 5, 3, dim).bfloat16()
    weight = torch.rand(dim).bfloat16() + 0.5
    residual[1] = -x[1]  # the smallest scale
    normed, values, scales, total = ref.add_rms_norm_quant(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    for a, b in zip((normed, values, scales), ref.rms_norm_quant(total, weight, 1e-6), strict=True):
        assert torch.equal(a.float(), b.float())
    assert torch.equal(normed, ref.rms_norm(total, weight, 1e-6))
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (5, 3, dim // 128)
    groups = normed.float().unflatten(-1, (-1, 128))
    assert_close(scales, groups.abs().amax(-1).clamp(min=1e-4) / 448)
    error = values.float().unflatten(-1, (-1, 128)) * scales[..., None] - groups
    assert (error.abs() <= groups.abs() / 15.9 + scales[..., None] * 2**-10).all()


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """The last dim of x [T, H, R] in interleaved pairs as complex numbers, turned by angles [T, R / 2]."""
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def test_rope_turns_interleaved_pairs_as_complex_numbers() -> None:
    q, angles = torch.randn(7, 4, 8), torch.rand(7, 4) * 10
    assert_close(ref.rope(q, angles.cos(), angles.sin()), turned(q, angles))
    assert_close(ref.rope(q[:, 0], angles.cos(), angles.sin()), turned(q, angles)[:, 0])


def test_rope_of_a_query_turns_its_last_columns_and_no_other() -> None:
    wide, table, positions = torch.randn(7, 3, 20), torch.rand(30, 4) * 10, torch.randint(30, (7,))
    q, before = wide[..., 2:15], wide.clone()  # 5 + 8 of 20 columns
    want = turned(before[..., 7:15], table[positions])
    ref.rope_query(q, table.cos(), table.sin(), positions, 8)
    assert_close(wide[..., 7:15], want)
    wide[..., 7:15] = before[..., 7:15]
    assert torch.equal(wide, before)


def test_absorbed_attention_scores_as_the_expanded_one_does() -> None:
    q, w_uk, w_uv = torch.randn(7, 3, 5 + 8), torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    table, positions, latent = torch.rand(30, 4) * 10, torch.randint(30, (7,)), torch.randn(7, 3, 6)
    absorbed = ref.absorb_query(q, w_uk, table.cos(), table.sin(), positions)
    key = torch.einsum("hnc,bhc->bhn", w_uk, latent)  # of the expanded form
    assert_close((absorbed[..., :6] * latent).sum(-1), (q[..., :5] * key).sum(-1))
    assert_close(absorbed[..., 6:], turned(q[..., 5:], table[positions]))
    values = torch.einsum("hvc,bhc->bhv", w_uv, latent)
    assert_close(ref.project_values(latent, w_uv), values)
    for out, want in zip(ref.project_values(latent, w_uv, True), ref.quantize_1x128(values.flatten(1)), strict=True):
        assert_close(out.float(), want.float())


def test_norm_rope_write_fills_each_tokens_row_and_no_other() -> None:
    latent, rope, tokens = 10, 4, 7
    wide, weight, table = torch.randn(tokens, 20), torch.rand(latent) + 0.5, torch.rand(30, rope // 2) * 10
    kv, positions = wide[:, 3 : 3 + latent + rope], torch.randint(30, (tokens,))
    rows = torch.randperm(2 * 64)[:tokens] + 64
    rows[3] = rows[5] = 0  # padding: both in the null page
    pages = torch.full((3, 64, latent + rope), NAN)
    ref.norm_rope_write(kv, weight, 0.1, table.cos(), table.sin(), positions, rows, pages)
    want = torch.cat((F.rms_norm(kv[:, :latent], (latent,), weight, 0.1), kv[:, latent:]), -1)
    want[:, latent:] = turned(kv[:, None, latent:], table[positions])[:, 0]
    flat, real = pages.flatten(0, 1), rows > 0
    assert_close(flat[rows[real]], want[real])
    assert flat.isfinite().all(-1).nonzero().flatten().tolist() == sorted({*rows.tolist()})
    q, w_uk, again = torch.randn(tokens, 3, 5 + rope), torch.randn(3, 5, latent), torch.full_like(pages, NAN)
    rotation = table.cos(), table.sin(), positions
    absorbed = ref.write_and_absorb(q, w_uk, kv, weight, 0.1, *rotation, rows, again)
    assert torch.equal(absorbed, ref.absorb_query(q, w_uk, *rotation))
    assert_close(again.flatten(0, 1)[rows[real]], want[real])


def test_silu_mul_takes_the_gate_first() -> None:
    gate, up = torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    assert_close(ref.silu_mul(torch.cat((gate, up), -1)), gate / (1 + torch.exp(-gate)) * up)


def test_silu_mul_of_real_rows_only() -> None:
    gate, up = torch.randn(5, 6), torch.randn(5, 6)
    x, want = torch.cat((gate, up), -1), gate / (1 + torch.exp(-gate)) * up
    groups = Groups(torch.tensor([1, 2, 4], dtype=torch.int32), 2)
    real = torch.tensor([True, False, True, True, False])
    assert torch.equal(groups.of_rows(5), torch.tensor([0, -1, 2, 2, -1], dtype=torch.int32))
    out = ref.silu_mul(x.masked_fill(~real[:, None], NAN), groups)
    assert out.shape == want.shape
    assert_close(out[real], want[real])


@pytest.mark.parametrize(
    "lengths",
    [[(5, 5)], [(1, 9)], [(3, 10)], [(1, 1)], [(64, 130), (1, 65), (6, 6), (1, 1), (63, 64)], []],
    ids=["whole", "last token", "prefix", "one token", "ragged", "no sequence"],
)
def test_prefill_attention_equals_sdpa(lengths: list[tuple[int, int]]) -> None:
    heads, dqk, dv, scale = 3, 12, 7, 0.4
    num_q, num_kv = (sum(column) for column in zip(*lengths, strict=True)) if lengths else (0, 0)
    q, k, v = torch.randn(num_q, heads, dqk), torch.randn(num_kv, heads, dqk), torch.randn(num_kv, heads, dv)
    k[..., 8:] = k[:, :1, 8:]  # all heads share that part
    starts = torch.tensor([(0, 0), *lengths]).cumsum(0).to(torch.int32)
    longest = [max(column) for column in zip(*lengths, strict=True)] if lengths else [0, 0]
    out = ref.prefill_attention(q, k[..., :8], k[:, 0, 8:], v, starts[:, 0], starts[:, 1], *longest, scale)
    assert out.shape == (num_q, heads, dv)
    parts = zip(*(x.split([n[side] for n in lengths]) for x, side in ((q, 0), (k, 1), (v, 1), (out, 0))), strict=True)
    for (n, m), (q1, k1, v1, out1) in zip(lengths, parts, strict=True):
        seen = torch.arange(m) <= torch.arange(n)[:, None] + (m - n)
        one = [x.transpose(0, 1)[None] for x in (q1, k1, v1)]
        assert_close(out1, F.scaled_dot_product_attention(*one, attn_mask=seen, scale=scale)[0].transpose(0, 1))


@pytest.mark.parametrize("q_len", [1, 2, 5])
def test_mla_decode_equals_dense_softmax_and_reads_nothing_else(q_len: int) -> None:
    """The last `q_len` tokens of each sequence, of which each sees the tokens before it and itself."""
    lens, heads, latent, rope, scale = [64, 0, q_len, 65, 63, 200, 66], 3, 10, 4, 0.3
    pool = torch.full((16, 64, latent + rope), NAN)
    free = torch.randperm(15) + 1
    table, dense = torch.zeros(len(lens), 4, dtype=torch.int32), []
    for i, length in enumerate(lens):
        pages, free = free[: math.ceil(length / 64)], free[math.ceil(length / 64) :]
        table[i, : len(pages)] = pages
        dense.append(torch.randn(length, latent + rope))
        for position, row in enumerate(dense[-1]):
            pool[pages[position // 64], position % 64] = row
    q = torch.randn(len(lens) * q_len, heads, latent + rope)
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    out = ref.mla_decode(q, pool, table, kv_lens, scale, plan=ref.decode_plan(kv_lens, q_len, q.shape[1]))
    assert out.shape == q.shape
    for i, rows in enumerate(dense):
        for j in range(q_len):
            seen, token = rows[: max(0, len(rows) - q_len + 1 + j)].double(), i * q_len + j
            weights = torch.exp(torch.einsum("hd,nd->hn", q[token].double(), seen) * scale)
            want = weights @ seen[:, :latent] / weights.sum(-1, keepdim=True)
            assert_close(out[token, :, :latent], (want if len(rows) else torch.zeros(heads, latent)).float())


def slow_gate(
    logits: list[float], bias: list[float], groups: int, keep: int, top_k: int, normalize: bool, scale: float
) -> dict[int, float]:
    """One token's experts and weights, after the words of the technical report, section 2.1.2."""
    affinity = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [a + b for a, b in zip(affinity, bias, strict=True)]
    size = len(logits) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = sorted(members, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))[:keep]
    chosen = sorted((e for group in best for e in group), key=lambda e: -biased[e])[:top_k]
    total = sum(affinity[e] for e in chosen) if normalize else 1.0
    return {e: affinity[e] / total * scale for e in chosen}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("experts", "groups", "keep", "top_k"),
    [
        (16, 1, 1, 4),
        (16, 4, 2, 4),
        (16, 4, 4, 16),
        (64, 8, 4, 8),
        (16, 8, 3, 2),
        (8, 8, 3, 3),
        (8, 4, 1, 2),
        (1, 1, 1, 1),
    ],
)
def test_gate_topk_equals_the_report(experts: int, groups: int, keep: int, top_k: int, normalize: bool) -> None:
    logits, bias = torch.randn(50, experts), torch.randn(experts) * 0.3
    ids, weights = ref.gate_topk(logits, bias, groups, keep, top_k, normalize, 2.5)
    assert ids.shape == weights.shape == (50, top_k)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    for token in range(50):
        want = slow_gate(logits[token].tolist(), bias.tolist(), groups, keep, top_k, normalize, 2.5)
        got = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)


def test_gate_topk_names_slots_and_sends_padding_nowhere() -> None:
    logits, bias, slot_of_expert = torch.randn(20, 16), torch.zeros(16), torch.randperm(40)[:16]
    ids, weights = ref.gate_topk(logits, bias, 4, 2, 3, True, 1.0)
    is_token = torch.arange(20) % 3 > 0
    slots, same = ref.gate_topk(logits, bias, 4, 2, 3, True, 1.0, slot_of_expert, is_token)
    assert torch.equal(same, weights)
    assert slots[~is_token].eq(-1).all() and torch.equal(slots[is_token], slot_of_expert[ids][is_token])


def test_gate_topk_follows_a_bias_below_minus_one() -> None:
    """Left-out groups must lose to every kept expert, also where its biased score is negative."""
    logits, bias = torch.randn(50, 16), torch.full((16,), -5.0)
    ids, _ = ref.gate_topk(logits, bias, 4, 2, 8, True, 1.0)
    for token in range(50):
        assert set(ids[token].tolist()) == slow_gate(logits[token].tolist(), bias.tolist(), 4, 2, 8, True, 1.0).keys()
    assert ref.gate_topk(logits[:0], bias, 4, 2, 8, True, 1.0)[0].shape == (0, 8)


LOCAL, WIDTH, HIDDEN = 5, 6, 8


def routed() -> Iterator:
    """(name, experts [N, K]): local ids, none twice in a row, -1 = not here."""
    rng = random.Random(0)
    somewhere = [rng.sample([*range(LOCAL), -1, -2, -3], 3) for _ in range(40)]
    yield "some not here", [[max(e, -1) for e in row] for row in somewhere]
    yield "all here", [rng.sample(range(LOCAL), 3) for _ in range(40)]
    yield "one expert gets all", [[-1, 3, -1]] * 9
    yield "first and last empty", [[1, 3, -1], [3, 2, 1], [-1, -1, 2]]
    yield "one token", [[4, 0, 2]]
    yield "nowhere", [[-1, -1, -1]] * 4
    yield "no rows", []


every_routing = pytest.mark.parametrize("experts", [pytest.param(e, id=name) for name, e in routed()])


def problem(experts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, experts, weights, gate_up, down, and the MoE's output by a loop over tokens, in float64."""
    ids = torch.tensor(experts, dtype=torch.int64).view(-1, 3)
    x, weights = torch.randn(len(ids), HIDDEN), torch.rand(len(ids), 3)
    gate_up, down = torch.randn(LOCAL, 2 * WIDTH, HIDDEN), torch.randn(LOCAL, HIDDEN, WIDTH)
    want = torch.zeros(len(ids), HIDDEN, dtype=torch.float64)
    for t, row in enumerate(experts):
        for k, e in enumerate(row):
            if e >= 0:
                both = gate_up[e].double() @ x[t].double()
                hidden = F.silu(both[:WIDTH]) * both[WIDTH:]
                want[t] += weights[t, k].double() * (down[e].double() @ hidden)
    return x, ids, weights, gate_up, down, want.float()


@every_routing
@pytest.mark.parametrize("alignment", [1, 128])
def test_contiguous_round_trip_equals_a_loop_over_tokens(experts: list[list[int]], alignment: int) -> None:
    x, ids, weights, gate_up, down, want = problem(experts)
    rows, groups, index = ref.ep_scatter(x, ids, LOCAL, alignment)
    padding = groups.of_rows(len(rows)) < 0

    def poisoned(t: Tensor) -> Tensor:
        return t.masked_fill(padding[:, None], NAN)

    hidden = ref.silu_mul(poisoned(ref.grouped_gemm_contiguous(poisoned(rows), gate_up, groups)), groups)
    out = poisoned(ref.grouped_gemm_contiguous(poisoned(hidden), down, groups))
    assert_close(ref.ep_gather(out, index, weights), want, atol=1e-4, rtol=1e-4)


@every_routing
@pytest.mark.parametrize("alignment", [1, 128])
def test_ep_scatter_groups_by_expert_and_pads_to_the_alignment(experts: list[list[int]], alignment: int) -> None:
    x, ids, *_ = problem(experts)
    rows, groups, index = ref.ep_scatter(x, ids, LOCAL, alignment)
    row_expert = groups.of_rows(len(rows))
    counts = [sum(row.count(e) for row in experts) for e in range(LOCAL)]
    layout = [[e] * n + [-1] * (-n % alignment) for e, n in enumerate(counts)]
    assert row_expert.tolist() == sum(layout, [])
    assert groups.ends.dtype == torch.int32 and groups.alignment == alignment
    assert rows.shape == (len(row_expert), HIDDEN)
    assert_provenance(rows, row_expert, index, x, ids)
    for more in (0, 1, 300):
        wide, same, at = ref.ep_scatter(x, ids, LOCAL, alignment, num_rows=len(rows) + more)
        assert len(wide) == len(rows) + more and torch.equal(same.ends, groups.ends) and torch.equal(at, index)
        assert_provenance(wide, same.of_rows(len(wide)), at, x, ids)


@pytest.mark.parametrize(
    ("rows", "ends", "alignment", "message"),
    [
        (200, [100, 200], 128, "200 rows: rows % 128 must be 0, not 72"),
        (256, [100, 200], 64, "groups.alignment 64: it must be 128"),
        (256, [100], 128, "ends (1,): there must be one per weight, 2"),
    ],
)
def test_groups_that_a_gpu_cannot_take_are_refused(rows: int, ends: list[int], alignment: int, message: str) -> None:
    groups = Groups(torch.tensor(ends, dtype=torch.int32), alignment)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_groups(torch.empty(rows, 4), torch.empty(2, 3, 4), groups)
    check_groups(torch.empty(256, 4), torch.empty(2, 3, 4), Groups(torch.tensor([100, 228]), 128))


@every_routing
@pytest.mark.parametrize("alignment", [1, 64])
def test_masked_round_trip_equals_a_loop_over_tokens(experts: list[list[int]], alignment: int) -> None:
    x, ids, weights, gate_up, down, want = problem(experts)
    rows, counts, index = ref.ep_scatter_masked(x, ids, LOCAL, alignment)
    padding = torch.arange(rows.shape[1]) >= counts[:, None]  # [L, R]

    def poisoned(t: Tensor) -> Tensor:
        return t.masked_fill(padding[..., None], NAN)

    hidden = poisoned(ref.swiglu_masked(poisoned(rows), gate_up, counts))
    out = poisoned(ref.grouped_gemm_masked(hidden, down, counts))
    assert_close(ref.ep_gather(out.flatten(0, 1), index, weights), want, atol=1e-4, rtol=1e-4)


@every_routing
@pytest.mark.parametrize("alignment", [1, 64])
def test_ep_scatter_masked_fills_each_expert_from_the_front(experts: list[list[int]], alignment: int) -> None:
    x, ids, *_ = problem(experts)
    rows, counts, index = ref.ep_scatter_masked(x, ids, LOCAL, alignment)
    assert rows.shape == (LOCAL, -(-len(x) // alignment) * alignment, HIDDEN)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [sum(row.count(e) for row in experts) for e in range(LOCAL)]
    filled = torch.arange(rows.shape[1]) < counts[:, None]
    row_expert = torch.arange(LOCAL)[:, None].where(filled, -1).flatten()
    assert_provenance(rows.flatten(0, 1), row_expert, index, x, ids)


@every_routing
def test_both_scatters_move_fp8_with_its_scales(experts: list[list[int]]) -> None:
    ids = torch.tensor(experts, dtype=torch.int64).view(-1, 3)
    x, scales = ref.quantize_1x128(torch.randn(len(ids), 256))
    rows, groups, index, moved = ref.ep_scatter(x, ids, LOCAL, 4, scales=scales)
    row_expert = groups.of_rows(len(rows))
    assert rows.dtype == x.dtype and moved.shape == (len(rows), 2)
    assert_provenance(rows.view(torch.uint8), row_expert, index, x.view(torch.uint8), ids)
    assert_provenance(moved, row_expert, index, scales, ids)
    rows, counts, index, moved = ref.ep_scatter_masked(x, ids, LOCAL, 64, scales=scales)
    assert rows.dtype == x.dtype and moved.shape == (*rows.shape[:2], 2)
    filled = torch.arange(rows.shape[1]) < counts[:, None]
    row_expert = torch.arange(LOCAL)[:, None].where(filled, -1).flatten()
    assert_provenance(rows.view(torch.uint8).flatten(0, 1), row_expert, index, x.view(torch.uint8), ids)
    assert_provenance(moved.flatten(0, 1), row_expert, index, scales, ids)


def assert_provenance(rows: Tensor, row_expert: Tensor, index: Tensor, x: Tensor, ids: Tensor) -> None:
    """Every copy lies in a row of its own, under its own expert, with its token's bytes."""
    assert torch.equal(index >= 0, ids >= 0)
    used = index[index >= 0]
    assert sorted(used.tolist()) == (row_expert >= 0).nonzero().flatten().tolist()
    assert torch.equal(row_expert[used].long(), ids[ids >= 0])
    assert torch.equal(rows[used], x[(ids >= 0).nonzero()[:, 0]])


def test_ep_gather_sums_in_float32_and_keeps_the_dtype() -> None:
    """1 + 7 x 2^-9 is 1.0 when every step rounds to bfloat16."""
    rows = torch.tensor([1.0, *[2**-9] * 7]).bfloat16()[:, None]
    out = ref.ep_gather(rows, torch.arange(8)[None])
    assert out.dtype == torch.bfloat16
    assert out.item() == torch.tensor(1 + 7 * 2**-9).bfloat16().item() != 1.0


def test_copies_meet_their_experts_where_they_are() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(3, 16), torch.randn(5, 24, 16), torch.randn(5, 16, 12)
    slots, weights, plus = torch.tensor([[4, 0], [-1, -1], [2, -1]]), torch.rand(3, 2), torch.randn(3, 16)
    y = ref.gemm_of_copies(ref.swiglu_of_copies(x, gate_up, slots), down, slots)
    assert (y[[2, 3, 5]] == 0).all()
    expected = plus.clone()
    for token, k in ((0, 0), (0, 1), (2, 0)):
        gate, up = (gate_up[slots[token, k]] @ x[token]).chunk(2)
        expected[token] += weights[token, k] * (down[slots[token, k]] @ (F.silu(gate) * up))
    torch.testing.assert_close(ref.ep_gather(y, None, weights, plus), expected)
    assert ref.gemm_of_copies(x[:0], gate_up, slots[:0]).shape == (0, 24)


def test_ep_gather_without_weights_adds_what_is_there() -> None:
    rows = torch.tensor([[NAN, NAN], [1.0, 2.0], [10.0, 20.0]])
    index = torch.tensor([[1, 2], [-1, 2], [-1, -1], [1, -1]])
    out = ref.ep_gather(rows, index)
    plus = torch.randn_like(out)
    assert_close(ref.ep_gather(rows, index, plus=plus), out + plus)
    assert out.tolist() == [[11.0, 22.0], [10.0, 20.0], [0.0, 0.0], [1.0, 2.0]]


@pytest.mark.parametrize("pages", [[3], [5, 0, 2, 6], []])
def test_pages_are_packed_in_order_and_come_back_to_others(pages: list[int]) -> None:
    pool, theirs = torch.randn(3, 7, 64, 5), [(page + 1) % 7 for page in pages]
    packed = torch.full((3, len(pages), 64, 5), NAN)
    assert ref.pack_pages(pool, torch.tensor(pages, dtype=torch.int64), packed) is None
    other = torch.full_like(pool, NAN)
    ref.unpack_pages(packed, other, torch.tensor(theirs, dtype=torch.int64))
    for layer in range(3):
        for mine, place, their in zip(pages, range(len(pages)), theirs, strict=True):
            assert torch.equal(packed[layer, place], pool[layer, mine])
            assert torch.equal(other[layer, their], pool[layer, mine])
    assert other[:, [page for page in range(7) if page not in theirs]].isnan().all()
