"""Experts sliced over ranks give the same result as whole experts on one rank."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.addends import summed
from kernels.ops import Ops
from model.config import ModelConfig
from model.moe import Experts
from parallel.dispatch import LocalContiguous
from parallel.dispatchers import Dispatchers, plain_dispatchers
from parallel.mesh import Group, Mesh
from scripts.bench.engine.run import Bench
from scripts.bench.ranks.plain_tp import SlicedExperts, plain_tp, sliced_experts
from scripts.bench.ranks.run import Comparison, parse
from tests.test_dispatch import routing
from tests.worlds import run_world, sub_mesh

EXPERTS, HIDDEN, WIDTH, TOP_K, ROWS = 8, 32, 24, 4, 6


def whole(tiny: Path) -> tuple[ModelConfig, Experts]:
    config = replace(
        ModelConfig.from_pretrained(tiny), hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS
    )
    experts, generator = Experts(config, EXPERTS, Ops(), torch.float32, "cpu"), torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.data.normal_(0, 0.2, generator=generator)
    return config, experts


def part(experts: Experts, config: ModelConfig, rank: int) -> Experts:
    """Rank `rank`'s slice of every expert."""
    width = config.moe_intermediate_size
    mine = slice(rank * width, (rank + 1) * width)
    sliced = Experts(config, EXPERTS, Ops(), torch.float32, "cpu")
    gate, up = experts.gate_up_proj.chunk(2, 1)
    sliced.gate_up_proj.data.copy_(torch.cat((gate[:, mine], up[:, mine]), 1))
    sliced.down_proj.data.copy_(experts.down_proj[:, :, mine])
    return sliced


def through(dispatcher: object, experts: Experts, x: Tensor, slots: Tensor, weights: Tensor, plus: Tensor) -> Tensor:
    arrived = dispatcher.dispatch(x, slots, weights).wait()
    return summed(dispatcher.combine(*experts(lambda: arrived), plus).wait(), Ops().ep_gather)


def body(rank: int, tiny: Path) -> None:
    config, experts = whole(tiny)
    for size in (1, 2, 4):
        mesh = sub_mesh(0, size, 1)
        if mesh is None:
            continue
        group = mesh.ep
        _, share = plain_tp(mesh, config)
        assert share.moe_intermediate_size == WIDTH // size and share.n_shared_experts == size * config.n_shared_experts
        mine = part(experts, share, group.rank)
        local = Dispatchers(*plain_dispatchers(Group(), EXPERTS, Ops()), "")
        sliced = sliced_experts(local, replace(mesh, attn=group))
        for kind in ("random", "ragged", "one rank", "nowhere"):
            generator = torch.Generator().manual_seed(1)
            x, plus = (torch.randn(size * ROWS, HIDDEN, generator=generator) for _ in range(2))
            slots = routing(kind, size * ROWS, EXPERTS, generator)
            weights = torch.rand(size * ROWS, TOP_K, generator=generator)
            for one, all_here in ((sliced.contiguous, local.contiguous), (sliced.masked, local.masked)):
                want = group.scatter(through(all_here, experts, x, slots, weights, plus))
                got = through(one, mine, *map(group.scatter, (x, slots, weights, plus)))
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_slices_add_up(tiny: Path) -> None:
    run_world(4, body, tiny)


def test_what_does_not_divide_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="moe_intermediate_size % ranks must be 0, not 24 % 5 = 4"):
        plain_tp(Mesh(size=5), whole(tiny)[0])


def test_the_benchmark_computes_with_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer, of prompts and decode steps, on the one rank that is here."""
    monkeypatch.setattr(
        "sys.argv", ["x", "--shape", "tiny", "--layers", "3", "--prompt", "20", "--batch", "2", "--step-tokens", "64"]
    )
    _, args = parse()
    calls: Counter[str] = Counter()

    def watch(kind: type) -> None:
        inner = kind.dispatch

        def dispatch(self: Any, *args: Tensor) -> Any:
            calls[kind.__name__] += 1
            return inner(self, *args)

        monkeypatch.setattr(kind, "dispatch", dispatch)

    watch(SlicedExperts)
    watch(LocalContiguous)
    engine = Comparison(args, ModelConfig.from_pretrained("model/tiny"), Mesh()).engine("tp", tmp_path)
    bench = Bench(engine)
    bench.drive(2, 20, 5)
    steps, layers = len(bench.role.marks), engine.config.num_moe_layers
    assert calls == {"SlicedExperts": steps * layers, "LocalContiguous": steps * layers} and steps >= 5
