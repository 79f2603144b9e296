"""Programmatic dependent launch (CUDA programming guide, of that name): from Hopper on, a kernel may take its place on
the GPU while the one before it in the stream still runs, and waits inside for what that one writes. It hides the start
of a kernel, which is most of a small one.

Every program of such a kernel must wait, whatever it reads: only then does its end say that all before it has ended.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Let the next kernel take its place, and wait for the end of the one before. A kernel's first line."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl(x: Tensor) -> dict[str, bool]:
    """Launch arguments of a kernel that begins with `after_previous(PDL)`, on x's device."""
    return {"PDL": True, "launch_pdl": True} if _is_hopper(x.device) else {"PDL": False}
