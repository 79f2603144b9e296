"""The warm-up: what a first start compiles and waits for, and what people see of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.warm_up import make_ahead, run_all, run_beside, run_every_size
from disagg.warm_up_progress import EVERY_S, WarmUpProgress, silent
from kernels.compile_ahead import Offer
from kernels.ops import Ops
from model.config import ModelConfig
from model.dummy import randomize
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.placement import Placement
from tests.test_products import CONFIG
from tests.test_speculation import make_engine
from tests.worlds import run_world, sub_mesh


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_every_few_seconds_what_is_warmed_up() -> None:
    """Two seconds a size: a line with the first size that begins after five, and so on. Quick parts have none."""
    clock, lines = Clock(), []
    progress = WarmUpProgress(lines.append, bar=True, clock=clock)
    assert progress.summary == ""
    for what, sizes, each in (("prompts", [8, 4, 2, 1, 0], 2.0), ("decode steps", [4, 2], 0.5)):
        seen = []
        for size in progress(sizes, what):
            seen.append(size)
            clock.now += each
        assert seen == sizes
    assert EVERY_S == 5 and lines == ["warming up: prompts, 3 of 5 done"]
    assert progress.summary == "11.0 s: prompts 10.0, decode steps 1.0"
    clock.now += EVERY_S
    assert list(progress([7], "prompts")) == [7]
    assert lines[1:] == ["warming up: prompts, 0 of 1 done"]


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    clock, lines = Clock(), []
    progress = WarmUpProgress(lines.append, bar=True, clock=clock)
    for _ in progress([2, 1], "prompts"):
        clock.now += 100
    assert "warming up: prompts: 100%" in capsys.readouterr().err and not lines


@pytest.mark.parametrize("drafts", [0, 2])
def test_all_of_an_engines_sizes_are_shown(tiny: Path, drafts: int) -> None:
    engine, shown = make_engine(tiny, drafts), {}
    run_beside(engine, lambda sizes, what: shown.setdefault(what, list(sizes)))
    run_every_size(engine, lambda sizes, what: shown.setdefault(what, list(sizes)))
    buckets = engine.decode.buckets[::-1]
    wanted = {"decode steps"} | ({"prompts with drafts"} if drafts else set())
    assert set(shown) == wanted | {"prompts", "decodes beside prompts"}
    assert all(shown[what] == buckets for what in wanted)
    assert {1, 2, 64} <= set(shown["prompts"])
    assert shown["decodes beside prompts"] == [4, 2, 1]  # of five sequences, one is a prompt
    engine.decode.buckets, again = [4], {}
    run_beside(engine, lambda sizes, what: again.setdefault(what, list(sizes)))
    assert again["decodes beside prompts"] == [4, 2, 1], "also fewer than the smallest bucket"


def test_a_step_of_few_layers_calls_every_op_that_a_whole_step_calls() -> None:
    """With tensors of the same kinds: two dense layers and two with experts do, of three and four."""
    seen: set[tuple] = set()
    ops = Ops(**{name: recorded(name, seen) for name, op in vars(Ops()).items() if callable(op)})
    config = replace(CONFIG, fp8=False, num_hidden_layers=7, first_k_dense_replace=3, drafts=True)
    mesh, settings = Mesh(), EngineConfig(2, 32, 1024, 64, speculate=1)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, mesh.device)
    model = Transformer(config, mesh, placement, ops, torch.float32, 64)
    randomize(model)
    engine = Engine(settings, model, mesh)
    with model.few_layers():
        assert len(model.layers) == 4
        run_every_size(engine)
        run_beside(engine)
    few = set(seen)
    seen.clear()
    run_every_size(engine)
    run_beside(engine)
    assert len(model.layers) == 7 and len(few) > 100 and few == seen


def recorded(name: str, seen: set[tuple]) -> Callable[..., Any]:
    def op(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        seen.add((name, *((arg.dtype, arg.shape, arg.stride()) for arg in tensors)))
        return getattr(Ops(), name)(*args, **kwargs)

    return op


class Compiler:
    """Each rehearsal needs eight kernels. Those of the second one are compiled only when `go` is set."""

    identity = "made up"

    def __init__(self, cache: Path, go: Event) -> None:
        self.cache, self._go = cache, go
        self.rehearsals, self.compiled = 0, []

    @contextmanager
    def installed(self) -> Iterator[None]:
        yield

    @contextmanager
    def rehearsal(self, offer: Offer) -> Iterator[None]:
        self.rehearsals += 1
        for i in range(8):
            name = f"kernel {i} of rehearsal {self.rehearsals}"
            offer(name, partial(self._compile, name, self.rehearsals))
        yield

    def _compile(self, name: str, rehearsal: int) -> None:
        assert rehearsal == 1 or self._go.wait(60)
        self.compiled.append(name)

    def close(self) -> None:
        self._go.set()


def of_all(mesh: Mesh, names: list[str]) -> list[str]:
    return sorted(name for part in mesh.ep.exchange(names, list[str]) for name in part)


def starts(rank: int, folder: Path, cache: Path) -> None:
    """What `warm_up` does on a GPU, but for the kernels: a machine's first start, and another one."""
    config, settings = ModelConfig.from_pretrained(folder), EngineConfig(2, 32, 1024, 64)
    for ranks in (1, 2):
        mesh = sub_mesh(0, ranks)
        if mesh is None:
            continue
        engine = Engine.from_pretrained(settings, config, folder, mesh, Ops())
        first, second = (Compiler(cache / f"{ranks}", Event()) for _ in range(2))
        ahead = make_ahead(engine, [first])
        run_all(engine, ahead, True, silent, behind=True)
        assert first.rehearsals == 2 and not ahead.is_done
        assert of_all(mesh, first.compiled) == [f"kernel {i} of rehearsal 1" for i in range(8)]
        first._go.set()
        ahead.finish()
        assert of_all(mesh, first.compiled) == [f"kernel {i} of rehearsal {j}" for i in range(8) for j in (1, 2)]
        ahead = make_ahead(engine, [second])
        assert ahead.is_done
        run_all(engine, ahead, True, silent, behind=True)
        assert second.rehearsals == 0
        engine.close()


def test_a_machines_first_start_rehearses_and_a_job_serves_before_the_last_kernel(small: Path, tmp_path: Path) -> None:
    run_world(2, starts, small, tmp_path, timeout_s=100)
