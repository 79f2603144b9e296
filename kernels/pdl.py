"""Programmatic dependent launch (the CUDA programming guide's term), from Hopper on.

A kernel may start on the GPU while the kernel before it in the stream still runs. It then waits, inside, for that
kernel's results. This hides the launch, which takes most of a small kernel's time.

Every program of such a kernel must wait, whatever it reads. Only then does its end imply that all kernels before it
have ended.

Hazard: not every library's kernel waits as it should. FlashMLA's is launched to start early, and a captured step gave
wrong tokens (seen on an H100; `tests/test_gpu_engine.py`). So a kernel of ours that may precede it lets the next kernel
start only at its own end: `after_previous(PDL, LET_NEXT=False)`.

One pair runs side by side: `absorb.write_and_absorb`. The first kernel waits, and only then lets the second start. So
what was enqueued before both has ended, and the second may read it at once. It waits for the first at its own end.

A kernel may read weights before it waits, except experts' (a rebalance moves those). They were there before the step,
and a step begins with kernels of torch, which start when all before them has ended.

`decode_few_heads` reads the step's plan, and pages without a row of this step, before it waits. That is right only if
the kernel before lets it start after a wait, its own or that of the pair above. The plan's kernel lets nothing start
early.

A small kernel before one whose programs fill the GPU lets it start only at its end, too. Those would wait in all SMs,
and keep out the shared expert's kernels on the second stream (`model/moe.py`).
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
    """Let the next kernel start from here on.

    At the end of a kernel whose programs fill the GPU: an earlier start of the next one would only take resources from
    them. That kernel must have begun with after_previous(PDL, LET_NEXT=False).
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for the end of the kernel before, with some work done already. The kernel must have no `after_previous`."""
    if PDL:
        gdc_wait()


@cache
def _has_it(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl(x: Tensor) -> dict[str, bool]:
    """Return the launch arguments for a kernel that begins with `after_previous(PDL)`, on x's device."""
    return {"PDL": True, "launch_pdl": True} if _has_it(x.device) else {"PDL": False}
