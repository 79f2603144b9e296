"""Kernels compiled ahead, on a GPU: neither the warm-up nor serving compiles any, and a second start rehearses nothing.

Every start is a process of its own, because Triton and DeepGEMM remember what they have loaded.
"""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.warm_up import warm_up
from kernels.backend import choose
from kernels.compile_ahead import Compile, CompileAhead
from kernels.nvcc_ahead import NVCC, find_nvcc
from model.dummy import randomize
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh
from parallel.placement import Placement
from tests.conftest import ROOT
from tests.test_gpu_engine import requests, serve
from tests.test_gpu_model import V3_LIKE

pytestmark = pytest.mark.gpu

# Writes the name of each kernel that nvcc compiles to a file.
NAMED_NVCC = """#!/bin/sh
for argument; do
    case "$argument" in *.cu) grep -o "&[a-z0-9_]*" "$argument" | head -n 1 >>{log} ;; esac
done
exec {nvcc} "$@"
"""
PHASES = ("rehearsal", "warm-up", "serving")


def start(fp8: bool, behind: bool, log: Path) -> None:
    """Warm an engine up, and serve. Print the kernels that Triton compiled in this process and those that it found, by
    phase, how many launchers its cache had at each phase's end, and the answers.

    `behind`: as in `warm_up`; in the end all are compiled.
    """
    import triton

    compiled, found = ({phase: [] for phase in PHASES} for _ in range(2))
    launchers = {}
    phase = "rehearsal"

    warming = threading.Event()

    def enter(new: str) -> None:
        nonlocal phase
        warming.set()
        launchers[phase] = len(list(Path(triton.knobs.cache.dir).glob("*/__triton_launcher*")))
        phase = new
        with log.open("a") as file:
            print(new, file=file)

    def listener(*, src: object, cache_hit: bool, **_: object) -> None:
        (found if cache_hit else compiled)[phase].append(getattr(src, "name", ""))

    def shown(sizes: Iterable[int], what: str) -> Iterable[int]:
        if "kernels" not in what and phase == "rehearsal":
            enter("warm-up")
        return sizes

    offer = CompileAhead.offer

    def offer_late(self: CompileAhead, name: str, compile: Compile) -> None:
        """What the start does not wait for is compiled behind the rehearsal, also on a busy machine."""
        offer(self, name, (lambda: warming.wait() and compile()) if self._behind else compile)

    triton.knobs.compilation.listener = listener
    CompileAhead.offer = offer_late
    mesh, config = Mesh(device=torch.device("cuda")), replace(V3_LIKE, fp8=fp8)
    ops, _ = choose(op_shape(config), torch.bfloat16, mesh.device)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, mesh.device)
    model = Transformer(config, mesh, placement, ops, torch.bfloat16, 1024, fp8)
    randomize(model)
    engine = Engine(EngineConfig(6, 300, 6000, 1024), model, mesh)
    warm_up(engine, shown, behind)
    enter("serving")
    answers = {uid: tokens for uid, (tokens, _) in serve(engine, requests(random.Random(3))).items()}
    if behind:
        engine.compiling.finish()  # another thread has called it, too
        assert engine.compiling.is_done
    engine.close()
    print(json.dumps([compiled, found, launchers, answers]))


def run(folder: Path, fp8: bool, behind: bool = False) -> tuple[dict, dict, dict, dict]:
    """Start, with caches in a folder. Returns what Triton compiled and found, what nvcc compiled, and the answers.

    After the rehearsal no launcher is compiled, unless more is compiled behind it.
    """
    log, nvcc = folder / "log", folder / "nvcc"
    log.write_text("rehearsal\n")
    if not nvcc.exists():
        nvcc.write_text(NAMED_NVCC.format(log=log, nvcc=find_nvcc()))
        nvcc.chmod(0o755)
    caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "DG_JIT_CACHE_DIR": str(folder / "deep_gemm")}
    call = f"start({fp8}, {behind}, Path({str(log)!r}))"
    code = f"from pathlib import Path; from tests.test_gpu_compile_ahead import start; {call}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | caches | {NVCC: str(nvcc)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=280,
    )
    by_nvcc, names = {phase: [] for phase in PHASES}, []
    for line in log.read_text().splitlines():
        if line in by_nvcc:
            names = by_nvcc[line]
        else:
            names.append(line)
    compiled, found, launchers, answers = json.loads(done.stdout.splitlines()[-1])
    assert behind or launchers["rehearsal"] == launchers["warm-up"] > 10
    return compiled, found, by_nvcc, answers


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_nothing_is_compiled_after_the_rehearsal(tmp_path: Path, fp8: bool) -> None:
    """Nor by a second start, which rehearses nothing and gives the same tokens."""
    nothing = {phase: [] for phase in PHASES}
    compiled, found, by_nvcc, answers = run(tmp_path, fp8)
    assert compiled == nothing, "Triton"
    assert len(found["warm-up"]) > 10, "the test shows nothing"
    assert by_nvcc | {"rehearsal": []} == nothing, "DeepGEMM"
    ahead = by_nvcc["rehearsal"]
    in_cache = [path.name for path in (tmp_path / "deep_gemm").glob("cache/kernel.*")]
    assert len(ahead) >= len(in_cache), f"compiled: {ahead}; in DeepGEMM's cache: {in_cache}"
    marks = [*tmp_path.glob("triton/moesaic-*"), *tmp_path.glob("deep_gemm/moesaic/moesaic-*")]
    assert len(marks) == 1 + bool(in_cache)
    times = [mark.stat().st_mtime_ns for mark in marks]
    compiled, again, by_nvcc, same = run(tmp_path, fp8)
    assert (compiled, by_nvcc, same) == (nothing, nothing, answers)
    assert again["rehearsal"] == [] and {*again["warm-up"], *again["serving"]} <= {*found["warm-up"], *found["serving"]}
    assert [mark.stat().st_mtime_ns for mark in marks] == times


def test_what_a_start_compiles_behind_it_is_found_by_the_next(tmp_path: Path) -> None:
    """Both give the same tokens: the first serves while products that few steps need are compiled."""
    nothing = {phase: [] for phase in PHASES}
    compiled, found, by_nvcc, answers = run(tmp_path, fp8=True, behind=True)
    assert compiled == nothing and len(found["warm-up"]) > 10
    assert by_nvcc["rehearsal"] and by_nvcc["warm-up"] + by_nvcc["serving"], "the test shows nothing"
    compiled, _, by_nvcc, same = run(tmp_path, fp8=True, behind=True)
    assert (compiled, by_nvcc, same) == (nothing, nothing, answers)
