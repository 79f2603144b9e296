"""DeepEP over several machines, by a double: what is created, what is called, and what keeps it from serving.

No machine with RDMA has run this. The double holds every call to the wheel's signatures and to the assertions of its
sources, and it plays the other ranks. Values are small integers, so that sums in bf16 are exact.
"""

import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from disagg.config import EngineConfig
from disagg.engine import Engine
from kernels.addends import summed
from kernels.ops import Ops
from model.config import ModelConfig
from parallel import rdma
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP
from parallel.deepep_sizes import QUEUE_ROWS, Sizes, buffer_bytes
from parallel.dispatch import Contiguous, ContiguousAllToAll, Masked, MaskedAllToAll
from parallel.dispatchers import Dispatchers, make_dispatchers
from parallel.mesh import Group, Mesh, machine_id, numbered
from scripts.tools.deepep_wheel import as_text, read
from tests.deepep_double import WHEEL, Library, group_of

GPU = torch.device("cuda", 0)  # only named, never used
HIDDEN, TOP_K, CAPACITY = 2048, 8, 4


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    """deep_ep imports, the GPU is a Hopper, and the machine has RDMA. Gives what was made."""
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=Library))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(rdma, "obstacles", list)
    monkeypatch.setattr(Library, "made", [])
    monkeypatch.setattr(Library, "num_sms", 20)
    monkeypatch.setattr(Library, "experts", expert)
    monkeypatch.setattr(Group, "exchange", lambda self, mine, kind: [mine] * self.size)
    monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)
    return Library.made


def expert(rows: Tensor, slots: Tensor) -> Tensor:
    """An expert that is different for each slot, in integers."""
    return rows * (1 + slots % 3) + slots % 2


def nodes(ranks: int, per_node: int = 8) -> tuple[int, ...]:
    return tuple(rank // per_node for rank in range(ranks))


def choose(ranks: int, rank: int = 0, choice: str = "auto", of: tuple[int, ...] | None = None, **more) -> Dispatchers:  # noqa: ANN003
    mesh = Mesh(rank, ranks, GPU, Group(), group_of(ranks, rank), node_of_rank=of or nodes(ranks))
    sizes = {"num_slots": 2 * ranks, "hidden": HIDDEN, "top_k": TOP_K, "capacity": CAPACITY} | more
    return make_dispatchers(choice, mesh, Ops(), torch.bfloat16, **sizes)


def tokens_of(rank: int, ranks: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * ranks + rank)
    slots = torch.rand(count, 2 * ranks, generator=generator).argsort(1)[:, :TOP_K]
    slots = slots.masked_fill(torch.rand(slots.shape, generator=generator) < 0.1, -1)
    x = torch.randint(-2, 3, (count, HIDDEN), generator=generator).bfloat16()
    return x, slots, torch.randint(1, 3, slots.shape, generator=generator).float()


def run_experts(arrived: Contiguous | Masked, first: int) -> Tensor:
    if isinstance(arrived, Masked):
        slots = first + torch.arange(len(arrived.counts)).view(-1, 1, 1)
        there = torch.arange(arrived.x.shape[1]) < arrived.counts[:, None]
        return expert(arrived.x, slots).masked_fill(~there[..., None], 0).bfloat16()
    return expert(arrived.x, first + arrived.groups.of_rows(len(arrived.x))[:, None]).bfloat16()


@pytest.mark.parametrize(("ranks", "rank"), [(16, 0), (16, 9), (72, 0), (72, 71), (144, 0), (144, 100)])
def test_tokens_reach_their_experts_and_return(
    ranks: int, rank: int, library: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's view of a job: the tokens of all ranks arrive, every rank gets its sums, in both modes in turn."""
    others = {other: tokens_of(other, ranks, other % (CAPACITY + 1)) for other in range(ranks) if other != rank}
    monkeypatch.setattr(Library, "elsewhere", others)
    dispatchers, (x, slots, weights) = choose(ranks, rank), tokens_of(rank, ranks, CAPACITY)
    copies = expert(x.float()[:, None], slots[..., None]) * weights[..., None]
    expected = copies.masked_fill(slots[..., None] < 0, 0).sum(1).bfloat16()
    both = [dispatchers.masked]
    if isinstance(dispatchers.contiguous, ContiguousDeepEP):
        both += [dispatchers.contiguous, dispatchers.masked]
    assert (len(both) == 3) == (ranks != 72)
    for dispatcher in both:
        arrived = dispatcher.dispatch(x, slots, weights).wait()
        out = summed(dispatcher.combine(run_experts(arrived, 2 * rank), arrived.way_back).wait(), Ops().ep_gather)
        assert out.equal(expected)
    assert library[0].log.count("clean") == (ranks != 72), "once, between normal mode and low latency"
    by_name = dict(library[0].calls)
    assert by_name["low_latency_dispatch"].num_experts == 2 * ranks
    if ranks != 72:
        assert by_name["dispatch"].num_tokens_per_rdma_rank.shape == (ranks // 8,)


def test_what_is_created_over_two_machines(library: list[Library]) -> None:
    """Normal mode needs a queue pair per SM, low latency one per slot. They share the memory over RDMA."""
    dispatchers, hint = choose(16), Library.get_low_latency_rdma_size_hint(CAPACITY, HIDDEN, 16, 32)
    configs = Library.get_dispatch_config(16), Library.get_combine_config(16)
    given = library[0].given
    assert dispatchers.why == "DeepEP over RDMA between 2 machines of 8 ranks"
    assert given.num_nvl_bytes == max(config.get_nvl_buffer_size_hint(2 * HIDDEN, 16) for config in configs)
    assert given.num_rdma_bytes == max(config.get_rdma_buffer_size_hint(2 * HIDDEN, 16) for config in configs) > hint
    assert given.low_latency_mode and given.num_qps_per_rank == 20
    assert dispatchers.num_bytes == given.num_nvl_bytes + given.num_rdma_bytes
    choose(16, num_slots=16 * 40)
    assert library[1].given.num_qps_per_rank == 40
    choose(16, capacity=256)
    assert library[2].given.num_rdma_bytes == Library.get_low_latency_rdma_size_hint(256, HIDDEN, 16, 32)


def test_where_normal_mode_does_not_know_the_ranks_prompts_take_the_all_to_all(library: list[Library]) -> None:
    dispatchers = choose(72, num_slots=288)
    assert isinstance(dispatchers.masked, MaskedDeepEP) and isinstance(dispatchers.contiguous, ContiguousAllToAll)
    over_rdma = "DeepEP over RDMA between 9 machines of 8 ranks"
    assert dispatchers.why.startswith(
        f"{over_rdma}; in steps with prompts all-to-all over NCCL (normal mode: ranks on "
    )
    assert dispatchers.why.endswith("24, 32, 48, 64, 96, 128, 144, 160, not 72)")
    given = library[0].given
    assert given.num_nvl_bytes == 0 and given.num_qps_per_rank == 4
    assert given.num_rdma_bytes == Library.get_low_latency_rdma_size_hint(CAPACITY, HIDDEN, 72, 288)
    with pytest.raises(AssertionError, match="the buffer was made without normal mode"):
        ContiguousDeepEP(dispatchers.buffer, Ops())
    prefill = choose(72, num_slots=288, decodes=False)
    assert isinstance(prefill.masked, MaskedAllToAll) and prefill.why.startswith("all-to-all over NCCL (DeepEP: ranks")
    with pytest.raises(ValueError, match="^--backend dispatch=deepep: ranks on several machines must be one of 16, 24"):
        choose(72, num_slots=288, decodes=False, choice="deepep")
    assert isinstance(choose(72, num_slots=288, choice="deepep").masked, MaskedDeepEP)
    assert choose(12, of=nodes(12, 6)).why.startswith(
        "all-to-all over NCCL (DeepEP: ranks must be 2 to 8 or a multiple"
    )


@pytest.mark.parametrize(
    ("of", "why"),
    [
        ((0,) * 7 + (1,) * 9, "over RDMA; in .*: machines must have equally many ranks, numbered in a row"),
        ((0, 1) * 8, "over RDMA; in .*: machines must have equally many ranks, numbered in a row"),
        (nodes(16, 4), "between 4 machines of 4 ranks; in .*: ranks of a machine must be 8, not 4"),
    ],
)
def test_normal_mode_needs_machines_of_eight(of: tuple[int, ...], why: str, library: list[Library]) -> None:
    dispatchers = choose(16, of=of)
    assert re.search(why, dispatchers.why) and isinstance(dispatchers.masked, MaskedDeepEP)
    assert library[0].given.num_nvl_bytes == 0


@pytest.mark.parametrize("ranks", [*QUEUE_ROWS, 3, 6, 40, 72, 120, 256])
def test_the_estimate_of_memory_is_the_hints(ranks: int, library: list[Library]) -> None:
    """Without the library, from its configurations. Padding at the end is all that may be missing."""
    for capacity in (5, 256):
        sizes = Sizes(ranks, min(ranks, 8), 3 * ranks, 7168, 8, capacity, "bfloat16")
        buffer = DeepEPBuffer(group_of(ranks), 3 * ranks, 7168, capacity, normal=ranks in QUEUE_ROWS)
        assert 0 <= buffer.num_bytes - buffer_bytes(sizes) <= 128


def test_what_a_machine_lacks_is_said_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NVSHMEM_IB_ENABLE_IBGDA", raising=False)
    port, state = "no RDMA port is active: /sys/class/infiniband has", tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    device = "no /dev/infiniband/uverbs*: a container must be given the RDMA devices"
    direct = "no GPUDirect RDMA: it needs the module nvidia_peermem, or the driver's open modules (dmabuf)"
    assert rdma.obstacles(tmp_path) == [f"{port} 0 ports", device, direct]
    state.mkdir(parents=True)
    (state / "state").write_text("1: DOWN\n")
    assert rdma.obstacles(tmp_path) == [f"{port} 1 ports", device, direct]
    (state / "state").write_text("4: ACTIVE\n")
    assert rdma.obstacles(tmp_path) == [device, direct]
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    (tmp_path / "dev/infiniband/uverbs0").touch()
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1\n")
    assert rdma.obstacles(tmp_path) == [direct]
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1\n")
    assert rdma.obstacles(tmp_path) == []
    version.unlink()
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    assert rdma.obstacles(tmp_path) == []
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "0")
    assert rdma.obstacles(tmp_path) == [
        "NVSHMEM_IB_ENABLE_IBGDA=0 forbids IBGDA, which DeepEP would turn on all the same"
    ]


def test_one_machine_without_rdma_keeps_deepep_from_all(
    library: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only jobs over several machines ask. All rules that fail are in the error, with the first rank of each."""
    lacking = ["no port", "no device"]
    monkeypatch.setattr(rdma, "obstacles", lambda: ["no port"])
    monkeypatch.setattr(Group, "exchange", lambda self, mine, kind: [mine] * 8 + [lacking] * 8)
    why = r"no port; no device \(rank 8\)"
    with pytest.raises(ValueError, match=f"^--backend dispatch=deepep: {why}$"):
        choose(16, choice="deepep")
    assert re.fullmatch(rf"all-to-all over NCCL \(DeepEP: {why}\)", choose(16).why)
    monkeypatch.setattr(Group, "exchange", lambda self, mine, kind: [mine] * self.size)
    assert choose(8).why == "DeepEP" and choose(8, of=nodes(8, 4)).why == "all-to-all over NCCL (DeepEP: no port)"


def test_a_wrong_call_is_noticed(library: list[Library]) -> None:
    """The double's own rules: an unknown argument, low latency after normal mode, too few queues, no such ranks."""
    buffer = DeepEPBuffer(group_of(16), 32, HIDDEN, CAPACITY)
    x, slots, weights = tokens_of(0, 16, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'number'"):
        buffer.library.low_latency_dispatch(x, slots, CAPACITY, 32, number=3)
    with pytest.raises(AssertionError):
        buffer.library.low_latency_dispatch(x, slots.int(), CAPACITY, 32, return_recv_hook=True)
    ContiguousDeepEP(buffer, Ops()).dispatch(x, slots, weights).wait()
    with pytest.raises(AssertionError, match="low latency expects zeros"):
        buffer.library.low_latency_dispatch(x, slots, CAPACITY, 32, return_recv_hook=True)
    buffer.library.qps = 2
    with pytest.raises(AssertionError, match="a queue per SM"):
        ContiguousDeepEP(buffer, Ops()).dispatch(x, slots, weights).wait()
    with pytest.raises(KeyError):
        DeepEPBuffer(group_of(72), 288, HIDDEN, CAPACITY)
    with pytest.raises(AssertionError):
        DeepEPBuffer(group_of(12), 24, HIDDEN, CAPACITY, normal=False)


def test_the_table_is_read_from_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            WHEEL["source"],
            "class Buffer:\n"
            "    def __init__(self, group, size: int = 3): pass\n"
            "    def get_dispatch_config(n):\n        return {2: Config(Buffer.num_sms, 1, 2)}[n]\n"
            "    def get_combine_config(n):\n        return {4: Config(Buffer.num_sms, 5)}[n]\n"
            "    def _hidden(self): pass\n",
        )
    found = read(wheel)
    assert found == {
        "wheel": "some-1.whl",
        "source": "deep_ep/buffers/legacy.py",
        "signatures": {
            "__init__": [["self"], ["group"], ["size", 3]],
            "get_dispatch_config": [["n"]],
            "get_combine_config": [["n"]],
        },
        "dispatch_configs": {"2": [1, 2]},
        "combine_configs": {"4": [5]},
    }
    assert json.loads(as_text(found)) == found


def test_a_job_asks_each_rank_once_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank of three, of which the last is on another machine of the same name."""
    environment = {"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.2"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # which it would set
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []

    def exchange(group: Group, mine: str, kind: type) -> list[str]:
        asked.append(mine)
        return [mine, mine, mine.split()[0] + " other-boot"]

    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(Group, "exchange", exchange)
    mesh = Mesh.create(device="cpu")
    assert mesh.node_of_rank == (0, 0, 1) and mesh.ranks_per_node is None and asked == [machine_id()]
    assert mesh.first_host == "127.0.0.2"


@pytest.mark.parametrize("decodes", [True, False])
def test_the_engine_says_whether_its_job_decodes(decodes: bool, tiny: Path) -> None:
    given: dict = {}

    def make(*args: object, **options: object) -> Dispatchers:
        given.update(options)
        return make_dispatchers(*args, **options)

    settings = EngineConfig(max_batch=2, kv_tokens=256, max_tokens_per_step=64, max_model_len=64, decodes=decodes)
    first = Engine.from_pretrained(settings, ModelConfig.from_pretrained(tiny), tiny, Mesh(), Ops())
    Engine(settings, first.model, Mesh(), make=make)
    assert given["decodes"] == decodes


def test_machines_are_told_apart() -> None:
    assert Mesh().ranks_per_node == 1 and Mesh(size=4).ranks_per_node == 4 and Mesh(size=4).nodes == 1
    for of, per_node in (((0, 0, 1, 1), 2), ((0, 1, 2, 3), 1), ((0, 1, 0, 1), None), ((0, 0, 0, 1), None)):
        mesh = Mesh(size=4, node_of_rank=of)
        assert mesh.ranks_per_node == per_node and mesh.nodes == (4 // per_node if per_node else 1)
    assert numbered(["b", "a", "b", "c"]) == (0, 1, 0, 2)
    assert machine_id() == machine_id() and len(machine_id()) > 36
