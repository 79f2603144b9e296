"""Kernels compiled ahead, on a GPU: the warm-up itself compiles none, a second start rehearses nothing, same tokens.

Every start is a process of its own, because Triton remembers what it has loaded.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.warm_up import run_every_size, warm_up
from kernels.backend import choose
from model.dummy import randomize
from model.transformer import Transformer, op_shape
from parallel.mesh import Mesh
from parallel.placement import Placement
from tests.test_gpu_engine import requests, serve
from tests.test_gpu_model import V3_LIKE

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]


def start(ahead: bool, fp8: bool) -> None:
    """Warm an engine up, and print what Triton compiled in this process, what it found, and an engine's answers."""
    import triton

    compiled, found = Counter(), Counter()

    def listener(*, src: object, cache_hit: bool, **_: object) -> None:
        (found if cache_hit else compiled)[getattr(src, "name", "")] += 1

    triton.knobs.compilation.listener = listener
    mesh, config = Mesh(device=torch.device("cuda")), replace(V3_LIKE, fp8=fp8)
    ops, _ = choose(op_shape(config), torch.bfloat16, mesh.device)
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1, mesh.device)
    model = Transformer(config, mesh, placement, ops, torch.bfloat16, 1024, fp8)
    randomize(model)
    engine = Engine(EngineConfig(6, 300, 6000, 1024), model, mesh)
    (warm_up if ahead else run_every_size)(engine)
    answers = serve(engine, requests(random.Random(3)))
    print(json.dumps([compiled, found, {uid: tokens for uid, (tokens, _) in answers.items()}]))


def run(cache: Path, ahead: bool, fp8: bool) -> tuple[dict, dict, dict]:
    code = f"from tests.test_gpu_compile_ahead import start; start({ahead}, {fp8})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=280,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_warm_up_compiles_nothing_itself(tmp_path: Path, fp8: bool) -> None:
    compiled, found, tokens = run(tmp_path / "ahead", True, fp8)
    one_by_one, _, wanted = run(tmp_path / "alone", False, fp8)
    assert len(one_by_one) > 10 and compiled == {} and found == one_by_one
    assert tokens == wanted
    mark = [path for path in (tmp_path / "ahead").iterdir() if path.name.startswith("moesaic-")]
    assert len(mark) == 1
    before = mark[0].stat().st_mtime_ns
    again = run(tmp_path / "ahead", True, fp8)
    assert again == ({}, found, tokens) and mark[0].stat().st_mtime_ns == before
