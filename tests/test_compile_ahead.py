"""DeepGEMM's kernels compiled ahead, with doubles of DeepGEMM and of nvcc (`tests/deep_gemm_double.py`).

`tests/test_gpu_compile_ahead.py` has the true ones, and Triton's kernels.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from disagg.warm_up_progress import silent
from kernels import ref
from kernels.compile_ahead import CompileAhead
from kernels.nvcc_ahead import NOTE, NVCC, NvccAhead
from tests.conftest import ROOT, eventually
from tests.deep_gemm_double import DeepGemmDouble, make_nvcc

SIZES = [(rows, outputs) for rows in (300, 100, 1) for outputs in (128, 256)]
KERNELS = len(SIZES) + 1  # and one that transposes the scales

Start = Callable[[], tuple[ModuleType, DeepGemmDouble]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start() gives the ops of a fresh process, and its DeepGEMM. All share an nvcc and a cache."""
    monkeypatch.setenv(NVCC, str(make_nvcc(tmp_path / "cuda")))
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    yield lambda: fresh(monkeypatch)
    sys.modules.pop("kernels.deep_gemm_ops", None)


def fresh(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, DeepGemmDouble]:
    double = DeepGemmDouble()
    monkeypatch.setitem(sys.modules, "deep_gemm", double)
    if (
        importlib.util.find_spec("triton") is None
    ):  # then DeepGEMM's ops lack one that they borrow; no test here calls it
        monkeypatch.setitem(sys.modules, "kernels.quant", SimpleNamespace(silu_mul_masked=None))
    sys.modules.pop("kernels.deep_gemm_ops", None)
    return importlib.import_module("kernels.deep_gemm_ops"), double


def operands(rows: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(outputs, 256).to(torch.float8_e4m3fn)
    return *ref.quantize_1x128(torch.randn(rows, 256)), weight, torch.ones(outputs // 128, 2)


def steps(ops: ModuleType) -> list[Tensor]:
    return [ops.gemm_fp8(*operands(*size)) for size in SIZES]


def ahead(place: int = 0, ranks: int = 1) -> CompileAhead:
    return CompileAhead([NvccAhead.of_deep_gemm()], "", place, ranks)


def rehearse(ops: ModuleType, place: int = 0, ranks: int = 1) -> list[str]:
    """Do what a start does before its warm-up. Returns what went wrong."""
    now = ahead(place, ranks)
    with now.installed(), now.rehearsal():
        steps(ops)
    return now.finish()


def runs(tmp_path: Path) -> list[str]:
    """What nvcc compiled, in order."""
    log = tmp_path / "cuda" / "log"
    return [line for line in log.read_text().splitlines() if line != "version"] if log.exists() else []


def store(tmp_path: Path, suffix: str) -> list[Path]:
    return list((tmp_path / "cache" / "moesaic").glob(f"*{suffix}"))


def test_after_a_rehearsal_nvcc_is_not_run_again(tmp_path: Path, start: Start) -> None:
    """It was run once for each kernel. Products are right, nothing is left behind, and a later start has no work."""
    ops, double = start()
    assert rehearse(ops) == []
    compiled = runs(tmp_path)
    assert len(set(compiled)) == len(compiled) == KERNELS == len(store(tmp_path, ".cubin"))
    for out, size in zip(steps(ops), SIZES, strict=True):
        assert torch.equal(out, ref.gemm_fp8(*operands(*size)))
    assert len(double.loaded) == KERNELS and runs(tmp_path) == compiled
    assert not list((tmp_path / "cache" / "tmp").iterdir())
    assert ahead().is_done
    steps(start()[0])
    assert runs(tmp_path) == compiled


def test_the_start_does_not_wait_for_what_few_steps_need(tmp_path: Path, start: Start) -> None:
    """It is compiled behind it, and found when it is needed: in this process, and in later ones."""
    ops, double = start()
    now, hold = ahead(), tmp_path / "cuda" / "hold"
    with now.installed():
        with now.rehearsal():
            ops.gemm_fp8(*operands(*SIZES[0]))
        now.wait(silent)
        hold.touch()
        with now.rehearsal(behind=True):
            steps(ops)
        now.wait(silent)
        ops.gemm_fp8(*operands(*SIZES[0]))
    assert len(double.loaded) == 2 == len(store(tmp_path, ".cubin")) and not now.is_done
    hold.unlink()
    assert now.finish() == [] and now.is_done
    compiled = runs(tmp_path)
    assert len(compiled) == KERNELS == len(store(tmp_path, ".cubin"))
    ops.gemm_fp8(*operands(*SIZES[1]))
    ops, double = start()
    with ahead().installed():
        ops.gemm_fp8(*operands(*SIZES[0]))
    assert len(double.loaded) == 2
    steps(ops)
    assert len(double.loaded) == KERNELS and runs(tmp_path) == compiled


def test_the_environment_is_as_before_in_the_end(start: Start) -> None:
    ops, _ = start()
    before, now = dict(os.environ), ahead()
    assert dict(os.environ) == before
    with now.installed():
        installed = dict(os.environ)
        assert installed.keys() == before.keys() and installed[NVCC] != before[NVCC]
        with now.rehearsal():
            assert os.environ.items() > installed.items()
            steps(ops)
        assert dict(os.environ) == installed
    assert dict(os.environ) == before
    now.finish()


def test_whoever_closes_it_does_not_wait_for_the_compiler(tmp_path: Path, start: Start) -> None:
    ops, _ = start()
    now, hold = ahead(), tmp_path / "cuda" / "hold"
    hold.touch()
    with now.installed(), now.rehearsal():
        steps(ops)
    assert eventually(lambda: bool(runs(tmp_path)))
    began = time.monotonic()
    now.close()
    assert time.monotonic() - began < 5
    assert now.finish() is None and not now.is_done
    assert not [path for path in (tmp_path / "cache" / "moesaic").iterdir() if path.is_dir()], "a folder is left"
    hold.unlink()
    assert rehearse(start()[0]) == [] and len(store(tmp_path, ".cubin")) == KERNELS


def test_a_call_that_is_left_out_is_not_tried_again(tmp_path: Path, start: Start) -> None:
    """Its result stays as it was made. With another number of SMs it is another call."""
    ops, double = start()
    given, hold = operands(300, 128), tmp_path / "cuda" / "hold"
    hold.touch()
    now = ahead()
    with now.installed(), now.rehearsal():
        outs = [ops.gemm_fp8(*given) for _ in range(3)]
        builds = double.builds
        double.num_sms = 112
        ops.gemm_fp8(*given)
        hold.unlink()
    now.finish()
    assert (builds, double.builds) == (2, 4)  # of the scales, and of the product
    assert all(out.shape == (300, 128) and out.min() >= 0 and 0 < out.max() <= 1 for out in outs)


def test_a_folder_that_stays_costs_no_kernel(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepGEMM, or a file system, may keep something in it."""
    compile = DeepGemmDouble.compile

    def keeping(self: DeepGemmDouble, folder: Path) -> None:
        (folder / "kernel.ptx").touch()
        compile(self, folder)

    monkeypatch.setattr(DeepGemmDouble, "compile", keeping)
    assert rehearse(start()[0]) == [] and len(store(tmp_path, ".cubin")) == KERNELS


def test_flags_may_have_any_bytes(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of headers may, and so may the words that the stand-in looks for be in them."""
    folder = tmp_path / "a verbose -cubin\n\udcff"
    monkeypatch.setattr(DeepGemmDouble, "flags", f"-I{shlex.quote(str(folder))}")
    assert rehearse(start()[0]) == [] and len(store(tmp_path, ".cubin")) == KERNELS


def test_what_is_left_out_without_a_note_is_a_problem(start: Start) -> None:
    """So later starts rehearse again."""
    ops, _ = start()
    now = ahead()
    with now.installed(), now.rehearsal():
        os.environ[NOTE] = "/dev/full"
        ops.gemm_fp8(*operands(300, 128))
    assert len(now.finish()) == 2 and not now.is_done


def test_people_see_no_failure_of_a_rehearsal(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    """What DeepGEMM says besides stays."""
    ops, double = start()
    assert rehearse(ops) == [] and double.builds >= KERNELS
    steps(ops)
    assert capfd.readouterr() == ("Warning: an old nvcc\n", "")


def test_what_nvcc_refuses_is_shown_by_the_warm_up_itself(
    tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others are compiled ahead. Nothing is marked as done."""
    ops, double = start()
    now = ahead()
    with now.installed(), now.rehearsal():
        ops.gemm_fp8(*operands(64, 128))
        double.flaw = " broken"
        ops.gemm_fp8(*operands(64, 256))
    (problem,) = now.finish()
    assert problem == f"{tmp_path / 'cuda' / 'nvcc'}: kernel.cu(1): error: broken"
    assert not now.is_done
    assert "broken" not in capfd.readouterr().out
    with pytest.raises(RuntimeError, match="NVCC compilation failed"):
        ops.gemm_fp8(*operands(64, 256))
    double.flaw = ""
    ops.gemm_fp8(*operands(64, 128))
    assert "NVCC compilation failed" in capfd.readouterr().out
    assert sum("broken" in line for line in runs(tmp_path)) == 2 and len(runs(tmp_path)) == 4


def test_ranks_of_a_machine_share_the_work(tmp_path: Path, start: Start) -> None:
    """Each kernel is compiled by one of them, and found by all."""
    ranks = [start()[0] for _ in range(2)]
    for place, ops in enumerate(ranks):
        assert rehearse(ops, place, 2) == []
    assert len(runs(tmp_path)) == KERNELS
    for ops in ranks:
        steps(ops)
    assert len(runs(tmp_path)) == KERNELS


def test_every_kernel_is_the_share_of_one_rank() -> None:
    """Shares are about equal. What is offered again is not compiled again."""
    compiled: list[list[int]] = [[], [], []]
    for place, mine in enumerate(compiled):
        now = CompileAhead([], "", place, 3)
        for kernel in [*range(300), *range(300)]:
            now.offer(f"kernel {kernel}", partial(mine.append, kernel))
        assert now.finish() == []
    assert sorted(kernel for mine in compiled for kernel in mine) == list(range(300))
    assert all(80 < len(mine) < 120 for mine in compiled)


def test_a_kernel_that_cannot_be_compiled_ends_no_start() -> None:
    def broken() -> str:
        raise KeyError("of the library")

    now = CompileAhead([], "")
    now.offer("one", broken)
    now.offer("two", lambda: "what the compiler said")
    now.offer("three", lambda: None)
    now.wait(silent)
    assert now.finish() == ["KeyError: 'of the library'", "what the compiler said"]


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.conftest import eventually
from tests.test_compile_ahead import ahead, fresh, operands, runs, store
folder = Path(sys.argv[1])
ops, _ = fresh(pytest.MonkeyPatch())
now = ahead()
with now.installed(), now.rehearsal():
    ops.gemm_fp8(*operands(300, 128))
    assert eventually(lambda: len(store(folder, ".cubin")) == 2)
    (folder / "cuda" / "hold").touch()
    ops.gemm_fp8(*operands(300, 256))
    assert eventually(lambda: len(runs(folder)) == 3)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_start_has_compiled_is_the_next_ones(tmp_path: Path, start: Start) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=100, check=False).returncode == -9
    (tmp_path / "cuda" / "hold").unlink()
    assert len(store(tmp_path, ".cubin")) == 2 and len(runs(tmp_path)) == 3
    ops, double = start()
    now = ahead()
    with now.installed(), now.rehearsal():
        for size in ((300, 128), (300, 256)):
            ops.gemm_fp8(*operands(*size))
    assert now.finish() == [] and not double.loaded
    assert len(runs(tmp_path)) == 4 and len(store(tmp_path, ".cubin")) == 3


def test_a_start_does_not_wait_for_kernels_of_the_job_beside_it(tmp_path: Path, start: Start) -> None:
    def begin(count: int) -> CompileAhead:
        now, (ops, _) = ahead(), start()
        with now.installed(), now.rehearsal():
            for size in SIZES[:count]:
                ops.gemm_fp8(*operands(*size))
        return now

    hold = tmp_path / "cuda" / "hold"
    assert begin(1).finish() == []
    hold.touch()
    other = begin(len(SIZES))
    assert eventually(lambda: len(runs(tmp_path)) > 2)
    assert begin(1).finish() == [] and len(store(tmp_path, ".cubin")) == 2
    hold.unlink()
    assert other.finish() == [] and len(store(tmp_path, ".cubin")) == KERNELS


def test_another_nvcc_makes_other_cubins(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearse(start()[0]) == []
    shutil.rmtree(tmp_path / "cache" / "cache", ignore_errors=True)  # what DeepGEMM has loaded in the rehearsal
    nvcc = make_nvcc(tmp_path / "other")
    monkeypatch.setenv(NVCC, str(nvcc))
    assert rehearse(start()[0]) == []
    assert len((tmp_path / "other" / "log").read_text().splitlines()) == KERNELS + 1  # its version, too
    assert len(store(tmp_path, ".cubin")) == 2 * KERNELS


def test_where_no_stand_in_can_be_nothing_is_compiled_ahead(tmp_path: Path) -> None:
    nvcc = make_nvcc(tmp_path / "cuda")
    with pytest.raises(OSError, match="No such file"):
        NvccAhead(str(tmp_path / "nvcc"), tmp_path)
    with pytest.raises(OSError, match="would not quote it"):
        NvccAhead(str(nvcc), tmp_path / "a folder")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        NvccAhead(str(nvcc), tmp_path / "file")


def test_the_stand_in_leaves_all_else_to_nvcc(tmp_path: Path) -> None:
    """A version, PTX, and a verbose build, whose words may be what is wanted."""
    nvcc = make_nvcc(tmp_path / "cuda")
    stand_in = next((NvccAhead(str(nvcc), tmp_path / "cache").cache).iterdir())
    (tmp_path / "kernel.cu").write_text("text\n")
    out, environment = str(tmp_path / "out"), os.environ | {NOTE: str(tmp_path / "note")}
    for arguments in (["-ptx", "-o", out], ["-cubin", "-o", out, "--ptxas-options=--verbose"]):
        command = [str(stand_in), str(tmp_path / "kernel.cu"), *arguments]
        assert subprocess.run(command, env=environment, timeout=20, check=False).returncode == 0
    assert runs(tmp_path) == ["text", "text"] and not (tmp_path / "note").exists()
    assert b"release 13.0" in subprocess.check_output([str(stand_in), "--version"], env=environment)
