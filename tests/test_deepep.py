"""DeepEP without a GPU: when it is chosen, why it is refused, and one low-latency operation at a time.

A double plays the library for one rank, records our calls and checks them. tests/test_gpu_deepep.py runs the real
library on one machine. Over several machines it never ran: tests/test_deepep_machines.py has the double alone.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import ref
from kernels.addends import summed
from kernels.ops import Ops
from parallel import deepep
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP, obstacles
from parallel.deepep_sizes import Sizes, low_latency_misfits, misfits, normal_misfits
from parallel.dispatch import ContiguousAllToAll, LocalContiguous, LocalMasked, MaskedAllToAll, Sliced
from parallel.dispatchers import Dispatchers, make_dispatchers
from parallel.mesh import Group, Mesh
from tests.deepep_double import Library, group_of
from tests.deployment import run
from tests.test_dispatch import MOST, TOP_K, apply_experts, expert, routing

GPU = torch.device("cuda", 0)  # only named, never used
OVER_RDMA = (16, 24, 32, 48, 64, 96, 128, 144, 160)
SEVERAL = f"ranks on several machines must be one of {', '.join(map(str, OVER_RDMA))}"
V3 = Sizes(ranks=8, ranks_per_node=8, num_slots=288, hidden=7168, top_k=8, capacity=256, dtype="bfloat16")
HIDDEN, SLOTS = 2048, 12  # slots of two ranks


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    """deep_ep imports, and the GPU is a Hopper. Gives what was made."""
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=Library))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Library, "made", [])
    monkeypatch.setattr(Library, "num_sms", 20)
    monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)
    return Library.made


def choose(choice: str = "auto", mesh: Mesh | None = None, **changed: object) -> Dispatchers:
    sizes = {"num_slots": 288, "hidden": 7168, "top_k": 8, "capacity": 64} | changed
    return make_dispatchers(choice, mesh or Mesh(), Ops(), torch.bfloat16, **sizes)


def mesh_of(monkeypatch: pytest.MonkeyPatch, *others: object, device: torch.device = GPU) -> Mesh:
    """Rank 0 of a job whose other ranks give these answers; None: the same as rank 0."""
    monkeypatch.setattr(Group, "exchange", lambda self, mine, kind: [mine, *(other or mine for other in others)])
    return Mesh(0, len(others) + 1, device, Group(), group_of(len(others) + 1))


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({"ranks": 1}, ["ranks must be 2 to 8 or a multiple of 8, not 1"]),
        ({"ranks": 12}, ["ranks must be 2 to 8 or a multiple of 8, not 12"]),
        ({"num_slots": 290}, ["physical experts % ranks must be 0, not 290 % 8 = 2"]),
        ({"num_slots": 1856, "capacity": 64}, ["physical experts must be at most 1848, not 1856"]),
        (
            {"hidden": 512},
            ["hidden size must be one of 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, not 512"],
        ),
        ({"top_k": 12}, ["experts a token must be at most 11, not 12"]),
        ({"capacity": 1025}, ["tokens a rank dispatches in a decode step must be at most 1024, not 1025"]),
        (
            {"num_slots": 584, "capacity": 1024},
            ["low latency's buffer must be under 32 GiB, not 32.4: 584 physical experts x 1024 tokens"],
        ),
        ({"dtype": "float32"}, ["needs bfloat16, not float32"]),
        ({"ranks": 6}, []),
        ({"ranks": 6, "ranks_per_node": 3}, []),
        ({}, []),
        (
            {"hidden": 512, "top_k": 12},
            [
                "hidden size must be one of 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, not 512",
                "experts a token must be at most 11, not 12",
            ],
        ),
    ],
)
def test_low_latency_rules(changed: dict, reasons: list[str]) -> None:
    assert low_latency_misfits(replace(V3, **changed)) == reasons


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({"ranks": 6, "ranks_per_node": 6}, ["ranks on one machine must be one of 2, 4, 8, not 6"]),
        ({"num_slots": 8200}, ["physical experts / ranks must be at most 1024, not 8200 / 8 = 1025"]),
        ({}, []),
        *(({"ranks": ranks, "num_slots": 3 * ranks, "top_k": 8}, []) for ranks in OVER_RDMA),
        *(({"ranks": ranks, "num_slots": 4 * ranks}, [f"{SEVERAL}, not {ranks}"]) for ranks in (40, 56, 72, 80, 320)),
        (
            {"ranks": 8, "ranks_per_node": 4},
            [f"{SEVERAL}, not 8", "ranks of a machine must be 8, not 4"],
        ),
        ({"ranks": 16, "ranks_per_node": 4}, ["ranks of a machine must be 8, not 4"]),
        ({"ranks": 16, "ranks_per_node": None}, ["machines must have equally many ranks, numbered in a row"]),
        ({"ranks": 16, "num_slots": 1040}, ["physical experts of a machine must be at most 512, not 520"]),
        (
            {"ranks": 96, "top_k": 9},
            ["machines that a token goes to must be at most 8, not min(12 machines, 9 experts)"],
        ),
        ({"ranks": 16, "hidden": 8192}, ["bytes of a token over RDMA must be at most 16376, not 16464"]),
    ],
)
def test_normal_rules(changed: dict, reasons: list[str]) -> None:
    assert normal_misfits(replace(V3, **changed)) == reasons


def test_a_job_that_only_prefills_needs_normal_mode() -> None:
    decode = replace(V3, ranks=72)
    assert misfits(decode) == [] and misfits(decode, decodes=False) == [f"{SEVERAL}, not 72"]
    assert misfits(V3, decodes=False) == []


def test_obstacles_of_the_machine(library: list[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacles(V3, torch.device("cpu")) == ["no GPU"] and obstacles(V3, GPU) == []
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    (reason,) = obstacles(V3, GPU)
    assert reason.startswith("deep_ep does not import (ModuleNotFoundError: ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert obstacles(V3, GPU) == ["needs Hopper"]


def test_one_rank_sends_nothing() -> None:
    dispatchers = choose()
    assert isinstance(dispatchers.contiguous, LocalContiguous) and isinstance(dispatchers.masked, LocalMasked)
    assert dispatchers.why == "none: one rank holds every expert" and dispatchers.num_bytes == 0
    dispatchers.close()


def test_a_cpu_gets_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = mesh_of(monkeypatch, None, device=torch.device("cpu"))
    dispatchers = choose(mesh=mesh)
    assert isinstance(dispatchers.contiguous, ContiguousAllToAll) and isinstance(dispatchers.masked, MaskedAllToAll)
    assert dispatchers.why == "all-to-all over gloo (DeepEP: no GPU)"
    assert choose("all_to_all", mesh).why == "all-to-all over gloo (forced)"
    with pytest.raises(ValueError, match="^--backend dispatch=deepep: no GPU$"):
        choose("deepep", mesh)
    with pytest.raises(ValueError, match="^--backend dispatch=nccl: it is one of auto, deepep, all_to_all$"):
        choose("nccl", mesh)


def test_deepep_is_chosen_by_all_ranks_or_none(library: list[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    dispatchers = choose(mesh=mesh_of(monkeypatch, None), capacity=63)
    assert isinstance(dispatchers.contiguous, ContiguousDeepEP) and isinstance(dispatchers.masked, MaskedDeepEP)
    assert dispatchers.why == "DeepEP" and dispatchers.buffer.capacity == 64  # 2 ranks * 63 is not a multiple of 4
    given = library[0].given
    assert given.num_nvl_bytes == Library.get_combine_config(2).get_nvl_buffer_size_hint(2 * 7168, 2)
    assert given.num_rdma_bytes == Library.get_low_latency_rdma_size_hint(64, 7168, 2, 288)
    assert given.num_nvl_bytes + given.num_rdma_bytes == dispatchers.num_bytes
    assert given.num_qps_per_rank == 144 and given.allow_nvlink_for_low_latency_mode
    dispatchers.close()
    assert library[0].log == ["destroy"]
    assert choose("all_to_all", mesh_of(monkeypatch, None)).why == "all-to-all over NCCL (forced)"
    other = mesh_of(monkeypatch, ["needs Hopper", "no memory"])
    assert choose(mesh=other).why == "all-to-all over NCCL (DeepEP: needs Hopper (rank 1); no memory (rank 1))"
    with pytest.raises(ValueError, match=r"^--backend dispatch=deepep: needs Hopper \(rank 1\); no memory \(rank 1\)$"):
        choose("deepep", other)
    other = mesh_of(monkeypatch, ["needs bfloat16, not float32", "no memory"])
    sizes = {"num_slots": 288, "hidden": 7168, "top_k": 8, "capacity": 64}
    with pytest.raises(ValueError, match=r"dispatch=deepep: needs bfloat16, not float32; no memory \(rank 1\)$"):
        make_dispatchers("deepep", other, Ops(), torch.float32, **sizes)
    assert len(library) == 1


@pytest.mark.parametrize(("capacity", "depth"), [(510, None), (511, None), (512, "2048"), (1024, "4096")])
def test_the_queues_hold_a_full_dispatch(
    capacity: int, depth: str | None, library: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepep.os, "environ", {})
    DeepEPBuffer(group_of(4), 32, 7168, capacity)
    assert deepep.os.environ.get("NVSHMEM_QP_DEPTH") == depth


def test_sms_come_in_pairs(library: list[Library]) -> None:
    with pytest.raises(ValueError, match="num_sms % 2 must be 0, not 21 % 2 = 1"):
        DeepEPBuffer(group_of(4), 32, 7168, 64, num_sms=21)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", ["random", "ragged", "nowhere"])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_both_modes_equal_the_local_computation(
    tokens: int, kind: str, fp8: bool, library: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "row_dtype", torch.float32)
    monkeypatch.setattr(Library, "experts", expert)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    slots, weights = routing(kind, tokens, SLOTS, generator), torch.rand(tokens, TOP_K, generator=generator)
    rows = ref.dequantize_1x128(*ref.quantize_1x128(x)) if fp8 else x
    copies = expert(rows[:, None], slots[..., None].float()) * weights[..., None]
    plus = torch.randn(tokens, HIDDEN, generator=generator)
    expected = copies.masked_fill(slots[..., None] < 0, 0).sum(1) + plus
    buffer = DeepEPBuffer(group_of(2), SLOTS, HIDDEN, 20)
    padded = ContiguousDeepEP(buffer, Ops(alignment=8))  # `ref.ep_scatter` holds the counts to what came
    sliced = ContiguousDeepEP(buffer, Ops(alignment=8), MOST)
    for dispatcher in (padded, sliced, ContiguousDeepEP(buffer, Ops()), MaskedDeepEP(buffer, fp8)):
        given = ref.quantize_1x128(x) if fp8 and not dispatcher.casts else x
        arrived = dispatcher.dispatch(given, slots, weights).wait()
        assert (arrived.scale is not None) == fp8
        assert isinstance(arrived, Sliced) == (dispatcher is sliced and tokens == 20 and kind != "nowhere")
        if fp8 and not isinstance(arrived, Sliced):
            rows = ref.dequantize_1x128(arrived.x, arrived.scale)
            arrived = type(arrived)(rows, *list(vars(arrived).values())[1:3])
        back = dispatcher.combine(apply_experts(arrived, 0), arrived.way_back, plus).wait()
        out = summed(back, ref.ep_gather)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def some(tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    slots = torch.zeros(tokens, TOP_K, dtype=torch.int64)
    return torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16), slots, torch.zeros(tokens, TOP_K)


def test_one_low_latency_operation_at_a_time(library: list[Library]) -> None:
    buffer = DeepEPBuffer(group_of(2), SLOTS, HIDDEN, 20)
    first, second = MaskedDeepEP(buffer), MaskedDeepEP(buffer)
    pending = first.dispatch(*some())
    with pytest.raises(AssertionError, match="low-latency dispatch 1 started while dispatch 0 was not waited for"):
        second.dispatch(*some())
    arrived = pending.wait()
    with pytest.raises(AssertionError, match="low-latency dispatch 0 was waited for twice"):
        pending.wait()
    pending = first.combine(arrived.x, arrived.way_back)
    with pytest.raises(AssertionError, match="low-latency dispatch 2 started while combine 1 was not waited for"):
        second.dispatch(*some())
    with pytest.raises(AssertionError, match="low-latency combine 2 started while combine 1 was not waited for"):
        second.combine(arrived.x, arrived.way_back)
    pending.wait()
    assert library[0].log == ["low-latency dispatch", "received", "low-latency combine", "received"]
    with pytest.raises(AssertionError, match="num_tokens=21 over self.capacity=20"):
        first.dispatch(*some(21))


def test_cleaned_once_after_normal_steps(library: list[Library]) -> None:
    buffer = DeepEPBuffer(group_of(2), SLOTS, HIDDEN, 20)
    normal, low_latency, log = ContiguousDeepEP(buffer, Ops()), MaskedDeepEP(buffer), library[0].log
    low_latency.dispatch(*some()).wait()
    assert "clean" not in log
    for _ in range(2):
        normal.dispatch(*some()).wait()
    for _ in range(2):
        low_latency.dispatch(*some()).wait()
    assert log.count("clean") == 1 and log[-5:-3] == ["clean", "low-latency dispatch"], log
    normal.dispatch(*some()).wait()
    buffer.prepare_low_latency()
    buffer.prepare_low_latency()
    assert log[-2:] == ["waited", "clean"]


def test_the_rows_of_a_normal_dispatch_leave_at_wait(library: list[Library]) -> None:
    """What is enqueued in between keeps the GPU busy while the host waits for the counts."""
    pending = ContiguousDeepEP(DeepEPBuffer(group_of(2), SLOTS, HIDDEN, 20), Ops()).dispatch(*some())
    assert library[0].log == ["layout"]
    pending.wait()
    assert library[0].log == ["layout", "dispatch", "waited"]


def test_low_latency_takes_no_quantised_rows(library: list[Library]) -> None:
    x, slots, weights = some()
    with pytest.raises(AssertionError, match="low latency casts to fp8 itself"):
        MaskedDeepEP(DeepEPBuffer(group_of(2), SLOTS, HIDDEN, 20), fp8=True).dispatch(
            ref.quantize_1x128(x), slots, weights
        )


def test_the_flag() -> None:
    flags = ("--model", "model/tiny", "--prompt", "x", "--max-tokens", "1")
    code, _, err = run(*flags, "--backend", "dispatch=deepep")
    assert code == 2 and "run.py: error: --backend dispatch=deepep: no GPU" in err
    code, _, err = run(*flags)
    assert code == 0 and "dispatch: none: one rank holds every expert" in err
