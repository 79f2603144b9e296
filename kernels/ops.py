"""Ops: every op that the model and the handoff call, typed. An op's twin in `kernels/ref.py` is its contract.

A job makes one Ops (`kernels/backend.py` chooses the libraries) and hands it to the model's constructors.
"""

from collections import abc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kernels import ref
from kernels.addends import Delta
from kernels.fp8 import Quantized
from kernels.groups import Groups

# Ops whose arguments are all positional. Ops with named or default arguments are protocols, below.
T = Tensor
Norm = Callable[[T, T, float], T]
AddNorm = Callable[[T, Delta, T, float], tuple[T, T]]
Product = Callable[[T, T], T]
GroupedProduct = Callable[[T, T, Groups], T]
IndexedProduct = Callable[[T, T, T], T]  # by counts, or by a slot per copy
Fp8Product = Callable[[T, T, T, T], T]
Fp8GroupedProduct = Callable[[T, T, T, T, Groups], T]
Fp8MaskedProduct = Callable[[T, T, T, T, T], T]
NormRopeWrite = Callable[[T, T, float, T, T, T, T, T], None]
WriteAndAbsorb = Callable[[T, T, T, T, float, T, T, T, T, T, Any], T]


class RmsNormQuant(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, bare: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]: ...


class AddRmsNormQuant(Protocol):
    def __call__(
        self, x: Tensor, delta: Delta, weight: Tensor, eps: float, bare: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]: ...


class ProductFloat32(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor: ...


class ProjectValues(Protocol):
    def __call__(self, attended: Tensor, w_uv: Tensor, quantize: bool = False) -> Tensor | Quantized: ...


class SiluMul(Protocol):
    def __call__(self, x: Tensor, groups: Groups | None = None) -> Tensor: ...


class SiluMulQuant(Protocol):
    def __call__(self, x: Tensor, groups: Groups | None = None) -> Quantized: ...


class PrefillAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        v: Tensor,
        q_starts: Tensor,
        kv_starts: Tensor,
        max_q: int,
        max_kv: int,
        scale: float,
        quantize: bool = False,
    ) -> Tensor | Quantized: ...


class MlaDecode(Protocol):
    def __call__(
        self,
        q: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        kv_lens: Tensor,
        scale: float,
        v_dim: int | None = None,
        plan: Any = None,
    ) -> Tensor: ...


class GateTopk(Protocol):
    def __call__(
        self,
        logits: Tensor,
        bias: Tensor | None,
        n_group: int,
        topk_group: int,
        top_k: int,
        normalize: bool,
        scale: float,
        slot_of_expert: Tensor | None = None,
        is_token: Tensor | None = None,
        softmax: bool = False,
        group_best: int = 2,
    ) -> tuple[Tensor, Tensor]: ...


class EpScatter(Protocol):
    def __call__(
        self,
        x: Tensor,
        experts: Tensor,
        num_local: int,
        alignment: int,
        counts: abc.Sequence[int] | None = None,
        scales: Tensor | None = None,
        num_rows: int | None = None,
    ) -> tuple[Any, ...]: ...


class EpScatterMasked(Protocol):
    def __call__(
        self, x: Tensor, experts: Tensor, num_local: int, alignment: int = 1, scales: Tensor | None = None
    ) -> tuple[Tensor, ...]: ...


class EpGather(Protocol):
    def __call__(
        self, rows: Tensor, index: Tensor | None, weights: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """The ops of one job. The defaults are the torch twins."""

    rms_norm: Norm = ref.rms_norm
    add_rms_norm: AddNorm = ref.add_rms_norm
    rms_norm_quant: RmsNormQuant = ref.rms_norm_quant
    add_rms_norm_quant: AddRmsNormQuant = ref.add_rms_norm_quant
    rope_query: Callable[[T, T, T, T, int], None] = ref.rope_query
    absorb_query: Callable[[T, T, T, T, T, Any], T] = ref.absorb_query
    project_values: ProjectValues = ref.project_values
    norm_rope_write: NormRopeWrite = ref.norm_rope_write
    write_and_absorb: WriteAndAbsorb = ref.write_and_absorb
    silu_mul: SiluMul = ref.silu_mul
    prefill_attention: PrefillAttention = ref.prefill_attention
    mla_decode: MlaDecode = ref.mla_decode
    decode_plan: Callable[[T, int, int], Any] = ref.decode_plan  # from the library that serves mla_decode
    linear: Product = ref.linear
    linear_float32: ProductFloat32 = ref.linear_float32
    ffn_beside: Callable[[T, T, T], T] = ref.ffn_beside
    gate_topk: GateTopk = ref.gate_topk
    ep_scatter: EpScatter = ref.ep_scatter
    ep_scatter_masked: EpScatterMasked = ref.ep_scatter_masked
    ep_gather: EpGather = ref.ep_gather
    grouped_gemm_contiguous: GroupedProduct = ref.grouped_gemm_contiguous
    grouped_gemm_masked: IndexedProduct = ref.grouped_gemm_masked
    swiglu_masked: IndexedProduct = ref.swiglu_masked
    gemm_of_copies: IndexedProduct = ref.gemm_of_copies
    swiglu_of_copies: IndexedProduct = ref.swiglu_of_copies
    quantize_1x128: Callable[[T], Quantized] = ref.quantize_1x128
    silu_mul_quant: SiluMulQuant = ref.silu_mul_quant
    silu_mul_quant_masked: Callable[[T, T], Quantized] = ref.silu_mul_quant_masked
    gemm_fp8: Fp8Product = ref.gemm_fp8
    grouped_gemm_contiguous_fp8: Fp8GroupedProduct = ref.grouped_gemm_contiguous_fp8
    grouped_gemm_masked_fp8: Fp8MaskedProduct = ref.grouped_gemm_masked_fp8
    pack_pages: Callable[[T, T, T], None] = ref.pack_pages
    unpack_pages: Callable[[T, T, T], None] = ref.unpack_pages
    # Within `with leave_sms(n):`, products leave n SMs free. From the library that serves gemm_fp8.
    leave_sms: Callable[[int], AbstractContextManager] = nullcontext
    capturable: frozenset[str] = frozenset()  # the kinds of steps in `ref.WAITING` that a CUDA graph can capture
    whole_keys: bool = False  # prefill_attention copies each key into one piece
    alignment: int = 1  # the grouped GEMMs want each expert's group or room padded to this many rows
    by_rows: bool = False  # grouped_gemm_contiguous and its fp8 form choose their kernel by the number of rows
