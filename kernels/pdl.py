"""Programmatic dependent launch (the CUDA programming guide's name for it): from Hopper on, a kernel may take its place
on the GPU while the one before it in the stream still runs, and waits inside for what that one writes. It hides the
start of a kernel, which is most of a small one.

Every program of such a kernel must wait, whatever it reads: only then does its end say that all before it has ended.
And not every library's kernel can be trusted to wait: FlashMLA's is launched to take its place early, and tokens of a
captured step were wrong until what comes before it let it in only at its own end: `after_previous(PDL, LET_NEXT=False)`
(seen on an H100; `tests/test_gpu_engine.py`).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(PDL: tl.constexpr, LET_NEXT: tl.constexpr = True):
    """Wait for the end of the kernel before, and let the next one take its place now. A kernel's first line."""
    if PDL:
        if LET_NEXT:  # noqa: SIM102
            gdc_launch_dependents()
        gdc_wait()


@triton.jit
def let_next(PDL: tl.constexpr):
    """Let the next kernel take its place from here on, where it would only be in the way before: late in a kernel whose
    programs fill the GPU, which began with after_previous(PDL, LET_NEXT=False)."""
    if PDL:
        gdc_launch_dependents()


@cache
def _has_it(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl(x: Tensor) -> dict[str, bool]:
    """Launch arguments of a kernel that begins with `after_previous(PDL)`, on x's device."""
    return {"PDL": True, "launch_pdl": True} if _has_it(x.device) else {"PDL": False}
