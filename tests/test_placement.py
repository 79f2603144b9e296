"""Which slot holds which expert, and which ranks form a group: the arithmetic, without a job."""

from collections import Counter

import pytest
import torch

from parallel.mesh import Group, Mesh, pick_device
from parallel.placement import Placement


@pytest.mark.parametrize("num_experts, ep_size", ((8, 1), (8, 2), (8, 8), (256, 32)))
def test_identity_puts_every_expert_into_its_own_slot_in_rank_order(num_experts: int, ep_size: int) -> None:
    placement = Placement.identity(3, num_experts, ep_size)
    assert placement.num_slots == num_experts
    assert placement.slots_per_rank * ep_size == num_experts
    for layer in range(3):
        held = [placement.experts_on(rank, layer) for rank in range(ep_size)]
        assert all(len(experts) == placement.slots_per_rank for experts in held)
        assert [expert for experts in held for expert in experts] == list(range(num_experts))
    experts = torch.tensor([[7, 0], [3, 5]])
    assert placement.slot_of_expert[2][experts].equal(experts)


@pytest.mark.parametrize(
    "num_experts, ep_size, equation", ((10, 4, "10 % 4 = 2"), (8, 3, "8 % 3 = 2"), (4, 8, "4 % 8"))
)
def test_experts_that_do_not_divide_over_the_ranks_are_refused_with_the_equation(
    num_experts: int, ep_size: int, equation: str
) -> None:
    with pytest.raises(ValueError, match=f"n_routed_experts % ranks must be 0, not {equation}"):
        Placement.identity(1, num_experts, ep_size)


def test_slots_follow_the_map_of_their_own_layer() -> None:
    orders = torch.stack([torch.randperm(12) for _ in range(4)])  # the expert in each slot, a layer a row
    placement = Placement(orders.argsort(), orders, ep_size=3)
    experts = torch.randint(12, (50, 6))
    for layer in range(4):
        slots = placement.slot_of_expert[layer][experts]
        assert slots.shape == experts.shape and slots.dtype == torch.int64
        assert orders[layer][slots].equal(experts), "the slot does not hold the expert"
        for token, slot in zip(experts.flatten().tolist(), slots.flatten().tolist(), strict=True):
            assert placement.experts_on(slot // 4, layer)[slot % 4] == token


@pytest.mark.parametrize("ranks_per_node", (None, 2, 3))
def test_a_rank_uses_the_nearest_replica_and_ranks_that_are_as_near_take_turns(ranks_per_node: int | None) -> None:
    """On itself, else on its node, else anywhere: worked out anew, slot by slot. Equal choices are used equally."""
    ranks, local, experts, layers = 6, 3, 7, 20
    rest = torch.randint(experts, (layers, ranks * local - experts))
    of_slot = torch.cat((torch.arange(experts).expand(layers, -1), rest), 1)
    of_slot = of_slot.gather(1, torch.rand(of_slot.shape).argsort(1))
    per_node = ranks_per_node or ranks
    used: dict[int, Counter] = {}  # by how many replicas are as near: how often each of them is chosen
    for rank in range(ranks):
        placement = Placement.of_map(of_slot, experts, ranks, rank, ranks_per_node)
        for layer in range(layers):
            for expert in range(experts):
                slots = [slot for slot in range(ranks * local) if of_slot[layer, slot] == expert]
                mine = [slot for slot in slots if slot // local == rank]
                near = [slot for slot in slots if slot // local // per_node == rank // per_node]
                choice = mine or near or slots
                chosen = placement.slot_of_expert[layer, expert].item()
                assert chosen in choice, (layer, expert, rank)
                used.setdefault(len(choice), Counter())[choice.index(chosen)] += 1
    assert {1, 2, 3} <= used.keys()
    for count in (2, 3):
        assert min(used[count][i] for i in range(count)) > 0.6 * used[count].total() / count, used[count]


def test_the_two_tables_do_not_share_memory() -> None:
    """Experts are moved by writing into the tables, one after the other."""
    placement = Placement.identity(2, 4, 2)
    placement.expert_of_slot[0, 0] = 3
    assert placement.slot_of_expert[0, [0, 3]].tolist() == [0, 3]
    assert placement.experts_on(0, 1) == [0, 1], "a layer shares its row with another"


def test_a_placement_has_a_map_of_its_own() -> None:
    """Whoever made it may go on to change the map that it was made from."""
    of_slot = torch.arange(4).repeat(2, 1)
    placement = Placement.of_map(of_slot, 4, 2)
    of_slot[0, 0] = 3
    assert placement.expert_of_slot[0].tolist() == [0, 1, 2, 3]


def test_a_layers_row_is_replaced_in_place_in_both_tables() -> None:
    """CUDA graphs read at these addresses."""
    placement, source = Placement.identity(3, 8, 2), Placement.of_map(torch.arange(8).flip(0).repeat(2, 1), 8, 2)
    tables = placement.slot_of_expert, placement.expert_of_slot
    at = [table.data_ptr() for table in tables]
    placement.replace(1, source, 0)
    for layer in range(3):
        wanted = torch.arange(8).flip(0) if layer == 1 else torch.arange(8)
        assert all(table[layer].equal(wanted) for table in tables), layer
    assert at == [table.data_ptr() for table in (placement.slot_of_expert, placement.expert_of_slot)]


def test_every_collective_in_a_group_of_one_gives_back_what_it_got() -> None:
    group, x = Group(), torch.randn(5, 3)
    before = x.clone()
    for result in (
        group.scatter(x),
        group.reduce_scatter(x),
        group.all_gather(x),
        group.all_reduce(x),
        group.all_to_all(x).wait(),
        group.all_to_all(x, [5], [5]).wait(),
    ):
        assert result.equal(before) and result.data_ptr() == x.data_ptr()
    assert group.exchange({"a": 1}, dict[str, int]) == [{"a": 1}]
    assert group.share(5) == 5
    assert group.all_to_all(x[:0], [0], [0]).wait().shape == (0, 3)


def test_a_group_shares_rows_evenly_and_each_rank_takes_its_own() -> None:
    x = torch.arange(12).view(6, 2)
    assert torch.cat([Group(3, rank).scatter(x) for rank in range(3)]).equal(x)
    assert Group(3, 1).scatter(x).tolist() == [[4, 5], [6, 7]]
    with pytest.raises(AssertionError, match="num_rows=7"):
        Group(3).share(7)


def test_the_mesh_of_one_process_needs_no_job() -> None:
    mesh = Mesh()
    assert (mesh.rank, mesh.size, mesh.device) == (0, 1, torch.device("cpu"))
    assert mesh.attn == mesh.ep == Group(1, 0, None)
    assert (mesh.replica, mesh.num_replicas, mesh.leads) == (0, 1, True)
    assert mesh.agree(3, 0, -1) == [[3, 0, -1]]
    mesh.close()


@pytest.mark.parametrize("attn_tp", (1, 2, 4))
def test_replicas_are_the_rows_of_the_drawing(attn_tp: int) -> None:
    rows: dict[int, list[int]] = {}
    for rank in range(8):
        mesh = Mesh(rank, 8, attn=Group(attn_tp, rank % attn_tp), ep=Group(8, rank))
        rows.setdefault(mesh.replica, []).append(rank)
        assert mesh.leads == (rank % attn_tp == 0)
        assert mesh.num_replicas == 8 // attn_tp
    assert [rows[row] for row in sorted(rows)] == torch.arange(8).reshape(-1, attn_tp).tolist()


def test_create_outside_torchrun_is_a_mesh_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Mesh.create(device="cpu") == Mesh()


@pytest.mark.parametrize("size, attn_tp, equation", (("1", 2, "1 % 2 = 1"), ("8", 3, "8 % 3 = 2")))
def test_ranks_that_do_not_divide_into_replicas_are_refused_with_the_equation(
    size: str, attn_tp: int, equation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"ranks % --attn-tp must be 0, not {equation}"):
        Mesh.create(attn_tp, "cpu")


def test_the_cpu_can_always_be_picked() -> None:
    assert pick_device("cpu", 3) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: this machine has no CUDA GPU"):
        pick_device("cuda")
