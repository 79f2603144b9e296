"""The roofline's arithmetic against numbers by hand, and against an independent count."""

from dataclasses import replace

import pytest

from model.config import ModelConfig
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.lib.step_cost import Ceilings, Cost, Part, decode, prefill, tokens_per_step, total

H100 = Ceilings(798e12, 1400e12, 3.0e12)
EASY = ModelConfig(
    vocab_size=1000,
    hidden_size=100,
    intermediate_size=300,
    moe_intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=2,
    kv_lora_rank=20,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=10,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
)


def numbers(work: Cost, kind: str) -> dict[str, tuple[float, float]]:
    """FLOP and bytes of each part of a kind of layer."""
    return {f"{part.group}: {part.name}": (part.flop, part.nbytes) for part in work.kinds[kind][1]}


def test_an_easy_decode_step_in_bf16() -> None:
    """Two sequences after 10 tokens. Two tokens choose 2 of 4 experts each: 4 * (1 - 0.5 ** 2) = 3 are hit."""
    work = decode(EASY, 2, 10)
    assert {kind: count for kind, (count, _) in work.kinds.items()} == {"dense layer": 1, "MoE layer": 2, "head": 1}
    attention = {
        "MLA projections: q, kv_a": (19_200, 10_192),  # 2 -> 24 + 24 of 100: weights 9,600, in 400, out 192
        "MLA projections: o_proj": (8_000, 4_480),  # 100 of 20: weights 4,000, in 80, out 400
        "MLA projections: W_UK": (1_280, 864),  # 2 heads, 20 of 8: each weights 320, in 32, out 80
        "MLA projections: W_UV": (1_600, 1_040),  # 2 heads, 10 of 20: each weights 400, in 80, out 40
        "MLA core: 24/20, absorbed": (3_520, 1_312),  # 80 products of 44; cache 960, queries 192, out 160
        "elementwise: 2 x add, norm": (0, 3_200),  # 16 passes over 2 x 100
        "elementwise: latents' norms, rope, KV write": (0, 256),  # per token kv_a 96 and the heads' rope 32
    }
    assert numbers(work, "dense layer") == attention | {
        "dense FFN: gate, up": (240_000, 122_800),  # 600 of 100: weights 120,000, in 400, out 2,400
        "dense FFN: down": (120_000, 61_600),
        "elementwise: silu, dense FFN": (0, 3_600),
    }
    assert numbers(work, "MoE layer") == attention | {
        "router: gate": (1_600, 1_232),  # weights 800, in 400, float32 scores 32
        "shared experts: gate, up": (40_000, 20_800),
        "shared experts: down": (20_000, 10_600),
        "elementwise: silu, shared experts": (0, 600),
        "routed experts: gate, up": (80_000, 61_600),  # 4 rows; 3 experts' weights 60,000, in 800, out 800
        "routed experts: down": (40_000, 31_200),
        "elementwise: silu, routed experts": (0, 1_200),
        "EP permute: weighted sum": (0, 1_200),  # 4 rows in, 2 out
    }
    assert numbers(work, "head") == {
        "LM head: lm_head": (400_000, 208_400),
        "LM head: the sampler's look at the logits": (0, 8_000),
    }


def test_an_easy_decode_step_that_drafts() -> None:
    """The same with two drafts of each sequence, so 6 rows: KV is read once for three rows of a sequence.

    The draft layer is filled for 6 rows, and runs on 2 for each draft. Drafts right half of the time give
    1 + 1/2 + 1/4 tokens per sequence.
    """
    work = decode(EASY, 2, 10, drafts=2, accept=0.5)
    assert work.tokens == 2 * 1.75 and tokens_per_step(2, 0.5) == 1.75 and tokens_per_step(1, 0.6) == 1.6
    assert {kind: count for kind, (count, _) in work.kinds.items()} == {
        "dense layer": 1, "MoE layer": 2, "head": 1, "draft layer's fill": 1, "draft layer": 2, "draft layer's head": 2
    }  # fmt: skip
    verified, drafting = numbers(work, "MoE layer"), numbers(work, "draft layer")
    assert verified["MLA projections: q, kv_a"] == (57_600, 11_376)  # weights 9,600, in 1,200, out 576
    assert verified["MLA core: 24/20, absorbed"] == (10_560, 2_016)  # cache 960; queries 576, out 480
    assert numbers(work, "draft layer's fill") == {
        "elementwise: enorm, hnorm": (0, 4_800),  # 4 passes over 6 x 100
        "draft's input: eh_proj": (240_000, 43_600),  # 100 of 200: weights 40,000, in 2,400, out 1,200
        "elementwise: norm": (0, 2_400),  # 2 passes
        "MLA projections: q, kv_a": (57_600, 11_376),  # whole, as in the other layers
        "elementwise: latent's norm, rope, KV write": (0, 576),  # kv_a of 24 per token, read and written
    }
    assert drafting == numbers(decode(EASY, 2, 10), "MoE layer") | {
        "elementwise: enorm, hnorm": (0, 1_600),
        "draft's input: eh_proj": (80_000, 41_200),
    }
    assert numbers(work, "head")["LM head: lm_head"] == (1_200_000, 225_200)  # weights 200,000, in 1,200, logits 24,000
    assert numbers(work, "draft layer's head") == numbers(decode(EASY, 2, 10), "head")
    single = decode(EASY, 2, 10, drafts=1, accept=0.5)
    assert [single.kinds[f"draft layer{part}"][0] for part in ("'s fill", "", "'s head")] == [1, 1, 1]


def test_an_easy_prefill_step_in_bf16() -> None:
    """Two prompts of 3 tokens: 2 * (1 + 2 + 3) = 12 pairs of query and key."""
    parts = numbers(prefill(EASY, 6, 3), "dense layer")
    assert parts["MLA projections: kv_b"] == (8_640, 2_112)  # 36 of 20: weights 1,440, in 240, out 432
    assert parts["MLA core: 12/10, causal"] == (1_056, 1_056)  # 24 head-pairs of 22; 2 x 12 and 2 x 10 wide
    assert numbers(prefill(EASY, 6, 3), "head")["LM head: lm_head"] == (400_000, 208_400)  # 2 first tokens
    drafting = prefill(EASY, 6, 3, drafts=2)
    assert drafting.tokens == 6 and drafting.kinds["draft layer"][0] == 2
    assert numbers(drafting, "draft layer's fill") == numbers(decode(EASY, 2, 3, drafts=2), "draft layer's fill")
    core = numbers(drafting, "draft layer")["MLA core: 24/20, absorbed"]
    assert core == (1_056, 640)  # 2 rows after 3 tokens: 24 products of 44; cache 288, queries 192, out 160


def test_the_real_decode_rank() -> None:
    """DeepSeek-V3 over 72 ranks of 4 experts, 256 sequences of 2,048: every local expert gets 512 rows.

    fp8 products have weights of one byte, and 1.03125 bytes for each activation with its scale.
    """
    work = decode(SHAPES["v3"], 256, 2048, ep=72, local=4)
    assert {kind: count for kind, (count, _) in work.kinds.items()} == {"dense layer": 3, "MoE layer": 58, "head": 1}
    parts = numbers(work, "MoE layer")
    expected = {
        "MLA projections: q_a, kv_a": (7_751_073_792, 15_138_816 + 1_892_352 + 1_081_344),
        "MLA projections: q_b": (19_327_352_832, 37_748_736 + 405_504 + 12_582_912),
        "MLA projections: o_proj": (60_129_542_144, 117_440_512 + 4_325_376 + 3_670_016),
        "MLA projections: W_UK": (4_294_967_296, 58_720_256),  # bf16: 128 x (131,072 + 65,536 + 262,144)
        "MLA projections: W_UV": (4_294_967_296, 58_720_256),
        "MLA core: 576/512, absorbed": (146_028_888_064, 603_979_776 + 71_303_168),  # the cache; queries and out
        "router: gate": (939_524_096, 3_670_016 + 3_670_016 + 262_144),
        "shared experts: gate, up": (15_032_385_536, 29_360_128 + 1_892_352 + 2_097_152),
        "routed experts: gate, up": (120_259_084_288, 117_440_512 + 15_138_816 + 16_777_216),
        "routed experts: down": (60_129_542_144, 58_720_256 + 4_325_376 + 29_360_128),
        "elementwise: silu, routed experts": (0, 21_102_592),  # 2,048 rows of 2,048: 4 bytes in, 1.03125 out
    }
    for name, pair in expected.items():
        assert parts[name] == pytest.approx(pair, rel=1e-12), name
    assert not any(name.startswith("EP permute") for name in parts)
    fill = numbers(decode(SHAPES["v3"], 128, 2048, ep=72, local=4, drafts=1), "draft layer's fill")
    assert fill["MLA projections: q_a, kv_a"] == parts["MLA projections: q_a, kv_a"]  # of 256 rows as well
    assert fill["elementwise: norm"] == (0, 5_562_368)  # 2 bytes in, 1.03125 out
    # 0.503 ms and 8,159 tok/s by a count with slightly different elementwise traffic (under 1 % of the whole).
    assert total(work.kinds["MoE layer"][1], H100) == pytest.approx(503e-6, rel=0.01)
    assert work.rate(H100) == pytest.approx(8159, rel=0.01)


def test_the_real_prefill_rank() -> None:
    """32 ranks of 9 experts; with four groups of eight a token can reach 16 ranks, and 16 * (1 - (15/16) ** 8) = 6.45
    of them get it."""
    work = prefill(SHAPES["v3"], 16384, 4096, ep=32, local=9)
    parts = numbers(work, "MoE layer")
    assert parts["routed experts: down"][0] == 2 * 131_072 * 7_168 * 2_048
    assert parts["EP permute: sums of a token's rows"][1] == pytest.approx((6.4530 + 8) * 16384 * 7168 * 2, rel=1e-4)
    # 20.47 ms by the other count, which has a cheaper pass over the projections' outputs and 6.5 ranks a token.
    assert total(work.kinds["MoE layer"][1], H100) == pytest.approx(20.47e-3, rel=0.02)


@pytest.mark.parametrize(
    "work",
    [
        decode(EASY, 2, 10),
        decode(EASY, 2, 10, drafts=2, accept=0.6),
        prefill(EASY, 6, 3),
        prefill(EASY, 6, 3, drafts=2),
        decode(SHAPES["v3"], 64, 4096, 72, 4),
    ],
)
def test_the_step_is_the_sum_of_its_parts(work: Cost) -> None:
    parts = [part for count, layer in work.kinds.values() for part in count * layer]
    assert work.seconds(H100) == pytest.approx(sum(part.seconds(H100) for part in parts))
    assert work.rate(H100) == pytest.approx(work.tokens / work.seconds(H100))


def test_a_part_takes_the_longer_of_its_two_times() -> None:
    ceilings = Ceilings(100.0, 200.0, 10.0)
    assert Part("g", "n", 1000, 50).seconds(ceilings) == 10  # 1000 / 100 FLOP/s over 50 / 10 bytes/s
    assert Part("g", "n", 1000, 500).seconds(ceilings) == 50
    assert Part("g", "n", 1000, 0, "fp8").seconds(ceilings) == 5
    assert Part("g", "n", 1000, 0, "fp8").seconds(replace(ceilings, fp8=None)) == 10


def test_fp8_weights_are_half_as_many_bytes() -> None:
    rate, halved = (decode(replace(SHAPES["moonlight"], fp8=fp8), 1, 1024).rate(H100) for fp8 in (False, True))
    assert 1.5 * rate < halved < 2 * rate


@pytest.mark.parametrize(("batch", "expected"), [(1, 576), (32, 3066), (128, 10547)])
def test_moonlight_decodes_as_another_count_says(batch: int, expected: float) -> None:
    """That count leaves out the logits' second pass, queries and silu of the shared expert: 1 % together."""
    assert decode(SHAPES["moonlight"], batch, 1024).rate(H100) == pytest.approx(expected, rel=0.01)


def test_moonlight_prefills_as_another_count_says() -> None:
    """What it leaves out (see the script) is most in prefill: silu of the shared expert alone is 2 % of a layer."""
    rate = prefill(SHAPES["moonlight"], 16 * 1024, 1024).rate(H100)
    assert 0.96 * 146_671 < rate < 146_671
