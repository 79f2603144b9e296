"""Our Triton kernels against the vendors' in one run, at DeepSeek-V3's shapes (one Hopper GPU):

python scripts/bench_kernels.py --out measurements.json
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts import bench_attention, bench_gemm
from scripts.kernel_table import RECORDS, header
from scripts.measurements import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the records there, for scripts/report.py")
    args = parser.parse_args()
    torch.manual_seed(0)
    header()
    try:
        bench_gemm.run()
        bench_attention.run()
    finally:
        if args.out is not None:
            save(RECORDS, args.out)


if __name__ == "__main__":
    main()
