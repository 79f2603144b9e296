"""Dispatch, experts, combine over real ranks equals the local computation, in both layouts, whatever the routing."""

import pytest
import torch
from torch import Tensor

from kernels.backend import Ops
from parallel.dispatch import Contiguous, ContiguousAllToAll, Masked, MaskedAllToAll
from parallel.mesh import Group, Mesh
from tests.worlds import run_world, sub_mesh

HIDDEN, TOP_K, CAPACITY = 16, 4, 24


def routing(kind: str, tokens: int, num_slots: int, generator: torch.Generator, top_k: int = TOP_K) -> Tensor:
    """[T, K] slots, -1 = nowhere."""
    slots = torch.rand(tokens, num_slots, generator=generator).argsort(1)[:, :top_k]
    match kind:
        case "random":
            return slots
        case "ragged":  # many copies go nowhere, some tokens have none at all
            drop = torch.rand(tokens, top_k, generator=generator) < 0.5
            return slots.masked_fill(drop, -1)
        case "one rank":  # everything to the first rank's slots; the others receive nothing
            return torch.arange(top_k).repeat(tokens, 1)
        case "nowhere":
            return torch.full_like(slots, -1)
    raise AssertionError(kind)


def expert(rows: Tensor, slot: Tensor) -> Tensor:
    """A stand-in expert that is different for each slot and not linear."""
    return torch.tanh(rows * (1 + slot)) + slot


def apply_experts(arrived: Contiguous | Masked, first_slot: int) -> Tensor:
    """Run `expert` on the rows that are there; everything else becomes NaN and must not be read."""
    match arrived:
        case Contiguous(x, row_expert):
            y = expert(x, first_slot + row_expert[:, None].float())
            return y.masked_fill(row_expert[:, None] < 0, float("nan"))
        case Masked(x, counts):
            slot = first_slot + torch.arange(len(counts), dtype=torch.float32)
            there = torch.arange(x.shape[1]) < counts[:, None]
            return expert(x, slot[:, None, None]).masked_fill(~there[..., None], float("nan"))


def check_round_trip(group: Group, experts_a_rank: int, kind: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(1000 * group.rank + tokens)
    num_slots = experts_a_rank * group.size
    x = torch.randn(tokens, HIDDEN, generator=generator)
    slots = routing(kind, tokens, num_slots, generator)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    copies = expert(x[:, None], slots[..., None].float()) * weights[..., None]
    expected = copies.masked_fill(slots[..., None] < 0, 0).sum(1)
    for dispatcher in (
        ContiguousAllToAll(group, num_slots, Ops()),
        ContiguousAllToAll(group, num_slots, Ops(alignment=8)),
        MaskedAllToAll(group, num_slots, Ops(), CAPACITY),
    ):
        arrived = dispatcher.dispatch(x, slots, weights).wait()
        y = apply_experts(arrived, group.rank * experts_a_rank)
        out = dispatcher.combine(y, arrived).wait()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, msg=lambda m: f"{kind} {tokens=} {m}")  # noqa: B023


def check_provenance(group: Group, experts_a_rank: int) -> None:
    """Payloads say where they come from: (source rank, token, slots); each must have arrived where it was sent."""
    num_slots, tokens = experts_a_rank * group.size, 5 + group.rank
    generator = torch.Generator().manual_seed(group.rank)
    slots = routing("ragged", tokens, num_slots, generator)
    x = torch.zeros(tokens, HIDDEN)
    x[:, 0], x[:, 1], x[:, 2 : 2 + TOP_K] = group.rank, torch.arange(tokens), slots.float()
    everyone = group.exchange(slots)
    first = group.rank * experts_a_rank
    for dispatcher in (
        ContiguousAllToAll(group, num_slots, Ops(alignment=8)),
        MaskedAllToAll(group, num_slots, Ops(), CAPACITY),
    ):
        pending = dispatcher.dispatch(x, slots, torch.ones(tokens, TOP_K))
        arrived, got = pending.wait(), set()
        match arrived:
            case Contiguous(rows, row_expert):
                pairs = [(row, e) for row, e in zip(rows, row_expert.tolist(), strict=True) if e >= 0]
                assert len(rows) % 8 == 0
            case Masked(rows, counts):
                pairs = [(row, e) for e, count in enumerate(counts.tolist()) for row in rows[e, :count]]
        for row, e in pairs:
            assert first + e in row[2 : 2 + TOP_K].tolist(), "a row arrived at an expert that it did not ask for"
            got.add((int(row[0]), int(row[1]), first + e))
        assert len(got) == len(pairs), "a copy arrived twice"
        expected = {
            (source, token, slot)
            for source, theirs in enumerate(everyone)
            for token, row in enumerate(theirs.tolist())
            for slot in row
            if first <= slot < first + experts_a_rank
        }
        assert got == expected
        dispatcher.combine(rows, arrived).wait()


def check_collectives(mesh: Mesh) -> None:
    """The attention group's collectives against arithmetic that each rank can do alone."""
    group = mesh.attn
    x = torch.arange(8.0).view(8, 1) + 100 * group.rank
    total = torch.arange(8.0).view(8, 1) * group.size + 100 * sum(range(group.size))
    share = 8 // group.size
    mine = slice(group.rank * share, (group.rank + 1) * share)
    assert torch.equal(group.scatter(x), x[mine])
    assert torch.equal(group.reduce_scatter(x), total[mine])
    theirs = [torch.arange(share * r, share * (r + 1.0))[:, None] + 100 * r for r in range(group.size)]
    assert torch.equal(group.all_gather(x[mine]), torch.cat(theirs))
    assert torch.equal(group.all_reduce(x.clone()), total)
    assert group.exchange({"rank": group.rank}) == [{"rank": r} for r in range(group.size)]
    assert mesh.agree(mesh.rank, 7) == [[r, 7] for r in range(mesh.size)]


def body(rank: int) -> None:
    for size, attn_tp in ((1, 1), (2, 2), (3, 1), (4, 2), (4, 4)):
        mesh = sub_mesh(0, size, attn_tp)
        if mesh is None:
            continue
        check_collectives(mesh)
        for kind in ("random", "ragged", "one rank", "nowhere"):
            for tokens in (0, 1, 5 * rank, CAPACITY if rank % 2 else 0):  # ragged over ranks; some have nothing
                check_round_trip(mesh.ep, 6, kind, min(tokens, CAPACITY))
        check_provenance(mesh.ep, 4)


def test_layouts_equal_the_local_computation() -> None:
    run_world(4, body)


def test_more_tokens_than_capacity_are_refused() -> None:
    dispatcher = MaskedAllToAll(Group(), 8, Ops(), 4)
    with pytest.raises(AssertionError, match="num_tokens=5 over self.capacity=4"):
        dispatcher.dispatch(torch.zeros(5, HIDDEN), torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1))
