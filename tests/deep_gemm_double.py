"""A double of DeepGEMM that builds as its csrc/jit/compiler.hpp does, and of the nvcc that it runs.

The double asks what the true library asks: nvcc's version once, at its first build, and a cubin per kernel. It takes
the same folders, the same command line and the same words. A product is computed by its twin, once its kernel is built.
What the doubles cannot show: that the true library's cubins are the same wherever they are compiled.
"""

import ctypes
import hashlib
import os
import subprocess
import uuid
from pathlib import Path

import torch
from torch import Tensor

from kernels import ref

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "version" >>{log}; echo "Cuda compilation tools, release 13.0, V13.0.1"; exit; fi
head -n 1 "$1" >>{log}
n=0
while [ -e {hold} ] && [ $n -lt 600 ]; do sleep 0.05; n=$((n + 1)); done
if grep -q broken "$1"; then echo "$1(1): error: broken"; exit 2; fi
{{ echo "cubin, $5"; cat "$1"; }} >"$4"
"""


def make_nvcc(folder: Path) -> Path:
    """Make an nvcc. `log` beside it has a line for each run: the source's first, or the word version.

    It refuses sources with the word broken, and waits while there is a file `hold` beside it, for 30 s at most.
    """
    folder.mkdir()
    nvcc = folder / "nvcc"
    nvcc.write_text(NVCC.format(log=folder / "log", hold=folder / "hold"))
    nvcc.chmod(0o755)
    return nvcc


class DeepGemmDouble:
    __version__ = "double"
    flags = ""  # more of them

    def __init__(self) -> None:
        """It has not built anything, and reads its environment when it does."""
        self.nvcc = self.cache = None
        self.loaded: dict[Path, str] = {}
        self.builds = 0  # attempts
        self.num_sms = 132
        self.flaw = ""  # part of each source

    def get_num_sms(self) -> int:
        return self.num_sms

    def set_pdl(self, on: bool) -> None:
        """How kernels are launched changes nothing of what is built."""

    def fp8_gemm_nt(
        self, rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], out: Tensor, disable_ue8m0_cast: bool
    ) -> None:
        (x, x_scale), (weight, weight_scale) = rows, weights
        assert disable_ue8m0_cast and is_aligned(x_scale)
        self.build("gemm", f"gemm {tuple(weight.shape)} {-(-len(x) // 64)} {self.num_sms}{self.flaw}")
        out.copy_(ref.gemm_fp8(x, x_scale, weight, weight_scale))

    def get_mn_major_tma_aligned_tensor(self, scale: Tensor) -> Tensor:
        if is_aligned(scale):
            return scale
        self.build("transpose", f"transpose {scale.shape[1]}")
        return aligned_like(scale).copy_(scale)

    def build(self, name: str, code: str) -> None:
        if self.nvcc is None:
            self.nvcc, self.cache = os.environ["DG_JIT_NVCC_COMPILER"], Path(os.environ["DG_JIT_CACHE_DIR"])
            assert "release" in subprocess.check_output([self.nvcc, "--version"], text=True)
            printf("Warning: an old nvcc\n")
        folder = self.cache / "cache" / f"kernel.{name}.{hashlib.sha256(code.encode()).hexdigest()[:16]}"
        if folder in self.loaded:
            return
        if not folder.exists():
            self.builds += 1
            temporary = self.cache / "tmp" / uuid.uuid4().hex
            temporary.mkdir(parents=True)
            (temporary / "kernel.cu").write_text(code + "\n")
            self.compile(temporary)
            folder.parent.mkdir(exist_ok=True)
            temporary.rename(folder)
        self.loaded[folder] = (folder / "kernel.cubin").read_text()
        assert self.loaded[folder] == f"cubin, -O3\n{code}\n", "another kernel's cubin"

    def compile(self, folder: Path) -> None:
        source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
        command = f"cd {folder.parent} && {self.nvcc} {source} -cubin -o {cubin} -O3 {self.flags} 2>&1"
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            printf(f"NVCC compilation failed: {done.stdout}\n")
            raise RuntimeError("Assertion error (csrc/jit/compiler.hpp): false and NVCC compilation failed")


def printf(text: str) -> None:
    """Print as C code does, into its own buffer."""
    ctypes.CDLL(None).printf(b"%s", text.encode())


def aligned_like(scale: Tensor) -> Tensor:
    rows, columns = scale.shape
    stride = -(-rows // 4) * 4
    return torch.empty(columns * stride).as_strided((rows, columns), (1, stride))


def is_aligned(scale: Tensor) -> bool:
    return scale.stride() == aligned_like(scale).stride()
