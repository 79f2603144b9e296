"""Count the peak memory of tensors on a CPU, to test the formulas of `disagg/memory.py` against it.

The ops here allocate the same tensors as the GPU kernels and compute nothing. A `FakeGroup` stands for ranks that all
send the same rows.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels.fp8 import Quantized
from kernels.groups import Groups
from kernels.ops import Ops
from kernels.rooms import FEW_ROWS
from model.footprint import split_heads
from parallel.copies import grouped_rows
from parallel.mesh import AllToAll, Group


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors made inside it: `live` is the current number, `most` the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.sizes: dict[int, int] = {}  # bytes of each live storage

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.live += self.sizes[key]
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class FakeGroup(Group):
    """A group without processes, whose other ranks route like this one."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x.new_empty(self.share(x.shape[0]), *x.shape[1:])

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] * self.size, *x.shape[1:])

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, send: list[int] | None = None, recv: list[int] | None = None) -> AllToAll:
        if x.dim() == 1:  # counts of rows: each rank sends as many to this one as it sends to itself
            return AllToAll(torch.full_like(x, int(x[0])), None, x)
        return AllToAll(x.new_zeros(sum(recv) if recv else x.shape[0], *x.shape[1:]), None, x)  # zeros are valid ids


def allocating_ops(alignment: int) -> Ops:
    return Ops(
        rms_norm=lambda x, weight, eps: x.new_empty(x.shape),
        add_rms_norm=lambda x, delta, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
        rms_norm_quant=lambda x, weight, eps, bare=True: (x.new_empty(x.shape) if bare else None, *_quantized(x)),
        add_rms_norm_quant=lambda x, delta, weight, eps, bare=True: (
            x.new_empty(x.shape) if bare else None,
            *_quantized(x),
            x.new_empty(x.shape),
        ),
        rope_query=lambda *_: None,
        absorb_query=lambda q, w, *_: q.new_empty(*q.shape[:2], q.shape[2] - w.shape[1] + w.shape[2]),
        project_values=_project_values,
        norm_rope_write=lambda *_: None,
        write_and_absorb=lambda q, w, *_: q.new_empty(*q.shape[:2], q.shape[2] - w.shape[1] + w.shape[2]),
        silu_mul=_halved,
        prefill_attention=_prefill_attention,
        mla_decode=_mla_decode,
        linear=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
        linear_float32=_linear_float32,
        ffn_beside=lambda x, gate_up, down: _halved(x.new_empty(len(x), len(gate_up))).new_empty(len(x), len(down)),
        gate_topk=_first_experts,
        ep_scatter=_scatter,
        ep_scatter_masked=_scatter_masked,
        ep_gather=lambda rows, index, weights=None, plus=None: rows.new_empty(
            len(weights if index is None else index), rows.shape[-1]
        ),
        gemm_of_copies=lambda x, weight, slots: x.new_empty(slots.numel(), weight.shape[1]),
        swiglu_of_copies=lambda x, weight, slots: x.new_empty(slots.numel(), weight.shape[1] // 2),
        grouped_gemm_contiguous=lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[-2]),
        grouped_gemm_masked=lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[-2]),
        swiglu_masked=_swiglu_masked,
        quantize_1x128=_quantized,
        silu_mul_quant=lambda x, groups=None: _quantized(x, x.shape[-1] // 2),
        silu_mul_quant_masked=lambda x, _: _quantized(x, x.shape[-1] // 2),
        gemm_fp8=_gemm_fp8,
        grouped_gemm_contiguous_fp8=_gemm_fp8,
        grouped_gemm_masked_fp8=_gemm_fp8,
        alignment=alignment,
    )


def _prefill_attention(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, *rest: Any) -> Tensor | Quantized:
    heads, width = v.shape[1:]
    return _quantized(q.flatten(1), heads * width) if rest[-1] else v.new_empty(len(q), heads, width)


def _project_values(x: Tensor, weight: Tensor, quantize: bool = False) -> Tensor | Quantized:
    heads, width = weight.shape[:2]
    return _quantized(x.flatten(1), heads * width) if quantize else x.new_empty(len(x), heads, width)


def _linear_float32(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32) if out is None else out


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _quantized(x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    width = width or x.shape[-1]
    values = x.new_empty(*x.shape[:-1], width, dtype=torch.float8_e4m3fn)
    return values, x.new_empty(*x.shape[:-1], -(-width // 128), dtype=torch.float32)


def _halved(x: Tensor, _: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _swiglu_masked(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """In small rooms one kernel makes it."""
    width = weight.shape[-2]
    if x.shape[1] <= FEW_ROWS:
        return x.new_empty(*x.shape[:-1], width // 2)
    return _halved(x.new_empty(*x.shape[:-1], width))


def _gemm_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, *_: Tensor | Groups) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-2], dtype=torch.bfloat16)


def _mla_decode(q: Tensor, pages: Tensor, table: Tensor, lens: Tensor, scale: float, v_dim: int, plan: None) -> Tensor:
    partial = q.new_empty(split_heads(*q.shape[:2]), v_dim, dtype=torch.float32)
    out = q.new_empty(*q.shape[:2], v_dim)
    del partial
    return out


def _first_experts(logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, *_: Any, **__: Any) -> Any:
    """Every token chooses experts 0 .. K - 1: as many of rank 0's as possible."""
    return torch.arange(top_k).repeat(logits.shape[0], 1), logits.new_empty(logits.shape[0], top_k)


def _scatter(
    x: Tensor,
    experts: Tensor,
    groups: int,
    alignment: int,
    counts: Sequence[int] | None = None,
    scales: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple:
    """Allocate the rows for these counts, or as many as asked; with neither, the largest possible number."""
    rows = num_rows or grouped_rows(experts.shape[0] * min(experts.shape[1], groups), groups, alignment)
    if counts is not None:
        rows = sum(-(-count // alignment) * alignment for count in counts)
    moved = [t.new_empty(rows, t.shape[1]) for t in (x, scales) if t is not None]
    return (
        moved[0],
        Groups(experts.new_empty(groups, dtype=torch.int32), alignment),
        torch.empty_like(experts),
        *moved[1:],
    )


def _scatter_masked(x: Tensor, experts: Tensor, groups: int, alignment: int, scales: Tensor | None = None) -> tuple:
    room = -(-x.shape[0] // alignment) * alignment
    moved = [t.new_empty(groups, room, t.shape[1]) for t in (x, scales) if t is not None]
    return moved[0], experts.new_empty(groups, dtype=torch.int32), torch.empty_like(experts), *moved[1:]
