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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
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


@gluon.jit
def clear_end(left, right, rest, full, last):
    """Zero the rows from `last` on of the page that holds the last key: the first of the pages that are visited."""
    PAGE: gl.constexpr = left.shape[1]
    if last % PAGE > 0:
        mbarrier.wait(full.index(0), 0)
        clear_rows(left.index(0), last % PAGE)
        clear_rows(right.index(0), last % PAGE)
        clear_rows(rest.index(0), last % PAGE)
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def load_rows(left_desc, right_desc, rest_desc, row, bar, left, right, rest):
    """Ask TMA for the rows of a tile, of queries or of a page; `bar` flips when all are in shared memory."""
    mbarrier.expect(bar, 2 * left_desc.block_type.nbytes + rest_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(rest_desc, [row, 0], bar, rest)
    tma.async_copy_global_to_shared(left_desc, [row, 0], bar, left)
    tma.async_copy_global_to_shared(right_desc, [row, 0], bar, right)


@gluon.jit
def load_pages(left_desc, right_desc, rest_desc, page_table, last_page, first, end, left, right, rest, full, empty):
    """Run the loader warp: pages first to end - 1, counted back from the last, into the buffer that is free."""
    for i in range(first, end):
        row = gl.load(page_table + last_page - i) * left_desc.block_type.shape[0]
        at = i % 2
        mbarrier.wait(empty.index(at), (i // 2 & 1) ^ 1)
        load_rows(
            left_desc, right_desc, rest_desc, row, full.index(at), left.index(at), right.index(at), rest.index(at)
        )


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
