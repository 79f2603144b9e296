"""Pack KV pages into contiguous memory and back, in Triton: the handoff sends them packed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # words of 8 bytes per program: 16 KiB, in pieces of 16 bytes per thread


@triton.jit
def _copy_kernel(pool, packed, pages, words, layer_stride, page_stride, UNPACK: tl.constexpr, CHUNK: tl.constexpr):
    """Copy one chunk of one page of one layer. Grid (page, layer, chunk); strides in words."""
    place, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    here = word < words
    scattered = pool + layer * layer_stride + tl.load(pages + place) * page_stride + word
    dense = packed + (layer * tl.num_programs(0) + place) * words + word
    if UNPACK:
        tl.store(scattered, tl.load(dense, mask=here), mask=here)
    else:
        tl.store(dense, tl.load(scattered, mask=here), mask=here)


def _copy(pool: Tensor, packed: Tensor, pages: Tensor, unpack: bool) -> None:
    if packed.numel() == 0:
        return
    pool, packed = (x.view(*x.shape[:2], -1).view(torch.int64) for x in (pool, packed))  # [layers, pages, words]
    layers, num_pages, words = packed.shape
    grid = (num_pages, layers, triton.cdiv(words, CHUNK))
    _copy_kernel[grid](pool, packed, pages, words, pool.stride(0), pool.stride(1), unpack, CHUNK, num_warps=4)


def pack_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> None:
    """Copy pages [n] int64 of every layer of pool [layers, pages, 64, W] to packed [layers, n, 64, W], contiguous."""
    _copy(pool, packed, pages, unpack=False)


def unpack_pages(packed: Tensor, pool: Tensor, pages: Tensor) -> None:
    """Undo `pack_pages`, in place: packed [layers, n, 64, W] contiguous -> pool's pages [n] int64, all different."""
    _copy(pool, packed, pages, unpack=True)
