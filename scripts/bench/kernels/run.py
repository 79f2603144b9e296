"""Time our Triton kernels against the vendors' in one run, at DeepSeek-V3's shapes (on one Hopper GPU).

python -m scripts.bench.kernels --out measurements.json
python -m scripts.bench.kernels --only decode

Most of a first run is compilation: of our kernels, and of vendors' kernels that are compiled at run time.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.bench.lib.flags import new_file
from scripts.bench.lib.measurements import save

PARTS = ("gemm", "decode", "prefill", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone (may be repeated)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU that torch can use")
    measure(args.only or PARTS, args.out)


def measure(parts: Sequence[str], out: Path | None) -> None:
    from scripts.bench.kernels import attention, gemm  # they import Triton, which may be missing without a GPU
    from scripts.bench.kernels.table import RECORDS, header

    benches = {
        "gemm": [gemm.products],
        "decode": [attention.decodes],
        "prefill": [attention.prefills],
        "memory": [gemm.moves, attention.moves],
    }
    torch.manual_seed(0)
    header()
    try:
        for part in parts:
            start = time.perf_counter()
            for bench in benches[part]:
                bench()
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    finally:
        if out is not None:
            save(RECORDS, out)
