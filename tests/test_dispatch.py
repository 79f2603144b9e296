"""Dispatch, experts and combine over real ranks equal the local computation, in both layouts, for any routing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.addends import Addends, summed
from kernels.fp8 import Quantized, dequantize_1x128, quantize_1x128
from kernels.ops import Ops
from model.config import ModelConfig
from model.moe import Experts
from parallel.dispatch import (
    Contiguous,
    ContiguousAllToAll,
    Copies,
    LocalMasked,
    Masked,
    MaskedAllToAll,
    Pending,
    Sliced,
)
from parallel.dispatchers import plain_dispatchers
from parallel.mesh import Group, Mesh
from tests.worlds import run_world, sub_mesh

HIDDEN, TOP_K, ROWS = 256, 4, 24
EXPERTS = 6  # of a rank
MOST = 13  # copies in a slice, of three tokens


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


def plain(x: Tensor, scale: Tensor | None) -> Tensor:
    """What was dispatched, in float32."""
    return x if scale is None else dequantize_1x128(x, scale)


def expert(rows: Tensor, slot: Tensor) -> Tensor:
    """A stand-in expert that is different for each slot and not linear."""
    return torch.tanh(rows * (1 + slot)) + slot


def apply_experts(arrived: Contiguous | Masked | Copies | Sliced, first_slot: int) -> Tensor:
    """Run `expert` on the rows that are there; everything else becomes NaN and must not be read."""
    match arrived:
        case Sliced(x, size=size):
            ops, sums = Ops(alignment=8), []
            for at in range(0, len(x), size):
                part = arrived.part(at, ops, EXPERTS)
                assert sum(end - start for start, end in part.groups.ranges()) <= MOST
                sums.append(ops.ep_gather(apply_experts(part, first_slot), *part.way_back))
            return torch.cat(sums)
        case Copies(x, slots):
            y = expert(x.repeat_interleave(slots.shape[1], 0), first_slot + slots.flatten()[:, None].float())
            return y.masked_fill(slots.flatten()[:, None] < 0, 0.0)  # as `gemm_of_copies` promises
        case Contiguous(x, groups, scale=scale):
            row_expert = groups.of_rows(len(x))
            y = expert(plain(x, scale), first_slot + row_expert[:, None].float())
            return y.masked_fill(row_expert[:, None] < 0, float("nan"))
        case Masked(x, counts, scale=scale):
            slot = first_slot + torch.arange(len(counts), dtype=torch.float32)
            there = torch.arange(x.shape[1]) < counts[:, None]
            return expert(plain(x, scale), slot[:, None, None]).masked_fill(~there[..., None], float("nan"))


def start(dispatcher: Any, x: Tensor | Quantized, slots: Tensor, weights: Tensor) -> Pending:
    """Dispatch; for the masked layout, whose ranks must all bring as many rows, with padding that goes nowhere."""
    if isinstance(dispatcher, MaskedAllToAll):
        pad = (0, 0, 0, ROWS - slots.shape[0])
        if isinstance(x, Tensor):
            x = F.pad(x, pad)
        else:
            x = (F.pad(x[0].view(torch.uint8), pad).view(x[0].dtype), F.pad(x[1], pad))
        slots, weights = F.pad(slots, pad, value=-1), F.pad(weights, pad)
    return dispatcher.dispatch(x, slots, weights)


def local(group: Group, num_slots: int, alignment: int = 1) -> tuple:
    return plain_dispatchers(group, num_slots, Ops(alignment=alignment)) if group.size == 1 else ()


def check_round_trip(group: Group, experts_a_rank: int, kind: str, tokens: int, fp8: bool) -> None:
    generator = torch.Generator().manual_seed(1000 * group.rank + tokens)
    num_slots = experts_a_rank * group.size
    x = torch.randn(tokens, HIDDEN, generator=generator)
    slots = routing(kind, tokens, num_slots, generator)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    sent = quantize_1x128(x) if fp8 else x
    if fp8:
        x = dequantize_1x128(*sent)
    copies = expert(x[:, None], slots[..., None].float()) * weights[..., None]
    expected = copies.masked_fill(slots[..., None] < 0, 0).sum(1)
    for dispatcher in (
        ContiguousAllToAll(group, num_slots, Ops()),
        ContiguousAllToAll(group, num_slots, Ops(alignment=8)),
        sliced := ContiguousAllToAll(group, num_slots, Ops(alignment=8), MOST),
        MaskedAllToAll(group, num_slots, Ops()),
        MaskedAllToAll(group, num_slots, Ops(alignment=128)),
        *local(group, num_slots),
    ):
        arrived = start(dispatcher, sent, slots, weights).wait()
        if dispatcher is sliced:
            everyone = group.exchange(slots.tolist(), list[list[int]])
            copies = [slot // experts_a_rank == group.rank for theirs in everyone for row in theirs for slot in row]
            assert isinstance(arrived, Sliced) == (sum(copies) > MOST)
        y = apply_experts(arrived, group.rank * experts_a_rank)
        back = dispatcher.combine(y, arrived.way_back).wait()
        assert isinstance(back, Addends) == isinstance(dispatcher, LocalMasked)
        out = summed(back, Ops().ep_gather)[:tokens]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, msg=lambda m: f"{kind} {tokens=} {fp8=} {m}")


def keys(x: Tensor, scale: Tensor | None) -> list[bytes]:
    """Every bit of each row."""
    parts = (x,) if scale is None else (x, scale)
    rows = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    return [bytes(row.tolist()) for row in rows]


def check_provenance(group: Group, experts_a_rank: int, dtype: torch.dtype) -> None:
    """Every row is another, and arrives bit for bit at the experts it was sent to, once, and nowhere else."""
    num_slots, tokens = experts_a_rank * group.size, 5 + group.rank
    generator = torch.Generator().manual_seed(group.rank)
    slots = routing("ragged", tokens, num_slots, generator)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    sent: Tensor | Quantized = quantize_1x128(x) if dtype == torch.float8_e4m3fn else x.to(dtype)
    mine = keys(sent, None) if isinstance(sent, Tensor) else keys(*sent)
    everyone = group.exchange((mine, slots.tolist()), tuple[list[bytes], list[list[int]]])
    origin = {key: (source, token) for source, (rows, _) in enumerate(everyone) for token, key in enumerate(rows)}
    first = group.rank * experts_a_rank
    expected = {
        (source, token, slot)
        for source, (_, theirs) in enumerate(everyone)
        for token, row in enumerate(theirs)
        for slot in row
        if first <= slot < first + experts_a_rank
    }
    for dispatcher in (
        ContiguousAllToAll(group, num_slots, Ops(alignment=8)),
        MaskedAllToAll(group, num_slots, Ops(alignment=128)),
        *local(group, num_slots, alignment=128),
    ):
        arrived = start(dispatcher, sent, slots, torch.ones(tokens, TOP_K)).wait()
        scale = None
        match arrived:
            case Copies(x, chosen):
                real = chosen.flatten() >= 0
                x, owners = x.repeat_interleave(TOP_K, 0), chosen.flatten()[real]
            case Contiguous(x, groups, scale=scale):
                row_expert = groups.of_rows(len(x))
                real, owners = row_expert >= 0, row_expert[row_expert >= 0]
                assert len(x) % 8 == 0
            case Masked(x, counts, scale=scale):
                assert x.shape[1] % 128 == 0
                real = torch.arange(x.shape[1]) < counts[:, None]
                owners = torch.arange(len(counts)).repeat_interleave(counts)
        assert x.dtype == dtype and (scale is None) == isinstance(sent, Tensor)
        rows = keys(x.view(torch.uint8)[real], None if scale is None else scale[real])
        got = [(*origin[key], first + e) for key, e in zip(rows, owners.tolist(), strict=True)]
        assert len(set(got)) == len(got), "a copy arrived twice"
        assert set(got) == expected
        dispatcher.combine(plain(x, scale), arrived.way_back).wait()


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
    assert group.exchange({"rank": group.rank}, dict[str, int]) == [{"rank": r} for r in range(group.size)]
    letters = "abc" * 1000 * group.rank + "x"  # of another length on every rank
    assert [len(text) for text in group.exchange(letters, str)] == [3000 * r + 1 for r in range(group.size)]
    last = group.size - 1
    problem = f"--model m\udcff on {group.rank}" if group.rank >= last - 1 else None  # a path that is not UTF-8
    assert group.first_problem(problem) == f"--model m\\udcff on {max(0, last - 1)}"
    assert group.first_problem(None) is None
    if group.size > 1:
        with pytest.raises(ValueError, match="Expected `int`, got `str`"):
            group.exchange("not a number" if group.rank else 1, int)
    assert mesh.agree(mesh.rank, 7) == [[r, 7] for r in range(mesh.size)]


def body(rank: int) -> None:
    for size, attn_tp in ((1, 1), (2, 2), (3, 1), (4, 2), (4, 4)):
        mesh = sub_mesh(0, size, attn_tp)
        if mesh is None:
            continue
        check_collectives(mesh)
        if (size, attn_tp) == (4, 4):
            continue  # its experts' group is that of (4, 2)
        for kind in ("random", "ragged", "one rank", "nowhere"):
            for tokens in (0, 1, 5 * rank, ROWS if rank % 2 else 0):  # ragged over ranks; some have nothing
                for fp8 in (False, True) if kind in ("random", "ragged") else (bool(size % 2),):
                    check_round_trip(mesh.ep, EXPERTS, kind, min(tokens, ROWS), fp8)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            check_provenance(mesh.ep, 4, dtype)


def test_layouts_equal_the_local_computation() -> None:
    run_world(4, body)


@pytest.mark.parametrize("fp8", [False, True])
def test_experts_take_slices(tiny: Path, fp8: bool) -> None:
    """13 tokens of 4 copies each, three at a time, give the sums that all at once do."""
    config, ops = replace(ModelConfig.from_pretrained(tiny), hidden_size=256, moe_intermediate_size=128), Ops()
    experts = Experts(config, 32, ops, torch.float8_e4m3fn if fp8 else torch.float32, "cpu")
    for name, weight in experts.named_parameters():
        weight.data.copy_(torch.rand(weight.shape) if "scale" in name else torch.randn(weight.shape) * 0.1)
    x, slots, weights = torch.randn(13, 256), routing("random", 13, 32, torch.Generator()), torch.rand(13, TOP_K)
    outs = []
    for most in (None, MOST):
        dispatcher = ContiguousAllToAll(Group(), 32, ops, most)
        arrived = dispatcher.dispatch(quantize_1x128(x) if fp8 else x, slots, weights).wait()
        assert isinstance(arrived, Sliced if most else Contiguous)
        outs.append(dispatcher.combine(*experts(lambda arrived=arrived: arrived), x).wait())
    assert outs[0].dtype == outs[1].dtype and outs[0].std() > 1 / 2
    torch.testing.assert_close(*outs, rtol=0.02 if fp8 else 1e-5, atol=0.02 if fp8 else 1e-5)


def test_on_one_rank_the_number_of_rows_does_not_depend_on_the_routing() -> None:
    """So the host need not learn it, and a CUDA graph can hold it. Rows that are not needed come last."""
    generator, shapes = torch.Generator().manual_seed(4), set()
    contiguous, _ = plain_dispatchers(Group(), EXPERTS, Ops(alignment=8))
    for kind in ("random", "ragged", "one rank", "nowhere"):
        x, slots = torch.randn(ROWS, HIDDEN, generator=generator), routing(kind, ROWS, EXPERTS, generator)
        weights = torch.rand(ROWS, TOP_K, generator=generator)
        arrived = contiguous.dispatch(x, slots, weights).wait()
        shapes.add(arrived.x.shape)
        used = sum(-(-int((slots == e).sum()) // 8) * 8 for e in range(EXPERTS))
        ranges = arrived.groups.ranges()
        assert sum(end - start for start, end in ranges) == (slots >= 0).sum() and ranges[-1][1] <= used
        got = contiguous.combine(apply_experts(arrived, 0), arrived.way_back).wait()
        terms = torch.stack([expert(x, slots[:, k, None]) * weights[:, k, None] for k in range(TOP_K)], 1)
        torch.testing.assert_close(got, terms.masked_fill(slots[..., None] < 0, 0).sum(1))
    assert shapes == {((ROWS * TOP_K + EXPERTS * 7) // 8 * 8, HIDDEN)}
