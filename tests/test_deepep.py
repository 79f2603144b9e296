"""DeepEP without a GPU: when it is chosen, why it is refused, and one low-latency operation at a time.

A stand-in plays the library for one rank and records our calls. tests/test_gpu_deepep.py runs the real library.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import ref
from kernels.ops import Ops
from parallel import deepep
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP, obstacle
from parallel.dispatch import ContiguousAllToAll, LocalContiguous, LocalMasked, MaskedAllToAll, Sliced
from parallel.dispatchers import Dispatchers, make_dispatchers
from parallel.mesh import Group, Mesh
from tests.deployment import run
from tests.test_dispatch import MOST, TOP_K, apply_experts, expert, routing

GPU = torch.device("cuda", 0)  # only named, never used
V3 = {"ranks": 8, "num_slots": 288, "hidden": 7168, "top_k": 8, "capacity": 256, "dtype": torch.bfloat16, "device": GPU}
HIDDEN = 256


class Library:
    """The calls of deep_ep.Buffer that we make, within one rank. `log` has their names in order."""

    made: list["Library"] = []

    def __init__(self, group: object, normal: int, low_latency: int, **options: object) -> None:
        self.sizes, self.options, self.log = (normal, low_latency), options, []
        Library.made.append(self)

    @staticmethod
    def set_num_sms(num_sms: int) -> None:
        pass

    @staticmethod
    def get_dispatch_config(ranks: int) -> SimpleNamespace:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: 10 * hidden_bytes)

    @staticmethod
    def get_combine_config(ranks: int) -> SimpleNamespace:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: 7 * hidden_bytes)

    @staticmethod
    def get_low_latency_rdma_size_hint(capacity: int, hidden: int, ranks: int, num_slots: int) -> int:
        return capacity * hidden * num_slots

    @staticmethod
    def capture() -> str:
        return "now"

    def get_dispatch_layout(self, slots: Tensor, num_slots: int, previous_event: str, **options: bool) -> tuple:
        assert previous_event == "now" and options == {"async_finish": True, "allocate_on_comm_stream": True}
        self.log.append("layout")
        counts = torch.bincount(slots[slots >= 0], minlength=num_slots)
        return "per rank", None, counts, (slots >= 0).any(1), "layout done"

    def dispatch(self, x: Tensor | tuple[Tensor, Tensor], **given) -> tuple:  # noqa: ANN003
        assert given["previous_event"] == "layout done" and given["async_finish"] and given["allocate_on_comm_stream"]
        self.log.append("dispatch")
        token = given["is_token_in_rank"].nonzero()[:, 0]
        rows = tuple(part[token] for part in x) if isinstance(x, tuple) else x[token]
        align = given["expert_alignment"]
        counts = [-(-count // align) * align for count in given["num_tokens_per_expert"].tolist()]
        handle = (token, len(given["topk_idx"]))
        return rows, given["topk_idx"][token], given["topk_weights"][token], counts, handle, self._event()

    def combine(self, x: Tensor, handle: tuple, **given) -> tuple:  # noqa: ANN003
        assert given["previous_event"] == "now" and given["async_finish"] and given["allocate_on_comm_stream"]
        self.log.append("combine")
        return x.new_zeros(handle[1], x.shape[1]).index_copy(0, handle[0], x), None, self._event()

    def low_latency_dispatch(
        self, x: Tensor, slots: Tensor, capacity: int, num_slots: int, use_fp8: bool, return_recv_hook: bool
    ) -> tuple:
        self.log.append("low-latency dispatch")
        room = capacity - len(x)
        x, slots = torch.cat((x, x.new_zeros(room, x.shape[1]))), torch.cat((slots, slots.new_full((room, TOP_K), -1)))
        rows, counts, index = ref.ep_scatter_masked(x, slots, num_slots)
        if use_fp8:
            values, scale = ref.quantize_1x128(rows)
            rows = values, scale.transpose(1, 2).contiguous().transpose(1, 2)
        return rows, counts, index, None, lambda: self.log.append("received")

    def low_latency_combine(
        self, y: Tensor, slots: Tensor, weights: Tensor, handle: Tensor, return_recv_hook: bool
    ) -> tuple:
        self.log.append("low-latency combine")
        out = ref.ep_gather(y.flatten(0, 1), handle[: len(slots)], weights)
        return out, None, lambda: self.log.append("received")

    def clean_low_latency_buffer(self, *sizes: int) -> None:
        self.log.append("clean")

    def destroy(self) -> None:
        self.log.append("destroy")

    def _event(self) -> SimpleNamespace:
        return SimpleNamespace(current_stream_wait=lambda: self.log.append("waited"))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    """deep_ep imports, and the GPU is a Hopper. Gives what was made."""
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=Library))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Library, "made", [])
    monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)
    return Library.made


def choose(choice: str = "auto", mesh: Mesh | None = None, **changed: object) -> Dispatchers:
    sizes = {"num_slots": 288, "hidden": 7168, "top_k": 8, "capacity": 64} | changed
    return make_dispatchers(choice, mesh or Mesh(), Ops(), torch.bfloat16, **sizes)


def mesh_of(monkeypatch: pytest.MonkeyPatch, *others: object, device: torch.device = GPU) -> Mesh:
    """Rank 0 of a job whose other ranks give these answers; None: the same as rank 0."""
    monkeypatch.setattr(Group, "exchange", lambda self, mine, kind: [mine, *(other or mine for other in others)])
    return Mesh(0, len(others) + 1, device, Group(), Group(len(others) + 1, 0))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": torch.device("cpu")}, "no GPU"),
        ({"ranks": 1}, "ranks must be one of 2, 4, 8, not 1"),
        ({"ranks": 6}, "ranks must be one of 2, 4, 8, not 6"),
        ({"num_slots": 290}, "physical experts % ranks must be 0, not 290 % 8 = 2"),
        ({"num_slots": 8200}, "physical experts / ranks must be at most 1024, not 8200 / 8 = 1025"),
        ({"hidden": 512}, "hidden size must be one of 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, not 512"),
        ({"top_k": 12}, "experts a token must be at most 11, not 12"),
        ({"capacity": 1025}, "tokens a rank dispatches in a decode step must be at most 1024, not 1025"),
        ({"dtype": torch.float32}, "needs bfloat16, not float32"),
        ({}, None),
    ],
)
def test_obstacles(changed: dict, reason: str | None, library: list[Library]) -> None:
    assert obstacle(**V3 | changed) == reason


def test_obstacles_of_the_machine(library: list[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert obstacle(**V3).startswith("deep_ep does not import (ModuleNotFoundError: ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert obstacle(**V3) == "needs Hopper"


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
    assert library[0].sizes == (10 * 2 * 7168, 64 * 7168 * 288) and sum(library[0].sizes) == dispatchers.num_bytes
    assert library[0].options["num_qps_per_rank"] == 144
    dispatchers.close()
    assert library[0].log == ["destroy"]
    assert choose("all_to_all", mesh_of(monkeypatch, None)).why == "all-to-all over NCCL (forced)"
    assert choose(mesh=mesh_of(monkeypatch, ("needs Hopper", "b"))).why == "all-to-all over NCCL (DeepEP: needs Hopper)"
    with pytest.raises(ValueError, match="^--backend dispatch=deepep: all ranks must be on one machine, not 2$"):
        choose("deepep", mesh_of(monkeypatch, (None, "another")))
    assert len(library) == 1


@pytest.mark.parametrize(("capacity", "depth"), [(510, None), (511, None), (512, "2048"), (1024, "4096")])
def test_the_queues_hold_a_full_dispatch(
    capacity: int, depth: str | None, library: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepep.os, "environ", {})
    DeepEPBuffer(Group(4), 32, 7168, capacity)
    assert deepep.os.environ.get("NVSHMEM_QP_DEPTH") == depth


def test_sms_come_in_pairs(library: list[Library]) -> None:
    with pytest.raises(ValueError, match="num_sms % 2 must be 0, not 21 % 2 = 1"):
        DeepEPBuffer(Group(4), 32, 7168, 64, num_sms=21)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", ["random", "ragged", "nowhere"])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_both_modes_equal_the_local_computation(tokens: int, kind: str, fp8: bool, library: list[Library]) -> None:
    generator = torch.Generator().manual_seed(tokens)
    num_slots, x = 6, torch.randn(tokens, HIDDEN, generator=generator)
    slots, weights = routing(kind, tokens, num_slots, generator), torch.rand(tokens, TOP_K, generator=generator)
    rows = ref.dequantize_1x128(*ref.quantize_1x128(x)) if fp8 else x
    copies = expert(rows[:, None], slots[..., None].float()) * weights[..., None]
    expected = copies.masked_fill(slots[..., None] < 0, 0).sum(1)
    buffer = DeepEPBuffer(Group(), num_slots, HIDDEN, 20)
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
        out = dispatcher.combine(apply_experts(arrived, 0), arrived.way_back).wait()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def some(tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(tokens, HIDDEN), torch.zeros(tokens, TOP_K, dtype=torch.int64), torch.zeros(tokens, TOP_K)


def test_one_low_latency_operation_at_a_time(library: list[Library]) -> None:
    buffer = DeepEPBuffer(Group(), 6, HIDDEN, 20)
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
    buffer = DeepEPBuffer(Group(), 6, HIDDEN, 20)
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
    pending = ContiguousDeepEP(DeepEPBuffer(Group(), 6, HIDDEN, 20), Ops()).dispatch(*some())
    assert library[0].log == ["layout"]
    pending.wait()
    assert library[0].log == ["layout", "dispatch", "waited"]


def test_low_latency_takes_no_quantised_rows(library: list[Library]) -> None:
    x, slots, weights = some()
    with pytest.raises(AssertionError, match="low latency casts to fp8 itself"):
        MaskedDeepEP(DeepEPBuffer(Group(), 6, HIDDEN, 20), fp8=True).dispatch(ref.quantize_1x128(x), slots, weights)


def test_the_flag() -> None:
    flags = ("--model", "model/tiny", "--prompt", "x", "--max-tokens", "1")
    code, _, err = run(*flags, "--backend", "dispatch=deepep")
    assert code == 2 and "run.py: error: --backend dispatch=deepep: no GPU" in err
    code, _, err = run(*flags)
    assert code == 0 and "dispatch: none: one rank holds every expert" in err
