"""Which library serves which op: decided once, handed to the model's constructors, printed once per job."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from kernels import ref


@dataclass(frozen=True)
class Ops:
    """Every op the model calls. The contract of each is its twin's docstring in `kernels/ref.py`."""

    rms_norm: Callable = ref.rms_norm
    rope: Callable = ref.rope
    silu_mul: Callable = ref.silu_mul
    prefill_attention: Callable = ref.prefill_attention
    mla_decode: Callable = ref.mla_decode
    gate_topk: Callable = ref.gate_topk
    ep_scatter: Callable = ref.ep_scatter
    ep_scatter_masked: Callable = ref.ep_scatter_masked
    ep_gather: Callable = ref.ep_gather
    grouped_gemm_contiguous: Callable = ref.grouped_gemm_contiguous
    grouped_gemm_masked: Callable = ref.grouped_gemm_masked
    alignment: int = 1  # rows: what grouped_gemm_contiguous wants each expert's group padded to

    def table(self) -> str:
        """One line an op: its name and the module that serves it."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return "\n".join(f"  {name:24} {op.__module__}" for name, op in chosen.items() if callable(op))
