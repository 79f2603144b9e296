"""Any map of experts, with any replicas, gives the same tokens; a recording has the number of tokens per expert."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from disagg.engine import Engine
from disagg.experts import balance_stats, balanced, make_placement
from disagg.front.metrics import Metrics
from disagg.interrupt import Interrupt
from kernels.ops import Ops
from model.config import ModelConfig
from parallel.eplb import balance, balancedness
from parallel.load_counter import LoadCounter, load_recording, save_recording
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from tests.test_worlds import SETTINGS, one_run
from tests.worlds import run_world, sub_mesh

EXTRA = 4  # redundant experts: 36 slots, for 3, 6 and 12 ranks


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_nearest_replica_is_chosen_and_equal_ones_take_turns(
    nodes: int, ranks_per_node: int, slots_per_rank: int, seed: int
) -> None:
    ranks, generator = nodes * ranks_per_node, torch.Generator().manual_seed(seed)
    slots = ranks * slots_per_rank
    experts = int(torch.randint(1, slots + 1, (), generator=generator))
    rest = torch.randint(experts, (2, slots - experts), generator=generator)
    of_slot = torch.cat((torch.arange(experts).expand(2, -1), rest), 1)
    of_slot = of_slot.gather(1, torch.rand(of_slot.shape, generator=generator).argsort(1))
    chosen = torch.stack(
        [Placement.of_map(of_slot, experts, ranks, r, ranks_per_node).slot_of_expert for r in range(ranks)]
    )  # [ranks, layers, E]
    for layer in range(2):
        for e in range(experts):
            homes = [(slot, slot // slots_per_rank) for slot in (of_slot[layer] == e).nonzero()[:, 0].tolist()]
            far_only = []
            for rank in range(ranks):
                slot = int(chosen[rank, layer, e])
                how_far = {s: (r != rank) + (r // ranks_per_node != rank // ranks_per_node) for s, r in homes}
                assert how_far[slot] == min(how_far.values()), "a nearer replica, or another expert"
                if min(how_far.values()) == 2:
                    far_only.append(slot)
            if len(homes) > 1 and len(far_only) == ranks - ranks_per_node and nodes == 2:
                counts = [far_only.count(slot) for slot, _ in homes]
                assert max(counts) - min(counts) <= 1, "ranks that are as far from all do not take turns"


def test_tokens_stay_on_their_node_where_a_balanced_map_has_the_expert_there() -> None:
    """Four ranks on two nodes, and hot experts with replicas on both."""
    loads, chances = torch.randint(1, 100, (6, 8)) ** 2, 0
    for rank in range(4):
        placement = balanced(loads, 16, 1, Mesh(rank, 4, ep=Group(4, rank), node_of_rank=(0, 0, 1, 1)))
        for layer, row in enumerate(placement.expert_of_slot):
            for expert in range(8):
                nodes = ((row == expert).nonzero()[:, 0] // 8).tolist()
                used = int(placement.slot_of_expert[layer, expert]) // 8
                chances += {0, 1} <= set(nodes)
                assert used == rank // 2 or rank // 2 not in nodes, (rank, layer, expert)
    assert chances > 20, "the maps leave nothing to choose"


def test_a_group_of_experts_stays_on_its_node() -> None:
    """Four groups of two experts each, on two nodes. With groups as here, half of the experts can be on each node."""
    mesh = Mesh(0, 4, ep=Group(4, 0), node_of_rank=(0, 0, 1, 1))
    of_slot = balanced(torch.arange(1, 49).view(6, 8) ** 2, 16, 4, mesh).expert_of_slot
    for layer in of_slot.view(6, 2, 8) // 2:
        assert not set(layer[0].tolist()) & set(layer[1].tolist()), layer


def test_the_recorder_counts_tokens_of_experts() -> None:
    of_slot = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    load_counter = LoadCounter(Placement(torch.zeros(2, 3), of_slot, 2), 3)
    load_counter.add(0, torch.tensor([[0, 1], [3, -1], [3, 2]]))
    load_counter.add(1, torch.tensor([[1, 0], [-1, -1]]))
    load_counter.add(1, torch.tensor([[2, 3]]))
    assert load_counter.total().tolist() == [[3, 1, 1], [1, 1, 2]]
    load_counter.add(1, torch.tensor([[0, 1]]))
    assert load_counter.total().tolist() == [[3, 1, 1], [1, 1, 4]]
    load_counter.forget()
    assert load_counter.total().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_recording_survives_the_file(tmp_path: Path) -> None:
    windows = [torch.randint(100, (2, 5)) for _ in range(3)]
    save_recording(tmp_path / "r.safetensors", windows, 2, 5)
    for shape in ((2, 5), ()):
        assert torch.equal(load_recording(tmp_path / "r.safetensors", *shape), torch.stack(windows))


def test_a_recording_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/absent/r: the recording cannot be written"):
        save_recording(tmp_path / "absent" / "r", [], 2, 5)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    with pytest.raises(ValueError, match=f"{path}: not a recording"):
        load_recording(path, 2, 5)
    path.write_text("text")
    with pytest.raises(ValueError, match=f"{path}: not a recording"):
        load_recording(path, 2, 5)
    save_file({"counts": torch.zeros(1, 2, 6)}, path)
    with pytest.raises(ValueError, match=r"it has counts \[1, 2, 6\], must be \[windows, 2, 5\]"):
        load_recording(path, 2, 5)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it has no tensor `counts`"):
        load_recording(path, 2, 5)
    huge = torch.full((3, 1, 1), 2**62)
    for counts in (torch.full((1, 2, 5), -1), torch.full((1, 2, 5), float("nan")), torch.ones(1, 2, 5), huge):
        save_file({"counts": counts}, path)
        with pytest.raises(ValueError, match="counts must be int64, not negative, and less than 2\\^63 together"):
            load_recording(path)
    for windows in ([], [torch.zeros(2, 5, dtype=torch.int64)]):
        save_recording(path, windows, 2, 5)
        with pytest.raises(ValueError, match=f"{path}: no tokens were recorded"):
            load_recording(path)


def test_slots_that_do_not_divide_are_refused(tiny: Path) -> None:
    config, mesh = ModelConfig.from_pretrained(tiny), Mesh(ep=replace(Mesh().ep, size=5))
    with pytest.raises(ValueError, match=r"--redundant-experts\) % ranks must be 0, not \(32 \+ 4\) % 5 = 1"):
        make_placement(config, mesh, EXTRA, None)


def skewed(config: ModelConfig) -> Tensor:
    """Another load in each layer."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(config.num_moe_layers, config.n_routed_experts, generator=generator).argsort(1)
    return (1000 / (1 + ranks)).long()


def body(rank: int, tiny: Path, scratch: Path) -> None:
    config, interrupt = ModelConfig.from_pretrained(tiny), Interrupt()
    skew = scratch / "skew.safetensors"
    if rank == 0:
        save_recording(skew, [skewed(config)], config.num_moe_layers, config.n_routed_experts)
    dist.barrier()
    alone = sub_mesh(0, 1)
    engine = None
    if alone is not None:
        recording = replace(SETTINGS, record_experts=str(scratch / "one.safetensors"))
        engine = Engine.from_pretrained(recording, config, tiny, alone, Ops())
    expected = one_run([("unified", engine, alone)], tiny, interrupt)
    if engine is not None:
        engine.close()
    mesh, other = sub_mesh(0, 3), scratch / f"other-{rank}.safetensors"
    if mesh is not None:
        save_recording(other, [skewed(config).roll(rank, 1)], config.num_moe_layers, config.n_routed_experts)
        with pytest.raises(ValueError, match="the ranks have 3 different maps; all must read the same one"):
            make_placement(config, mesh, EXTRA, str(other))
    arrangements = ((3, 1, None, "off"), (6, 1, str(skew), "on"), (6, 2, str(skew), "off"))
    for size, attn_tp, recording, overlap in arrangements:
        mesh = sub_mesh(0, size, attn_tp)
        engine, path = None, scratch / f"{size}x{attn_tp}.safetensors"
        if mesh is not None:
            changes = {"redundant_experts": EXTRA, "expert_map": recording, "record_experts": str(path)}
            engine = Engine.from_pretrained(replace(SETTINGS, overlap=overlap, **changes), config, tiny, mesh, Ops())
            assert engine.model.placement.num_slots == config.n_routed_experts + EXTRA
        got = one_run([("unified", engine, mesh)], tiny, interrupt)
        assert got == expected or rank, f"{size} ranks, {attn_tp=}, {recording}: {got} instead of {expected}"
        if engine is not None:
            stats = engine.stats()
            engine.close()
            if rank == 0:
                check_stats(stats, path, engine)
    dist.barrier()
    if rank == 0:
        check_recordings(scratch, config)


def check_stats(stats: dict[str, float], path: Path, engine: Engine) -> None:
    """The metric is that of the recording, under the map."""
    loads, placement = load_recording(path).sum(0).numpy(), engine.model.placement
    by_layer = balancedness(loads, placement.expert_of_slot.numpy(), placement.ep_size)
    assert stats == {"balancedness": by_layer.mean()} | {f"balancedness_{i}": one for i, one in enumerate(by_layer)}
    assert 0 < by_layer.min() < by_layer.max() <= 1
    metrics = Metrics()
    metrics.replica_left("unified", stats)
    says = f"balancedness {by_layer.mean():.3f} (layers {by_layer.min():.3f} to {by_layer.max():.3f})"
    assert f"\n     experts  unified: {says}, of all that was recorded" in metrics.table()


def test_a_model_without_experts_has_no_balance() -> None:
    assert (
        balance_stats(balancedness(torch.zeros(0, 4).numpy(), torch.zeros(0, 4, dtype=torch.int64).numpy(), 2), 0) == {}
    )


def check_recordings(scratch: Path, config: ModelConfig) -> None:
    """As many copies as there were tokens, whatever the ranks and maps; and the very same experts."""
    shape = config.num_moe_layers, config.n_routed_experts
    one = load_recording(scratch / "one.safetensors", *shape).sum(0)
    assert (one.sum(1) == one.sum(1)[0]).all() and one.sum(1)[0] % config.num_experts_per_tok == 0
    for name in ("3x1", "6x1", "6x2"):
        counts = load_recording(scratch / f"{name}.safetensors", *shape).sum(0)
        assert (counts.sum(1) == counts.sum(1)[0]).all()
        assert (counts - one).abs().sum() <= 0.05 * one.sum(), "other experts than one rank's"  # and a step too many


def test_any_map_gives_the_same_tokens(small: Path, tmp_path: Path) -> None:
    run_world(6, body, small, tmp_path, timeout_s=280)


def test_a_map_is_better_balanced_than_none(tiny: Path) -> None:
    config = ModelConfig.from_pretrained(tiny)
    loads = skewed(config).numpy()
    plain = Placement.identity(config.num_moe_layers, 32, 4).expert_of_slot.numpy()
    assert balancedness(loads, balance(loads, 32, 4), 4).mean() > balancedness(loads, plain, 4).mean()
