"""DeepEP's two modes against the all-to-all and a dense float32 MoE, on a GPU that several ranks share.

Needs deep_ep and an NCCL that lets ranks share a GPU (>= 2.30, NCCL_MULTI_RANK_GPU_ENABLE=1). A world starts slowly,
and a process can set up DeepEP only once, so each world runs all checks.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.warm_up import decode_nothing
from kernels import ref
from kernels.addends import summed
from kernels.backend import choose
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.kv_cache import make_pool
from model.moe import Experts
from model.transformer import Transformer, op_shape
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP
from parallel.deepep_sizes import Sizes, buffer_bytes
from parallel.dispatch import Contiguous, ContiguousAllToAll, Masked, MaskedAllToAll
from parallel.dispatchers import Dispatcher, make_dispatchers
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from tests.test_dispatch import routing
from tests.test_gpu_engine import requests, serve
from tests.test_gpu_model import V3_LIKE
from tests.worlds import run_world

pytestmark = pytest.mark.gpu
CONFIG = replace(V3_LIKE, hidden_size=2048)
D, WIDTH, PER_RANK, CAPACITY = CONFIG.hidden_size, CONFIG.moe_intermediate_size, 8, 32
DEVICE = torch.device("cuda")
# Norms of errors relative to the result's. bf16 rounds by at most 2^-9 of a value, here five times one after the other
# (two GEMMs, silu * up, a rank's sum, the total); e4m3 by at most 2^-4, and the inputs only.
BF16_ERROR, FP8_ERROR = 5 * 2**-9, 2**-4


@dataclass(frozen=True)
class World:
    group: Group
    ops: Ops
    buffer: DeepEPBuffer
    experts: Experts  # mine
    gate_up: Tensor  # [P, 2I, D], everyone's
    down: Tensor  # [P, D, I]
    generator: torch.Generator  # of this rank

    @classmethod
    def create(cls, rank: int, size: int, seed: int) -> "World":
        group, num_slots = Group(size, rank, dist.group.WORLD), PER_RANK * size
        ops, _ = choose(op_shape(CONFIG), torch.bfloat16, DEVICE, ["triton"])
        shared = torch.Generator(DEVICE).manual_seed(seed)
        options = {"generator": shared, "device": DEVICE, "dtype": torch.bfloat16}
        gate_up = torch.randn(num_slots, 2 * WIDTH, D, **options) * D**-0.5
        down = torch.randn(num_slots, D, WIDTH, **options) * WIDTH**-0.5
        experts, mine = Experts(CONFIG, PER_RANK, ops, torch.bfloat16, DEVICE), slice(rank * PER_RANK, None)
        experts.gate_up_proj.copy_(gate_up[mine][:PER_RANK])
        experts.down_proj.copy_(down[mine][:PER_RANK])
        buffer = DeepEPBuffer(group, num_slots, D, CAPACITY)
        assert buffer.capacity == CAPACITY and buffer.num_bytes > 0
        sizes = Sizes(size, size, num_slots, D, 8, CAPACITY, "bfloat16")
        assert buffer_bytes(sizes) == pytest.approx(buffer.num_bytes, rel=0.05)
        return cls(group, ops, buffer, experts, gate_up, down, torch.Generator().manual_seed(seed + 1 + rank))

    @property
    def num_slots(self) -> int:
        return len(self.gate_up)

    def inputs(self, kind: str, tokens: int, top_k: int = 8) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, D, generator=self.generator).bfloat16()
        slots = routing(kind, tokens, self.num_slots, self.generator, top_k)
        weights = torch.rand(tokens, top_k, generator=self.generator)
        return x.to(DEVICE), slots.to(DEVICE), weights.to(DEVICE)

    def dense(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The layer's result in float32, with no dispatch at all."""
        out = torch.zeros(x.shape, device=DEVICE)
        for slot in slots[slots >= 0].unique().tolist():
            token, k = (slots == slot).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ self.gate_up[slot].float().T).chunk(2, -1)
            y = (F.silu(gate) * up) @ self.down[slot].float().T
            out.index_add_(0, token, y * weights[token, k, None])
        return out

    def round_trip(self, dispatcher: Dispatcher, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Dispatch, experts in bf16, combine. What the experts give for rows that nobody sent is NaN. No host sync in
        the masked layout."""
        arrived = dispatcher.dispatch(x, slots, weights).wait()
        if arrived.scale is not None:
            rows = ref.dequantize_1x128(arrived.x, arrived.scale).bfloat16()
            arrived = replace(arrived, x=rows, scale=None)
        y, _ = self.experts(lambda: arrived)
        match arrived:
            case Contiguous(_, groups):
                y = y.masked_fill(groups.of_rows(len(y))[:, None] < 0, float("nan"))
            case Masked(rows, counts):
                there = torch.arange(rows.shape[1], device=DEVICE) < counts[:, None]
                y = y.masked_fill(~there[..., None], float("nan"))
        return summed(dispatcher.combine(y, arrived.way_back).wait(), self.ops.ep_gather)

    def say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    def together(self) -> None:
        torch.cuda.synchronize()
        dist.barrier()


def error(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape and bool(out.isfinite().all())
    return ((out.float() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def pad(dispatcher: Dispatcher, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The masked all-to-all wants as many rows from every rank."""
    if not isinstance(dispatcher, MaskedAllToAll):
        return given
    x, slots, weights = given
    rows = (0, 0, 0, CAPACITY - len(x))
    return F.pad(x, rows), F.pad(slots, rows, value=-1), F.pad(weights, rows)


def check_results(world: World) -> None:
    """Every routing with every spread of tokens over the ranks, against the dense MoE and against all-to-all."""
    group, ops, buffer, rank = world.group, world.ops, world.buffer, world.group.rank
    normal, low_latency = ContiguousDeepEP(buffer, ops), MaskedDeepEP(buffer)
    low_latency_fp8 = MaskedDeepEP(buffer, fp8=True)
    plain_normal = ContiguousAllToAll(group, world.num_slots, ops)
    plain_masked = MaskedAllToAll(group, world.num_slots, ops)
    spreads = {
        "full": CAPACITY,
        "one token each": 1,
        "rank 0 empty": 0 if rank == 0 else CAPACITY - rank,
        "ragged": (7 * rank + 3) % (CAPACITY + 1),
        "one token in all": int(rank == group.size - 1),
    }
    kinds = ("random", "ragged", "one rank", "nowhere")
    cases = [(spread, kind, 8) for spread in spreads for kind in kinds] + [("full", "random", k) for k in (1, 6)]
    worst = dict.fromkeys(("bf16", "fp8", "all-to-all"), 0.0)
    for spread, kind, top_k in cases:
        what = f"rank {rank}: {spread}, {kind}, {top_k=}"
        given = x, slots, weights = world.inputs(kind, spreads[spread], top_k)
        dense = world.dense(*given)
        for dispatcher, plain in ((normal, plain_normal), (low_latency, plain_masked)):
            out, theirs = world.round_trip(dispatcher, *given), world.round_trip(plain, *pad(plain, given))[: len(x)]
            mine, other = error(out, dense), error(out, theirs.float())
            assert mine < BF16_ERROR and other < 2 * BF16_ERROR, f"{what}, {type(dispatcher).__name__}: {mine} {other}"
            worst["bf16"], worst["all-to-all"] = max(worst["bf16"], mine), max(worst["all-to-all"], other)
        mine = error(world.round_trip(low_latency_fp8, *given), dense)
        assert mine < FP8_ERROR, f"{what}, fp8: {mine}"
        worst["fp8"] = max(worst["fp8"], mine)
        # Rows that were quantised before arrive as they are: only bf16's rounding is left (once more, of the rows).
        pair = ref.quantize_1x128(x)
        out = world.round_trip(normal, pair, slots, weights)
        mine = error(out, world.dense(ref.dequantize_1x128(*pair), slots, weights))
        assert mine < BF16_ERROR + 2**-9, f"{what}, quantised: {mine}"
    world.say(f"{group.size} ranks, {len(cases)} cases: worst relative errors {worst}")


def check_provenance(world: World) -> None:
    """Each 128 columns of a row hold one number: the source rank, the token, the slots that it asked for. fp8 keeps
    them exactly if each travels with its own scale."""
    group, first = world.group, world.group.rank * PER_RANK
    tokens = (0, 5, CAPACITY, 1)[(group.rank + 1) % 4]
    slots = routing("ragged", tokens, world.num_slots, world.generator, 8)
    marks = torch.cat((torch.full((tokens, 1), group.rank + 1), torch.arange(tokens)[:, None] + 1, slots + 2), 1)
    x = F.pad(marks.repeat_interleave(128, 1), (0, D - 128 * marks.shape[1])).bfloat16().to(DEVICE)
    expected = {
        (source + 1, token + 1, slot)
        for source, theirs in enumerate(group.exchange(slots.tolist(), list[list[int]]))
        for token, row in enumerate(theirs)
        for slot in row
        if first <= slot < first + PER_RANK
    }
    slots = slots.to(DEVICE)
    for fp8 in (False, True):
        for dispatcher in (ContiguousDeepEP(world.buffer, world.ops), MaskedDeepEP(world.buffer, fp8)):
            sent = ref.quantize_1x128(x) if fp8 and not dispatcher.casts else x
            arrived = dispatcher.dispatch(sent, slots, torch.ones(slots.shape, device=DEVICE)).wait()
            values = ref.dequantize_1x128(arrived.x, arrived.scale) if fp8 else arrived.x.float()
            seen, got = values[..., ::128].round().long().cpu(), []
            match arrived:
                case Contiguous(_, groups):
                    assert len(seen) % world.ops.alignment == 0
                    of_rows = groups.of_rows(len(seen)).tolist()
                    pairs = [(row, e) for row, e in zip(seen.tolist(), of_rows, strict=True) if e >= 0]
                case Masked(_, counts):
                    assert seen.shape[1] == group.size * CAPACITY
                    pairs = [(row, e) for e, n in enumerate(counts.tolist()) for row in seen[e, :n].tolist()]
            for row, e in pairs:
                assert first + e + 2 in row[2:10], "a row arrived at an expert that it did not ask for"
                got.append((row[0], row[1], first + e))
            assert sorted(got) == sorted(expected)
            back = summed(dispatcher.combine(values.bfloat16(), arrived.way_back).wait(), world.ops.ep_gather)
            torch.testing.assert_close(back, x * (slots >= 0).sum(1, keepdim=True), rtol=2**-7, atol=0)
    world.say(f"{group.size} ranks: provenance")


def check_alternation(world: World) -> None:
    """normal -> low latency -> normal -> low latency through the one buffer changes nothing, to the bit."""
    given = world.inputs("ragged", CAPACITY - world.group.rank)
    modes = (ContiguousDeepEP(world.buffer, world.ops), MaskedDeepEP(world.buffer))
    first = [world.round_trip(mode, *given) for mode in modes]
    for _ in range(2):
        for mode, before in zip(modes, first, strict=True):
            assert torch.equal(world.round_trip(mode, *given), before), type(mode).__name__
    world.say(f"{world.group.size} ranks: alternation")


def check_graph(world: World, fp8: bool) -> None:
    """Captured once, replayed on other inputs, with normal steps in between: the bits of the eager call."""
    low_latency, normal = MaskedDeepEP(world.buffer, fp8), ContiguousDeepEP(world.buffer, world.ops)
    tokens = CAPACITY - 4 * world.group.rank
    x, slots, weights = world.inputs("random", tokens)
    world.round_trip(low_latency, x, slots, weights)  # compile, and clean what normal steps left
    world.together()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = world.round_trip(low_latency, x, slots, weights)
    world.together()
    for kind in ("random", "one rank", "nowhere", "ragged"):
        if kind == "ragged" and world.group.rank == 0:
            kind = "nowhere"  # the others have tokens, this rank none
        for static, fresh in zip((x, slots, weights), world.inputs(kind, tokens), strict=True):
            static.copy_(fresh)
        world.round_trip(normal, x, slots, weights)
        world.buffer.prepare_low_latency()
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, world.round_trip(low_latency, x, slots, weights)), f"{kind}, {fp8=}"
        assert error(replayed, world.dense(x, slots, weights)) < (FP8_ERROR if fp8 else BF16_ERROR), f"{kind}, {fp8=}"
    world.together()
    graph.reset()  # before the buffer and the group go
    world.say(f"{world.group.size} ranks: CUDA graph, {fp8=}")


def check_guard(world: World) -> None:
    """A second operation in flight would hang all ranks; it raises instead, and what was in flight goes on."""
    one, two = MaskedDeepEP(world.buffer), MaskedDeepEP(world.buffer, fp8=True)
    given = world.inputs("random", CAPACITY)
    pending = one.dispatch(*given)
    with pytest.raises(AssertionError, match="low-latency dispatch [0-9]+ started while dispatch [0-9]+ was not"):
        two.dispatch(*given)
    arrived = pending.wait()
    pending = one.combine(*world.experts(lambda: arrived))
    with pytest.raises(AssertionError, match="low-latency dispatch [0-9]+ started while combine [0-9]+ was not"):
        two.dispatch(*given)
    assert error(summed(pending.wait(), world.ops.ep_gather), world.dense(*given)) < BF16_ERROR
    with pytest.raises(AssertionError, match="over self.capacity"):
        one.dispatch(*world.inputs("random", CAPACITY + 1))
    world.say(f"{world.group.size} ranks: guard")


@torch.inference_mode()
def layer_body(rank: int, size: int, seed: int) -> None:
    world = World.create(rank, size, seed)
    check_provenance(world)
    check_results(world)
    check_alternation(world)
    for fp8 in (False, True):
        check_graph(world, fp8)
    check_guard(world)
    world.together()
    world.buffer.close()


@pytest.mark.parametrize("size", [2, 4])
def test_one_layer(size: int) -> None:
    run_world(size, layer_body, size, torch.initial_seed() % 2**31, timeout_s=280, device="cuda")


def play(
    rank: int, prompts: list[list[int]], forward: Callable[[Batch, bool], Tensor], given: Iterator[int] | None = None
) -> tuple[Tensor, list[int]]:
    """A few steps of serving, the same number on both ranks: all logits, and the tokens that were taken, from `given`
    or greedily. Rank 1 has nothing to do in the first step and in the last two."""
    tokens, taken, out = [list(prompt) for prompt in prompts], [], []
    pages = [list(range(1 + 4 * i, 5 + 4 * i)) for i in range(len(prompts))]
    everyone = range(len(prompts))
    steps = [([], everyone, False), (everyone, [], False), *[(everyone, [], True)] * 5]
    if rank == 1:
        steps = [([], [], False), ([], everyone, False), *[(everyone, [], True)] * 3, *[([], [], True)] * 2]
    for decodes, prefills, masked in steps:
        last = [Chunk(tokens[i][-1:], len(tokens[i]) - 1, pages[i]) for i in decodes]
        last += [Chunk((0,), 0, (), wants_logits=False)] * (masked * 8 - len(last))  # as many rows on both ranks
        whole = [Chunk(tokens[i], 0, pages[i]) for i in prefills]
        logits = forward(Batch.build(last, whole, DEVICE), masked)
        for i, row in zip([*decodes, *prefills], logits, strict=True):
            taken.append(next(given) if given is not None else int(row.argmax()))
            tokens[i].append(taken[-1])
        out.append(logits.float())
    return torch.cat(out), taken


def fill(model: Transformer, ranks: int, rank: int, seed: int) -> None:
    """The same random weights whatever the world: of the experts, this rank's."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, weight in model.named_parameters():
        shape, split = list(weight.shape), ".experts." in name
        if split:
            shape[0] *= ranks
        scale = 0.1 if "norm" in name or "bias" in name else shape[-1] ** -0.5
        value = torch.randn(shape, generator=generator, device=DEVICE) * scale + ("norm" in name)
        weight.copy_(value[rank * len(weight) :][: len(weight)] if split else value)


@torch.inference_mode()
def model_body(rank: int, seed: int) -> None:
    both = Mesh(rank, 2, DEVICE, Group(), Group(2, rank, dist.group.WORLD))
    ops, _ = choose(op_shape(CONFIG), torch.bfloat16, DEVICE, ["triton"])
    generator = torch.Generator().manual_seed(seed + 1 + rank)
    lengths = ((5, 64, 65, 100), (1, 130))[rank]
    prompts = [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def run(mesh: Mesh, choice: str, given: Iterator[int] | None = None) -> tuple[Tensor, list[int]]:
        placement = Placement.identity(CONFIG.num_moe_layers, CONFIG.n_routed_experts, mesh.ep.size, DEVICE)
        model = Transformer(CONFIG, mesh, placement, ops, torch.bfloat16, 1024)
        fill(model, mesh.ep.size, mesh.ep.rank, seed)
        dispatchers = make_dispatchers(
            choice, mesh, ops, torch.bfloat16, num_slots=placement.num_slots, hidden=D,
            top_k=CONFIG.num_experts_per_tok, capacity=16,
        )  # fmt: skip
        plain = "all-to-all over NCCL (forced)" if mesh.ep.size > 1 else "none: one rank holds every expert"
        assert dispatchers.why == ("DeepEP" if choice == "deepep" else plain)
        pool = make_pool(CONFIG, 20, torch.bfloat16, DEVICE)
        pick = {False: dispatchers.contiguous, True: dispatchers.masked}
        result = play(rank, prompts, lambda batch, masked: model(batch, pool, pick[masked]), given)
        torch.cuda.synchronize()
        dispatchers.close()
        return result

    expected, taken = run(Mesh(device=DEVICE), "all_to_all")
    plain, _ = run(both, "all_to_all", iter(taken))
    got, _ = run(both, "deepep", iter(taken))
    # A gate may fall the other way at a near tie: then a row differs by any amount, and there must be few such rows.
    rows, plain_rows = ((logits - expected).norm(dim=1) / expected.norm(dim=1) for logits in (got, plain))
    mine, theirs = rows.median().item(), plain_rows.median().item()
    print(f"rank {rank}: rows differ by {mine:.4f} from one rank's (median); all-to-all's by {theirs:.4f}", flush=True)
    assert mine < 0.05 and mine < max(2 * theirs, 0.02), f"{mine=} {theirs=}"
    same_routing = rows < 0.1
    assert same_routing.float().mean() > 0.75, f"{rows=}"
    short = expected.amax(1) - expected.gather(1, got.argmax(1, keepdim=True))[:, 0]  # 0 where the token is the same
    assert bool((short < 0.25 * expected.std(1))[same_routing].all()), f"{short=} {rows=}"


@torch.inference_mode()
def engine_body(rank: int, seed: int, overlap: str, drafts: int) -> None:
    """The engine's own loop: prompts over normal mode, decode over low latency, without graphs and then with them."""
    config = replace(CONFIG, drafts=drafts > 0)
    settings = EngineConfig(6, 100, 2000, 512, dispatch="deepep", overlap=overlap, speculate=drafts, prefix_cache="off")
    mesh = Mesh(rank, 2, DEVICE, Group(), Group(2, rank, dist.group.WORLD))
    ops, _ = choose(op_shape(CONFIG), torch.bfloat16, DEVICE, ["triton"])
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 2, DEVICE)
    model = Transformer(config, mesh, placement, ops, torch.bfloat16, settings.positions(config))
    fill(model, 2, rank, seed)
    engine = Engine(settings, model, mesh)
    work = requests(random.Random(seed + rank))[: 10 - 4 * rank]
    eager = serve(engine, work)
    engine.graphs.capture(partial(decode_nothing, engine), engine.decode.buckets, "decode steps")
    captured = serve(engine, work)
    for request in work:
        assert len(captured[request.uid][0]) == request.max_tokens
        assert captured[request.uid] == eager[request.uid], f"{rank=} {request.uid=}"
    torch.cuda.synchronize()
    dist.barrier()
    engine.close()


@pytest.mark.parametrize(("overlap", "drafts"), [("off", 0), ("on", 0), ("off", 2), ("on", 2)])
def test_the_engine_with_graphs(overlap: str, drafts: int) -> None:
    run_world(2, engine_body, torch.initial_seed() % 2**31, overlap, drafts, timeout_s=280, device="cuda")


def test_the_whole_model() -> None:
    run_world(2, model_body, torch.initial_seed() % 2**31, timeout_s=280, device="cuda")
