"""Programmatic dependent launch (the CUDA programming guide's term), from Hopper on.

A kernel may start on the GPU while the kernel before it in the stream still runs. It then waits, inside, for that
kernel's results. This hides the launch, which takes most of a small kernel's time.

Every program of such a kernel must wait, whatever it reads. Only then does its end imply that all kernels before it
have ended. A kernel lets the next one start at one of three places:

    before it waits   `after_previous(PDL)`; or `let_next`, some reads, `wait_for_previous`
    after its wait    `after_previous(PDL, LET_NEXT=False)` or `wait_for_previous`, and `let_next` later
    at its end        `after_previous(PDL, LET_NEXT=False)` alone

The last is for three cases:

    FlashMLA next     It does not wait as it should: it starts early, and a captured step gave wrong tokens (seen on an
                      H100; `tests/test_gpu_engine.py`).
    a full GPU next   Programs that fill the GPU would wait in all SMs, and keep out the shared expert's kernels on the
                      second stream (`model/moe.py`).
    a step's plan     Its readers come before their wait: see below.

Some reads come before the wait. Each needs a reason why what it reads is there:

    weights       They were there before the step. A step begins with kernels of torch, which start when all before them
                  has ended. Experts' weights are not read so: a rebalance moves them.
    a query       `absorb.write_and_absorb` runs two kernels side by side. The first waits, and only then lets the
                  second start. So what was enqueued before both has ended. The second waits for the first at its end.
    a step's plan, and pages without a row of the step
                  `decode_few_heads` reads them, and the merge of its splits reads the plan. The kernel before it, of
                  `absorb.py`, lets it start after a wait: its own, or that of the first of the pair above. The kernel
                  that makes the plan lets nothing start early.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(PDL: tl.constexpr, LET_NEXT: tl.constexpr = True):
    """Let the next kernel start now, and wait for the end of the kernel before. A kernel's first line."""
    if PDL:
        if LET_NEXT:
            gdc_launch_dependents()
        gdc_wait()


@triton.jit
def let_next(PDL: tl.constexpr):
    """Let the next kernel start from here on."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for the end of the kernel before, with some reads done already. The kernel has no `after_previous` then."""
    if PDL:
        gdc_wait()


@cache
def _has_it(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl(x: Tensor) -> dict[str, bool]:
    """Return the launch arguments for a kernel that waits for the one before, on x's device."""
    return {"PDL": True, "launch_pdl": True} if _has_it(x.device) else {"PDL": False}
