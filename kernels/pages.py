"""KV pages to and from one contiguous piece of memory in Triton: the handoff sends them packed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # words of 8 bytes a program copies: 16 KiB, 16 bytes a thread at a time


@triton.jit
def _copy_kernel(
    pool, packed, pages, words, layer_stride, page_stride, UNPACK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Grid (page, layer, chunk); strides in words."""
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


def pack_pages(pool: Tensor, pages: Tensor) -> Tensor:
    """pool [layers, pages, 64, W] contiguous, pages [n] int64 -> those pages of every layer [layers, n, 64, W]."""
    packed = pool.new_empty(pool.shape[0], pages.numel(), *pool.shape[2:])
    _copy(pool, packed, pages, unpack=False)
    return packed


def unpack_pages(packed: Tensor, pool: Tensor, pages: Tensor) -> None:
    """The way back, in place: packed [layers, n, 64, W] contiguous -> pool's pages [n] int64, all different."""
    _copy(pool, packed, pages, unpack=True)
