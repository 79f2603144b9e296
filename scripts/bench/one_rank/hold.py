"""A kernel that occupies SMs for a given time, as a communication kernel does, and computes nothing."""

import triton
import triton.language as tl

NUM_WARPS = 32  # 1,024 threads leave no room on the SM for a block of the GEMMs or attention kernels


@triton.jit(do_not_specialize=["nanoseconds"])
def _hold_kernel(nanoseconds):
    start = tl.extra.cuda.globaltimer()
    now = start
    while now - start < nanoseconds:
        now = tl.extra.cuda.globaltimer()


def hold(num_sms: int, seconds: float) -> None:
    """Occupy `num_sms` SMs on the current stream, each for `seconds` from its block's start. Safe in a CUDA graph."""
    _hold_kernel[(num_sms,)](round(seconds * 1e9), num_warps=NUM_WARPS)
