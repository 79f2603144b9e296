"""A kernel that holds SMs for a given time: what a communication kernel takes away, without what it does."""

import triton
import triton.language as tl

NUM_WARPS = 32  # with 1,024 threads on an SM, none of the GEMMs' and attentions' blocks finds room there


@triton.jit(do_not_specialize=["nanoseconds"])
def _hold_kernel(nanoseconds):
    start = tl.extra.cuda.globaltimer()
    now = start
    while now - start < nanoseconds:
        now = tl.extra.cuda.globaltimer()


def hold(num_sms: int, seconds: float) -> None:
    """`num_sms` blocks, each for so long from when it began, on the current stream. Safe in a CUDA graph."""
    _hold_kernel[(num_sms,)](round(seconds * 1e9), num_warps=NUM_WARPS)
