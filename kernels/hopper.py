"""Shared parts of the attention kernels' fast paths. They are in Gluon, Triton's lower level: Hopper only, bf16.

The loops are those of `mla_decode.py` and `prefill_attention.py`: read these first. Here, layouts, copies and waits are
explicit; there the compiler decides them. One warp, the loader, only asks TMA for tiles, with two buffers for each. The
loader and the computing warps meet at barriers in shared memory: `full` flips when a tile has arrived, `empty` when its
readers are done. Blocks are visited from the last key to the first: masks and half-filled pages come first in the loop.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def clear_rows(tile, first):
    """Zero the rows of a shared tile from `first` on, because 0 * NaN would spoil the product with the values."""
    COLS: gl.constexpr = tile.shape[1]
    WIDTH: gl.constexpr = 64 if COLS > 64 else COLS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    for col in gl.static_range(0, COLS, WIDTH):
        piece = tile.slice(col, WIDTH, dim=1)
        values = piece.load(layout)
        piece.store(gl.where((row < first)[:, None], values, gl.zeros_like(values)))


@functools.cache
def _tile_layout(rows: int, cols: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, cols], gl.bfloat16)


def tile(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Describe x [N, columns] for TMA tiles [rows, cols]."""
    return TensorDescriptor.from_tensor(x, [rows, cols], _tile_layout(rows, cols))


def flat(x: Tensor) -> Tensor:
    """Return x [N, H, d] (unit last stride) as a view [N, columns]; head h begins at column h * x.stride(1)."""
    return x.as_strided((x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]), (x.stride(0), 1))


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def on_hopper(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and is_hopper(q.device)
