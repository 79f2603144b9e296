"""Experts move while a job serves: tokens and counts stay the same, whichever experts move and when.

A rank that cannot read stops the move on all ranks. An expert in the wrong slot is detected.
"""

import io
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disagg.config import EngineConfig, Rebalance
from disagg.control.messages import Submit
from disagg.engine import Engine
from disagg.front.metrics import Metrics
from disagg.pipeline import Pipeline, Turn
from disagg.rebalance import SWITCH_S, Rebalancer, short_switches
from disagg.request import Request
from disagg.unified import Unified
from kernels.ops import Ops
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.slots import IDENTITY, Slots
from model.transformer import Transformer
from model.weights import ExpertReader, load_weights
from parallel.load_counter import LoadCounter, load_recording
from parallel.mesh import Mesh
from parallel.placement import Placement, keep_in_place
from scripts.tools.quantize import quantize_folder
from tests.deployment import read, run
from tests.news import singly
from tests.test_gpu_rebalance import check_what_arrives
from tests.test_precision import fp8, load  # noqa: F401 - a fixture
from tests.worlds import run_world, sub_mesh

FILE = "model.safetensors"
NEVER = 10**9  # steps
SETTINGS = EngineConfig(max_batch=4, max_tokens_per_step=48, kv_tokens=1024, max_model_len=256)
EXTRA = 4


def random_map(layers: int, experts: int, slots: int, seed: int) -> Tensor:
    """Every expert at least once in each layer, the others at random."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(experts, (layers, slots - experts), generator=generator)
    of_slot = torch.cat((torch.arange(experts).expand(layers, -1), rest), 1)
    return of_slot.gather(1, torch.rand(of_slot.shape, generator=generator).argsort(1))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_what_stays_on_a_rank_stays_in_its_slot(layers: int, ranks: int, local: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, wanted = torch.randint(experts, (2, layers, ranks * local), generator=generator)
    kept = keep_in_place(before, wanted, ranks)
    for old, new, got in zip(*(x.reshape(-1, local).tolist() for x in (before, wanted, kept)), strict=True):
        assert sorted(got) == sorted(new), "another rank's experts, or others"
        stay = sum(min(old.count(expert), new.count(expert)) for expert in set(old))
        assert sum(a == b for a, b in zip(old, got, strict=True)) == stay


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_counts_do_not_depend_on_the_map(seed: int, flips: int) -> None:
    layers, experts, slots = 2, 5, 8
    generator = torch.Generator().manual_seed(seed)
    placement = Placement.of_map(random_map(layers, experts, slots, seed), experts, 2)
    load_counter, counted = LoadCounter(placement, experts), torch.zeros(layers, experts, dtype=torch.int64)
    for flip in range(flips):
        other = Placement.of_map(random_map(layers, experts, slots, seed + flip), experts, 2)
        layer = flip % layers
        load_counter.fold()
        placement.replace(layer, other, layer)
        for of_layer in range(layers):
            chosen = torch.randint(experts, (7, 3), generator=generator)
            load_counter.add(of_layer, placement.slot_of_expert[of_layer][chosen])
            load_counter.add(of_layer, torch.full((2, 3), -1))
            counted[of_layer] += chosen.flatten().bincount(minlength=experts)
    assert torch.equal(load_counter.total(), counted)


# The reader gives what the loader gave.


def check_reader(folder: Path, experts: list[tuple[int, int, dict[str, Tensor]]]) -> None:
    """`experts`: MoE layer, expert, the tensors that the loader made of it."""
    config = ModelConfig.from_pretrained(folder)
    reader = ExpertReader(open_checkpoint(folder, config), config)
    parts = experts[0][2]
    into = Slots({name: torch.zeros_like(part)[None] for name, part in parts.items()} | {IDENTITY: torch.zeros(1)})
    for layer, expert, want in experts:
        for tensor in into.tensors.values():
            tensor.view(torch.uint8).fill_(0x7F)  # NaN, for the formats here
        reader.read(layer, expert, into, 0)
        assert into[0].pop(IDENTITY) == expert
        for name, part in want.items():
            assert torch.equal(into[0][name].view(torch.uint8), part.view(torch.uint8)), (layer, expert, name)
    reader.close()


def loaded(model: torch.nn.Module) -> list[tuple[int, int, dict[str, Tensor]]]:
    layers = [layer.mlp.experts for layer in model.layers if layer.is_moe]
    return [
        (i, e, {name: tensor[e] for name, tensor in experts.named_parameters()})
        for i, experts in enumerate(layers)
        for e in range(model.config.n_routed_experts)
    ]


def test_the_reader_reads_bf16_as_float32(tiny: Path) -> None:
    engine = Engine.from_pretrained(SETTINGS, ModelConfig.from_pretrained(tiny), tiny, Mesh(), Ops())
    check_reader(tiny, loaded(engine.model))


@pytest.mark.parametrize("kept", [True, False])
def test_the_reader_reads_fp8(fp8: Path, kept: bool) -> None:  # noqa: F811
    experts = loaded(load(fp8, kept))
    assert ("down_proj_scale_inv" in experts[0][2]) == kept
    check_reader(fp8, experts)


def test_the_reader_reads_partial_blocks(tiny: Path, tmp_path: Path) -> None:
    """Experts of 32 x 128: the scales' blocks are not whole."""
    quantize_folder(tiny, tmp_path / "fp8")
    check_reader(tmp_path / "fp8", loaded(load(tmp_path / "fp8", kept=False)))


def test_a_file_that_changes_is_an_error(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny / FILE, tmp_path))
    config = ModelConfig.from_pretrained(tiny)
    reader = ExpertReader(open_checkpoint(tmp_path, config), config)
    parts = {"gate_up_proj": torch.zeros(1, 64, 128), "down_proj": torch.zeros(1, 128, 32)}
    into = Slots(parts | {IDENTITY: torch.zeros(1)})
    reader.read(3, 31, into, 0)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match=f"{path}: it has changed since it was opened"):
        reader.read(3, 31, into, 0)
    (file,) = set(reader.source.shard_of.values())
    file.seen = file._stamp()  # it shrinks only now, between this look and the read
    with pytest.raises(OSError, match=f"{path}: it ends within "):
        for expert in range(32):
            reader.read(3, expert, into, 0)
    os.replace(shutil.copy(tiny / FILE, tmp_path / "new"), path)
    with pytest.raises(OSError, match="it ends within "):  # the file that was opened is still the one
        reader.read(3, 31, into, 0)


# Whole jobs, in one process.


def work(seed: int = 0, count: int = 6, tokens: int = 8) -> list[Request]:
    """`tokens`: of the first request; each later one has three more."""
    rng = random.Random(seed)
    return [
        Request(i, [rng.randrange(4096) for _ in range(rng.choice((1, 20, 65)))], tokens + 3 * i, ignore_eos=True)
        for i in range(count)
    ]


def generate(
    engine: Engine, requests: list[Request], each_turn: Callable[[int], None] = lambda turn: None
) -> list[list[int]]:
    """The tokens of each request; a new one joins every third turn. All ranks together, each with its own."""
    role, turn = Unified(engine), 0
    pipeline = Pipeline(role, engine, engine.mesh)
    tokens, waiting = {request.uid: [] for request in requests}, list(requests)
    while True:
        if waiting and turn % 3 == 0:
            role.handle(Submit(waiting.pop(0), None))
        each_turn(turn)
        busy, turn = pipeline.turn() == Turn.WORKED, turn + 1
        for update in singly(role.updates):
            assert update.error is None, update.error
            tokens[update.uid].extend(update.tokens)
        role.updates.clear()
        if not busy and not any(left for (left,) in engine.mesh.agree(len(waiting))):
            return list(tokens.values())


def settle(engine: Engine) -> None:
    """Turns without work, until the move that is under way on all ranks has come to its end."""
    pipeline = Pipeline(Unified(engine), engine, engine.mesh)
    while any(moving for (moving,) in engine.mesh.agree(not engine.rebalancer.idle or engine.rebalancer.vote())):
        assert pipeline.turn() == Turn.IDLE


def make(
    folder: Path,
    mesh: Mesh | None = None,
    redundant: int = 0,
    interval: int = NEVER,
    threshold: float = 1.0,
    layers_at_once: int = 1,
    **changes: object,
) -> Engine:
    how = Rebalance(interval, threshold, layers_at_once)
    changes |= {"redundant_experts": redundant, "rebalance": how}
    config = ModelConfig.from_pretrained(folder)
    return Engine.from_pretrained(replace(SETTINGS, **changes), config, folder, mesh or Mesh(), Ops())


@pytest.fixture(scope="module")
def alone(small: Path) -> tuple[Engine, list[list[int]]]:
    """One rank with slots to spare, and its tokens before anything has moved."""
    engine = make(small, redundant=EXTRA)
    return engine, generate(engine, work(count=3))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 2**32 - 1)), min_size=1, max_size=5))
def test_any_maps_at_any_time_give_the_same_tokens(
    alone: tuple[Engine, list[list[int]]], requests: list[tuple[int, int]]
) -> None:
    engine, expected = alone
    rebalancer, maps = engine.rebalancer, dict(requests)
    done = rebalancer.stats["rebalances_total"]

    def ask(turn: int) -> None:
        if turn in maps:
            rebalancer.request(random_map(*rebalancer.map.shape[:1], 32, 36, maps[turn]))

    assert generate(engine, work(count=3), ask) == expected
    settle(engine)
    assert rebalancer.stats["rebalances_total"] > done and not rebalancer.stats["rebalance_failures"]
    last = random_map(len(rebalancer.map), 32, 36, maps[max(maps)])
    assert torch.equal(engine.model.placement.expert_of_slot.sort(1)[0], last.sort(1)[0])
    assert torch.equal(rebalancer.map, engine.model.placement.expert_of_slot)
    assert torch.equal(rebalancer.identity, rebalancer.map), "another expert's weights"


class Mistaken(ExpertReader):
    """Brings the next expert's weights, with all that belongs to them."""

    def read(self, layer: int, expert: int, into: Slots, slot: int) -> None:
        super().read(layer, (expert + (layer == 2)) % 32, into, slot)


def first_of_two(
    tiny: Path, reader: type[ExpertReader] = ExpertReader, *how: float, drafts: bool = False
) -> Rebalancer:
    """Of the first of two ranks, alone: it agrees with nobody."""
    config = replace(ModelConfig.from_pretrained(tiny), drafts=drafts)
    placement, of_drafts = (Placement.identity(layers, 32, 2) for layers in (4, 1))
    model = Transformer(config, Mesh(), placement, Ops(), torch.float32, 256, draft_placement=of_drafts)
    load_weights(model, open_checkpoint(tiny, config), Mesh())
    model.count_loads()
    return Rebalancer(model, Mesh(), reader(open_checkpoint(tiny, config), config), *how or (NEVER,))


@pytest.mark.parametrize("machines", [2, 3])
def test_a_moved_map_keeps_tokens_on_the_real_machines(machines: int, tiny: Path) -> None:
    """The first rank, of two on each machine. Four groups of experts divide by two machines, so each stays on one.

    They do not divide by three: then replicas are anywhere, and the rank chooses one on its machine.
    """
    config, ranks = ModelConfig.from_pretrained(tiny), 2 * machines
    before = torch.arange(48).remainder(32).repeat(4, 1)
    model = Transformer(config, Mesh(), Placement.of_map(before, 32, ranks, 0, 2), Ops(), torch.float32, 256)
    load_weights(model, open_checkpoint(tiny, config), Mesh())
    model.load_counter = LoadCounter(model.placement, 32)
    mesh = Mesh(size=ranks, node_of_rank=tuple(rank // 2 for rank in range(ranks)))
    rebalancer = Rebalancer(model, mesh, ExpertReader(open_checkpoint(tiny, config), config), 1, 1.0, 2)
    generator = torch.Generator().manual_seed(0)
    rebalancer.counters[0].by_expert += torch.randint(1, 9, (4, 32), generator=generator) ** 3
    rebalancer.step()
    drive(rebalancer)
    of_slot = model.placement.expert_of_slot
    assert rebalancer.stats["rebalances_total"] and not of_slot.equal(before)
    near, anywhere = (Placement.of_map(of_slot, 32, ranks, 0, each).slot_of_expert for each in (2, None))
    assert model.placement.slot_of_expert.equal(near)
    if machines == 3:
        assert not near.equal(anywhere)
    else:
        groups_of_node = (of_slot // 8).view(4, machines, -1)
        assert all(len(on_one.unique()) == 2 for layer in groups_of_node for on_one in layer)


def drive(rebalancer: Rebalancer) -> None:
    while not rebalancer.idle or rebalancer.vote():
        rebalancer.advance((rebalancer.vote(),))
    rebalancer.close()


@pytest.mark.parametrize("kept", [True, False])
def test_what_arrives_in_fp8_is_what_the_loader_gives(fp8: Path, kept: bool) -> None:  # noqa: F811
    dtype = torch.bfloat16 if kept else torch.float32
    check_what_arrives(fp8, ModelConfig.from_pretrained(fp8), Mesh(), dtype, kept, Ops())


@pytest.mark.parametrize("threshold, moved", [(0.8, []), (0.85, [0, 2]), (1.0, [0, 1, 2, 3])])
def test_what_is_above_the_threshold_stays(tiny: Path, threshold: float, moved: list[int]) -> None:
    """Of layers whose balancedness is 0.75 and 0.9 in turns, 0.825 on average."""
    rebalancer = first_of_two(tiny, ExpertReader, 1, threshold)
    loads = torch.ones(4, 32, dtype=torch.int64)
    loads[[0, 2], :8] += 2  # 32 on the first rank, 16 on the second
    loads[[1, 3], :4] += 1  # 20, 16
    rebalancer.counters[0].by_expert += loads
    rebalancer.step()
    drive(rebalancer)
    assert rebalancer.stats["balancedness"] == pytest.approx(0.825)
    assert [rebalancer.stats[f"balancedness_{layer}"] for layer in range(2)] == pytest.approx([0.75, 0.9])
    changed = (rebalancer.map != torch.arange(32)).any(1).nonzero()[:, 0].tolist()
    assert changed == moved and rebalancer.stats["rebalances_total"] == bool(moved)
    assert torch.equal(rebalancer.identity, rebalancer.map[:, :16])


def test_an_expert_in_the_wrong_slot_is_an_error_that_names_it(tiny: Path) -> None:
    """Another one was read than was wanted, or it went to another slot."""

    def swap(layer: int, a: int, b: int, reader: type[ExpertReader], spoil: Callable[[Rebalancer], object]) -> None:
        rebalancer = first_of_two(tiny, reader)
        spoil(rebalancer)
        wanted = rebalancer.map.clone()
        wanted[layer, [a, b]] = wanted[layer, [b, a]]
        rebalancer.request(wanted)
        drive(rebalancer)

    def miss(rebalancer: Rebalancer) -> None:
        stage = rebalancer._stage
        rebalancer._stage = lambda *chunk: [(layer, slot + 1, spare) for layer, slot, spare in stage(*chunk)]

    swap(1, 5, 20, Mistaken, lambda rebalancer: None)  # it makes its mistakes in layer 2
    with pytest.raises(RuntimeError, match="rank 0: MoE layer 2, slot 5 holds expert 21; the map says expert 20"):
        swap(2, 5, 20, Mistaken, lambda rebalancer: None)
    with pytest.raises(RuntimeError, match="rank 0: MoE layer 1, slot 5 holds expert 5; the map says expert 20"):
        swap(1, 5, 20, ExpertReader, miss)


def test_bad_requests_are_refused(alone: tuple[Engine, list[list[int]]]) -> None:
    rebalancer = alone[0].rebalancer
    with pytest.raises(ValueError, match=r"the map is \[2, 32\], must be \[2, 36\]"):
        rebalancer.request(rebalancer.map[:, :32])
    lacking = rebalancer.map.clone()
    lacking[1][lacking[1] == 7] = 8
    with pytest.raises(ValueError, match="layer 1 of the map must hold every expert of 32, and no other"):
        rebalancer.request(lacking)


def test_flags_are_checked(tiny: Path) -> None:
    with pytest.raises(ValueError, match="--rebalance: the interval is -1; it must be at least 0"):
        Rebalance(-1)
    for threshold in (0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"--rebalance: the balancedness is .*; it must be in \(0, 1\]"):
            Rebalance(threshold=threshold)
    with pytest.raises(ValueError, match="--rebalance: the layers at once are 0; they must be at least 1"):
        Rebalance(layers_per_step=0)
    with pytest.raises(ValueError, match=r"--rebalance: the layers at once are 5; they must be at most .* \(4\)"):
        make(tiny, interval=1, layers_at_once=5)


# A world of ranks.


@dataclass(frozen=True)
class Rank:
    """What every check in the world has."""

    rank: int
    folder: Path
    scratch: Path
    maps: list[list[tuple[int, int]]]  # for each run: at which turn, which seed
    expected: dict[int, list[list[int]]]  # tokens, by the seed of the work


def mine(rank: int) -> list[Request]:
    """Another number of requests on each rank, on one none: it idles at times."""
    return work(rank, count=(3, 0, 2, 1)[rank])


def check_tokens(r: Rank, mesh: Mesh, redundant: int, overlap: str, maps: list[tuple[int, int]]) -> None:
    """The policy on the load as it is, then maps as they come."""
    layers_at_once = 1 + (redundant > 0)
    engine = make(r.folder, mesh, redundant, 4, overlap=overlap, layers_at_once=layers_at_once)
    rebalancer = engine.rebalancer
    assert generate(engine, mine(r.rank)) == r.expected[r.rank], (mesh, redundant, overlap)
    settle(engine)
    assert (rebalancer.stats["rebalances_total"] > 0) == (mesh.size > 1), rebalancer.stats
    assert 0 < rebalancer.stats["balancedness"] <= 1 and not rebalancer.stats["rebalance_failures"]
    rebalancer.interval, done = NEVER, rebalancer.stats["rebalances_total"]
    at = dict(maps)

    def ask(turn: int) -> None:
        if turn in at:
            rebalancer.request(random_map(len(rebalancer.map), 32, 32 + redundant, at[turn]))

    assert generate(engine, mine(r.rank), ask) == r.expected[r.rank], (mesh, redundant, overlap, maps)
    settle(engine)
    assert rebalancer.stats["rebalances_total"] > done
    assert torch.equal(rebalancer.identity, rebalancer.map[:, rebalancer.mine])
    assert len({tuple(row) for row in engine.mesh.agree(*rebalancer.map.flatten().tolist())}) == 1, "maps differ"
    engine.close()


def check_failure(r: Rank, mesh: Mesh) -> None:
    """One rank's file shrinks when a layer has moved already. Then it is whole again."""
    folder = r.scratch / f"{mesh.size}.{mesh.rank}"
    shutil.copytree(r.folder, folder)
    path, bad = folder / FILE, mesh.rank == mesh.size - 1
    engine = make(folder, mesh, EXTRA)
    rebalancer, before = engine.rebalancer, engine.rebalancer.map.clone()
    stat, content = path.stat(), path.read_bytes()
    layers = len(before)
    wanted = [random_map(layers, 32, 36, seed) for seed in (1, 2)]

    def shrink_or_ask(turn: int) -> None:
        if turn in (3, 15):
            rebalancer.request(wanted[0])
        if bad and (rebalancer.map != before).any():
            os.truncate(path, 1000)

    said = io.StringIO()
    with redirect_stderr(said):
        assert generate(engine, mine(r.rank), shrink_or_ask) == r.expected[r.rank]
        settle(engine)
    lines = said.getvalue().splitlines()
    assert len(lines) == bad, lines
    assert not bad or re.match(rf"rebalance: failed, .*OSError: {path}: it has changed", lines[0])
    assert rebalancer.stats["rebalance_failures"] == 2 and not rebalancer.stats["rebalances_total"]
    moved = (rebalancer.map != before).any(1)
    assert moved.any() and not moved.all()
    assert torch.equal(rebalancer.map[moved].sort(1)[0], wanted[0][moved].sort(1)[0])
    assert len({tuple(row) for row in engine.mesh.agree(*rebalancer.map.flatten().tolist())}) == 1, "maps differ"

    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rebalancer.request(wanted[1])
    assert generate(engine, mine(r.rank)) == r.expected[r.rank]
    settle(engine)
    assert rebalancer.stats["rebalances_total"] == 1
    assert torch.equal(rebalancer.map.sort(1)[0], wanted[1].sort(1)[0])

    rebalancer.request(random_map(layers, 32, 36, mesh.rank))  # each wants another
    with redirect_stderr(said):
        assert generate(engine, mine(r.rank)) == r.expected[r.rank]
    assert rebalancer.stats["rebalance_failures"] == 3 and rebalancer.stats["rebalances_total"] == 1
    assert ("the ranks want different maps" in said.getvalue()) == (mesh.rank == 0)
    engine.close()


def check_threshold(r: Rank, mesh: Mesh) -> None:
    engine = make(r.folder, mesh, interval=4, threshold=0.05)
    assert generate(engine, mine(r.rank)) == r.expected[r.rank]
    settle(engine)
    assert 0.05 < engine.rebalancer.stats["balancedness"] < 1
    assert not engine.rebalancer.stats["rebalances_total"]
    assert torch.equal(engine.rebalancer.map, torch.arange(32).expand(len(engine.rebalancer.map), -1))
    engine.close()


def check_counts(r: Rank, mesh: Mesh) -> None:
    """Recordings with and without flips: the same copies in every layer and window, and of the same experts."""
    recordings = []
    for interval in (0, 3):
        path = r.scratch / f"{mesh.size}-{interval}.safetensors"
        engine = make(r.folder, mesh, EXTRA, interval=interval, record_experts=str(path))
        assert generate(engine, mine(r.rank)) == r.expected[r.rank]
        assert not interval or engine.rebalancer.stats["rebalances_total"]
        engine.close()
        mesh.agree(0)  # written
        recordings.append(load_recording(path, len(engine.model.placement.expert_of_slot), 32))
    still, moving = recordings
    assert torch.equal(still.sum(2), moving.sum(2)) and still.sum() > 0
    assert (still - moving).abs().sum() <= 0.002 * still.sum()  # a near tie may fall otherwise, after another sum


def body(rank: int, tiny: Path, small: Path, scratch: Path, maps: list[list[tuple[int, int]]]) -> None:
    def of(folder: Path) -> Rank:
        engine = make(folder, interval=0)
        assert engine.rebalancer is None
        return Rank(rank, folder, scratch, maps, {rank: generate(engine, mine(rank))})

    r, of_more_layers = of(small), of(tiny)
    turns = iter(maps)
    for size in (4, 2, 1):
        mesh = sub_mesh(0, size)
        for redundant in (0, EXTRA):
            for overlap in ("off", "on"):
                if size < 4 and (redundant > 0) != (overlap == "on"):
                    continue  # four ranks show these two as well
                at = next(turns)
                if mesh is not None:
                    check_tokens(r, mesh, redundant, overlap, at)
        if size == 4:
            check_failure(of_more_layers, mesh)
            check_threshold(r, mesh)
            check_counts(r, mesh)
        dist.barrier()


def test_tokens_do_not_change_when_experts_move(tiny: Path, small: Path, tmp_path: Path) -> None:
    drawn: list[list[tuple[int, int]]] = []

    @settings(max_examples=8, database=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 2**32 - 1)), min_size=1, max_size=2))
    def draw(maps: list[tuple[int, int]]) -> None:
        drawn.append(maps)

    draw()
    run_world(4, body, tiny, small, tmp_path, drawn, timeout_s=280)


# What one sees of it.


def test_a_job_that_does_not_move_says_nothing() -> None:
    metrics = Metrics()
    metrics.replica_left("prefill", {})
    assert "rebalancing" not in metrics.table()
    stats = {"rebalances_total": 2, "rebalance_failures": 1, "rebalance_seconds": 0.5}
    stats |= {"balancedness": 0.25, "balancedness_0": 0.375, "balancedness_1": 0.125}
    for _ in range(2):  # two replicas of one job
        metrics.replica_left("decode", stats)
    says = (
        " rebalancing  decode: 2 times in 0.50 s, 1 failed, balancedness 0.250 (layers 0.125 to 0.375) at the last look"
    )
    assert says in metrics.table() and "recorded" not in metrics.table()


def test_the_summary_says_what_moved(tiny: Path, tmp_path: Path) -> None:
    tokens, source = [], tmp_path / "in.jsonl"
    rows = [
        {"prompt": text, "max_tokens": 24, "ignore_eos": True} for text in ("In the beginning", "def ", "import os")
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flags in ((), ("--rebalance", "4,1,2", "--redundant-experts", "4")):
        out = tmp_path / "out.jsonl"
        work = ("--model", str(tiny), "--input", str(source), "--output", str(out))
        work += ("--existing", "overwrite")
        code, _, err = run(*work, *flags, ranks=2)
        assert code == 0, err
        says = (
            r"\]  rebalance: looks every 4 steps, moves up to balancedness 1; layers at once: 2; an expert is 0\.049 ",
            r"\]  rebalancing  unified: [1-9]\d* times in [\d.]+ s, balancedness 0\.\d+ \(layers .*\) at the last look",
        )
        assert [bool(re.search(line, err)) for line in says] == [bool(flags)] * 2, err
        tokens.append([answer["token_ids"] for answer in read(out)])
    assert tokens[0] == tokens[1]


def test_short_switches_end_with_what_they_are_for() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(ValueError, match="over"), short_switches():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        raise ValueError("over")
    assert sys.getswitchinterval() == before
