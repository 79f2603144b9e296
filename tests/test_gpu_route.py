"""The Triton gate, and the moves between token order and expert order: pure moves equal their twins bit for bit."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import ref
from kernels.gate import gate_topk
from kernels.route import ep_gather, ep_scatter, ep_scatter_masked

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float32]


GATES = [(256, 8, 4, 8), (384, 1, 1, 8), (64, 1, 1, 6), (32, 4, 2, 4), (160, 8, 3, 6), (96, 3, 2, 5), (8, 8, 2, 2)]
KINDS = {  # what the model types differ in
    "v3": {"softmax": False, "group_best": 2},
    "v2": {"softmax": True, "group_best": 1},
    "neither": {"softmax": True, "group_best": 2},
}
kinds = pytest.mark.parametrize("kind", KINDS)
gates = pytest.mark.parametrize(("experts", "n_group", "topk_group", "top_k"), GATES)


def bias_of(kind: str, experts: int, spread: float = 0.0) -> Tensor | None:
    return None if kind == "v2" else torch.randn(experts, device=DEVICE) * spread


def scores_of(logits: Tensor, kind: str) -> Tensor:
    return logits.softmax(-1) if KINDS[kind]["softmax"] else logits.sigmoid()


@kinds
@pytest.mark.parametrize("normalize", [True, False])
@gates
def test_gate(experts: int, n_group: int, topk_group: int, top_k: int, normalize: bool, kind: str) -> None:
    """Scores that are far apart leave no doubt about the order: the twin's ids, in its order."""
    apart = torch.rand(500, experts, device=DEVICE).argsort(1) / experts  # a permutation of a grid in each row
    logits, bias = torch.logit(0.05 + 0.9 * apart), bias_of(kind, experts)
    ids, weights = gate_topk(logits, bias, n_group, topk_group, top_k, normalize, 2.5, **KINDS[kind])
    groups, best = scores_of(logits, kind).unflatten(1, (n_group, -1)), KINDS[kind]["group_best"]
    sums = groups.topk(min(best, groups.shape[-1]), dim=-1).values.sum(-1).sort(1, descending=True).values
    unsure = torch.zeros(500, dtype=torch.bool, device=DEVICE)
    if topk_group < n_group:  # sums of two grid points may tie at the border: there either group is right
        unsure = (sums[:, topk_group - 1] - sums[:, topk_group]).abs() < 1e-5 * sums[:, topk_group]
    assert unsure.sum() < 250
    want_ids, want_weights = ref.gate_topk(logits, bias, n_group, topk_group, top_k, normalize, 2.5, **KINDS[kind])
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids[~unsure], want_ids[~unsure])
    torch.testing.assert_close(weights[~unsure], want_weights[~unsure], rtol=1e-5, atol=1e-6)


@kinds
@gates
def test_gate_names_slots(experts: int, n_group: int, topk_group: int, top_k: int, kind: str) -> None:
    logits, bias = torch.randn(99, experts, device=DEVICE), bias_of(kind, experts)
    slot_of_expert = torch.randperm(2 * experts, device=DEVICE)[:experts]
    is_token = torch.rand(99, device=DEVICE) < 0.7
    args, kinds = (logits, bias, n_group, topk_group, top_k, True, 1.0), KINDS[kind]
    (ids, weights), (slots, same) = gate_topk(*args, **kinds), gate_topk(*args, slot_of_expert, is_token, **kinds)
    assert torch.equal(same, weights)
    assert torch.equal(slots, slot_of_expert[ids].masked_fill(~is_token[:, None], -1))
    assert torch.equal(gate_topk(*args, None, is_token, **kinds)[0], ids.masked_fill(~is_token[:, None], -1))


@kinds
@pytest.mark.parametrize("tokens", [0, 1, 777])
@gates
def test_gate_random(experts: int, n_group: int, topk_group: int, top_k: int, tokens: int, kind: str) -> None:
    """Random scores may come within rounding of each other: then the chosen scores must be as good as the twin's."""
    logits, bias = torch.randn(tokens, experts, device=DEVICE), bias_of(kind, experts, 0.1)
    args = (logits, bias, n_group, topk_group, top_k, False, 1.0)
    (ids, weights), (want, _) = gate_topk(*args, **KINDS[kind]), ref.gate_topk(*args, **KINDS[kind])
    scores = scores_of(logits, kind)
    torch.testing.assert_close(weights, scores.gather(1, ids), rtol=1e-5, atol=1e-6)
    choice = scores if bias is None else scores + bias
    assert ids.sort(1).values.diff(dim=1).gt(0).all()  # all different
    differ = (ids != want).any(1)
    assert differ.sum() <= 2  # rounding is rare
    same_groups = (ids[differ] // (experts // n_group)).sort(1).values == (want[differ] // (experts // n_group)).sort(
        1
    ).values
    gap = (choice.gather(1, ids) - choice.gather(1, want))[differ].abs()
    assert (gap[same_groups.all(1)] < 1e-5).all()


@kinds
@gates
def test_gate_sends_nan_to_different_experts_that_exist(
    experts: int, n_group: int, topk_group: int, top_k: int, kind: str
) -> None:
    """The rooms of the masked layout rest on that; and the other tokens' choices are their own."""
    logits, bias = torch.randn(9, experts, device=DEVICE), bias_of(kind, experts)
    args = (bias, n_group, topk_group, top_k, True, 1.0)
    want, _ = gate_topk(logits, *args, **KINDS[kind])
    logits[1], logits[4, ::2], logits[7, 0] = float("nan"), float("nan"), float("nan")
    ids, weights = gate_topk(logits, *args, **KINDS[kind])
    assert ids.sort(1).values.diff(dim=1).gt(0).all() and ids.min() >= 0 and ids.max() < experts
    fine = torch.tensor([0, 2, 3, 5, 6, 8], device=DEVICE)
    assert torch.equal(ids[fine], want[fine]) and weights[fine].isfinite().all() and weights[1].isnan().all()


def test_gate_stays_finite_for_far_logits() -> None:
    """As the softmax does, whose exponentials would overflow."""
    logits = torch.tensor([[1e4, 9990.0, -1e4, 0.0], [-1e4, -10005.0, -3e4, -4e4]], device=DEVICE)
    ids, weights = gate_topk(logits, None, 1, 1, 2, False, 1.0, softmax=True)
    want_ids, want = ref.gate_topk(logits, None, 1, 1, 2, False, 1.0, softmax=True)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want)


def test_gate_ties_go_to_the_lower_id() -> None:
    logits, bias = torch.zeros(3, 64, device=DEVICE), torch.zeros(64, device=DEVICE)
    assert gate_topk(logits, bias, 1, 1, 4, True, 1.0)[0].tolist() == [[0, 1, 2, 3]] * 3
    assert gate_topk(logits, bias, 8, 2, 12, True, 1.0)[0].tolist() == [list(range(12))] * 3
    assert gate_topk(logits, None, 8, 2, 12, True, 1.0, None, None, True, 1)[0].tolist() == [list(range(12))] * 3


def test_gate_knows_groups_by_one_or_two_experts() -> None:
    with pytest.raises(ValueError, match="group_best=3 must be 1 or 2"):
        gate_topk(torch.zeros(1, 8, device=DEVICE), None, 2, 1, 1, True, 1.0, group_best=3)


def routed(tokens: int, top_k: int, num_local: int, share: float) -> Tensor:
    """[tokens, top_k] distinct local ids, about `share` of them here."""
    ids = torch.rand(tokens, max(num_local, top_k), device=DEVICE).argsort(1)[:, :top_k]
    here = (torch.rand(tokens, top_k, device=DEVICE) < share) & (ids < num_local)
    return ids.where(here, -1)


def same(out: tuple[Tensor, ...], want: tuple[Tensor, ...], real: Tensor) -> None:
    """rows where `real`, and all else, bitwise. There may be fewer rows in `want`: only padding may follow."""
    assert torch.equal(out[0][real], want[0][real[: len(want[0])]])
    for a, b in zip(out[1:3], want[1:], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


ROUTES = [
    (40_000, 8, 3, 0.4),
    (1, 8, 4, 1.0),
    (300, 8, 9, 0.3),
    (1000, 6, 64, 1.0),
    (200, 8, 256, 0.9),
    (70, 1, 1, 0.5),
    (0, 8, 4, 1.0),
    (50, 4, 5, 0.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "num_local", "share"), ROUTES)
def test_scatter(tokens: int, top_k: int, num_local: int, share: float, dtype: torch.dtype) -> None:
    experts = routed(tokens, top_k, num_local, share)
    x = torch.randn(tokens, 200, device=DEVICE).to(dtype)
    want, groups, index = ref.ep_scatter(x, experts, num_local, 128)

    def check(*given: list[int], **rows: int) -> None:
        out, got, at = ep_scatter(x, experts, num_local, 128, *given, **rows)
        real = groups.of_rows(len(out)) >= 0
        assert len(out) == rows.get("num_rows", len(want)) and got.alignment == 128
        same((out, got.ends, at), (want, groups.ends, index), real)

    check()
    counts = torch.bincount(experts[experts >= 0], minlength=num_local).tolist()
    check(counts)
    check([-(-count // 128) * 128 for count in counts])
    for more in (0, 1, 1000):
        check(num_rows=len(want) + more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "num_local", "share"), ROUTES)
def test_scatter_masked(tokens: int, top_k: int, num_local: int, share: float, dtype: torch.dtype) -> None:
    experts = routed(tokens, top_k, num_local, share)
    x = torch.randn(tokens, 200, device=DEVICE).to(dtype)
    for alignment in (1, 128):
        want = ref.ep_scatter_masked(x, experts, num_local, alignment)
        real = torch.arange(want[0].shape[1], device=DEVICE) < want[1][:, None]
        same(ep_scatter_masked(x, experts, num_local, alignment), want, real)


def test_scatter_moves_fp8_with_its_scales() -> None:
    experts = routed(200, 8, 9, 0.3)
    x = torch.randn(200, 256, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.rand(200, 2, device=DEVICE)
    rows, _, index, moved = ep_scatter(x, experts, 9, 128, scales=scales)
    token, k = (index >= 0).nonzero(as_tuple=True)
    assert torch.equal(rows.view(torch.uint8)[index[token, k]], x.view(torch.uint8)[token])
    assert torch.equal(moved[index[token, k]], scales[token])
    rows, _, index, moved = ep_scatter_masked(x, experts, 9, scales=scales)
    assert rows.shape == (9, 200, 256) and moved.shape == (9, 200, 2)
    assert torch.equal(rows.flatten(0, 1).view(torch.uint8)[index[token, k]], x.view(torch.uint8)[token])
    assert torch.equal(moved.flatten(0, 1)[index[token, k]], scales[token])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "num_local", "share"), ROUTES)
def test_gather(tokens: int, top_k: int, num_local: int, share: float, dtype: torch.dtype, weighted: bool) -> None:
    experts = routed(tokens, top_k, num_local, share)
    x = torch.randn(tokens, 200, device=DEVICE).to(dtype)
    rows, groups, index = ref.ep_scatter(x, experts, num_local, 128)
    rows[groups.of_rows(len(rows)) < 0] = float("nan")  # padding is never read
    weights = torch.rand(tokens, top_k, device=DEVICE).where(experts >= 0, float("nan")) if weighted else None
    plus = torch.randn(tokens, 200, device=DEVICE).to(dtype) if weighted else None
    out, want = ep_gather(rows, index, weights, plus), ref.ep_gather(rows, index, weights, plus)
    assert out.dtype == dtype and out.shape == want.shape
    torch.testing.assert_close(out, want)
    assert torch.equal(out, ep_gather(rows, index, weights, plus))


def test_masked_scatter_and_gather_in_a_graph() -> None:
    """Captured once, replayed on other routing: nothing in it waits for the host."""
    x, experts = torch.randn(64, 256, device=DEVICE), routed(64, 8, 16, 0.5)

    def step() -> tuple[Tensor, Tensor]:
        rows, counts, index = ep_scatter_masked(x, experts, 16)
        return ep_gather(rows.flatten(0, 1), index), counts

    step()  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, counts = step()
    for share in (0.5, 1.0, 0.0):
        experts.copy_(routed(64, 8, 16, share))
        graph.replay()
        torch.testing.assert_close(out, x * (experts >= 0).sum(1, keepdim=True))
        assert counts.tolist() == [(experts == e).sum().item() for e in range(16)]
