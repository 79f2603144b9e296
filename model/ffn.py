"""SwiGLU: the dense layers' FFN (split over mesh.attn) and the shared expert (whole on every rank)."""

import torch
from torch import Tensor, nn

from kernels.fp8 import Quantized
from kernels.ops import Ops
from model.layers import FP8, Linear


class FFN(nn.Module):
    """down(silu(gate(x)) * up(x)). `width` is this rank's share, so with a split the result is a partial sum.

    `dtype` is the weights'. If it is fp8, the values between the two products are fp8 too. `beside`: other kernels may
    run at the same time.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device | str,
        beside: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * width, ops, dtype, device)  # gate's rows, then up's
        self.down_proj = Linear(width, hidden, ops, dtype, device)
        self.silu_mul = ops.silu_mul_quant if dtype == FP8 else ops.silu_mul
        self.ffn_beside = ops.ffn_beside if beside and dtype != FP8 else None

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x [T, D], bare or (fp8) quantised -> [T, D]."""
        if self.ffn_beside is not None:
            assert isinstance(x, Tensor)
            return self.ffn_beside(x, self.gate_up_proj.weight, self.down_proj.weight)
        return self.down_proj(self.silu_mul(self.gate_up_proj(x)))
