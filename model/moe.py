"""The mixture-of-experts layer: gate, dispatch, experts, combine (DeepSeek-V3, section 2.1.2).

`MoE.steps` is a generator that yields after each stage of `parallel/overlap.py`, where another micro-batch may run:

    gate   yield   dispatch>   shared expert   yield   >dispatch, experts, combine>   yield   >combine

The shared expert's part goes into combine, which adds it. With few tokens the shared expert does not fill the GPU, and
neither do the gate and the moves around dispatch: then it runs beside them, on a second stream.
"""

from functools import partial

import torch
from torch import Tensor, nn

from kernels.backend import Ops, Quantized
from model.config import ModelConfig
from model.ffn import FFN
from model.layers import block_scales, weight
from parallel.dispatch import Contiguous, Copies, Masked, Sliced
from parallel.dispatchers import Dispatcher
from parallel.overlap import Beside, Steps
from parallel.placement import Placement
from parallel.recorder import Recorder

FEW = 512  # tokens, up to which the shared expert runs on the second stream


class Gate(nn.Module):
    """Scores every expert for every token, in float32 as DeepSeek does; its weights are of the activations' dtype."""

    def __init__(self, config: ModelConfig, ops: Ops, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.config, self.ops = config, ops
        self.weight = weight(config.n_routed_experts, config.hidden_size, dtype=dtype, device=device)
        self.e_score_correction_bias = weight(config.n_routed_experts, dtype=torch.float32, device=device)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E] float32."""
        return self.ops.linear_float32(x, self.weight)

    def forward(self, logits: Tensor, slot_of_expert: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of each token's experts [T, K] int64, -1 for padding, and weights [T, K] float32."""
        config = self.config
        return self.ops.gate_topk(
            logits,
            self.e_score_correction_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            slot_of_expert,
            is_token,
        )


class Experts(nn.Module):
    """The experts in this rank's slots, stacked: gate_up_proj [L, 2I, D], down_proj [L, D, I] of `dtype`.

    In fp8 each has its scales beside it, `*_scale_inv` [L, ceil(rows / 128), ceil(columns / 128)], and x comes in fp8.
    """

    def __init__(self, config: ModelConfig, num_local: int, ops: Ops, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = weight(num_local, 2 * width, hidden, dtype=dtype, device=device)
        self.gate_up_proj_scale_inv = block_scales(self.gate_up_proj)
        self.down_proj = weight(num_local, hidden, width, dtype=dtype, device=device)
        self.down_proj_scale_inv = block_scales(self.down_proj)
        self.ops = ops

    def forward(self, arrived: Contiguous | Masked | Copies | Sliced) -> Tensor:
        """The layout decides the GEMM. Contiguous, Masked: rows in the layout of `arrived.x`; Copies: a row for each
        copy [T * K, D]; Sliced: the weighted sum for each token [N, D]."""
        ops = self.ops
        gate_up, gate_up_scale = self.gate_up_proj, self.gate_up_proj_scale_inv
        down, down_scale = self.down_proj, self.down_proj_scale_inv
        match arrived:
            case Sliced(x, size=size):
                out = None
                for at in range(0, len(x), size):
                    part = self._part(arrived, at)
                    out = part.new_empty(len(x), part.shape[1]) if out is None else out
                    out[at : at + size] = part
                    del part
                return out
            case Copies(x, slots):
                return ops.gemm_of_copies(ops.swiglu_of_copies(x, gate_up, slots), down, slots)
            case Contiguous(x, row_expert, scale=None):
                hidden = ops.silu_mul(ops.grouped_gemm_contiguous(x, gate_up, row_expert), row_expert)
                return ops.grouped_gemm_contiguous(hidden, down, row_expert)
            case Contiguous(x, row_expert, scale=scale):
                hidden, scale = ops.silu_mul_quant(
                    ops.grouped_gemm_contiguous_fp8(x, scale, gate_up, gate_up_scale, row_expert), row_expert
                )
                return ops.grouped_gemm_contiguous_fp8(hidden, scale, down, down_scale, row_expert)
            case Masked(x, counts, scale=None):
                hidden = ops.silu_mul_masked(ops.grouped_gemm_masked(x, gate_up, counts), counts)
                return ops.grouped_gemm_masked(hidden, down, counts)
            case Masked(x, counts, scale=scale):
                hidden, scale = ops.silu_mul_quant_masked(
                    ops.grouped_gemm_masked_fp8(x, scale, gate_up, gate_up_scale, counts), counts
                )
                return ops.grouped_gemm_masked_fp8(hidden, scale, down, down_scale, counts)

    def _part(self, arrived: Sliced, at: int) -> Tensor:
        """Sums of one slice's tokens. Its rows are gone when this returns."""
        part = arrived.part(at, self.ops, len(self.gate_up_proj))
        return self.ops.ep_gather(self(part), *part.way_back)


class MoE(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        placement: Placement,
        ops: Ops,
        beside: Beside,
        dtype: torch.dtype,
        expert_dtype: torch.dtype,
        device: torch.device | str,
    ):
        """`layer` counts MoE layers from 0: the row of the placement map. `dtype` is the activations'."""
        super().__init__()
        self.layer, self.placement, self.beside = layer, placement, beside
        self.gate = Gate(config, ops, dtype, device)
        self.experts = Experts(config, placement.slots_per_rank, ops, expert_dtype, device)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = FFN(config.hidden_size, width, ops, expert_dtype, device)

    def steps(
        self,
        x: Tensor,
        operand: Tensor | Quantized,
        is_token: Tensor,
        dispatcher: Dispatcher,
        recorder: Recorder | None = None,
    ) -> Steps[Tensor]:
        """x [T, D], also as the experts take it -> [T, D]. Rows where `is_token` is False are padding and visit no
        routed expert."""
        few = x.shape[0] <= FEW
        logits = self.gate.logits(x)
        shared = self.beside.start(partial(self.shared, operand)) if few else None
        slots, weights = self.gate(logits, self.placement.slot_of_expert[self.layer], is_token)
        if recorder is not None:
            recorder.add(self.layer, slots)
        yield "attention"
        pending = dispatcher.dispatch(x if dispatcher.casts else operand, slots, weights)
        plus = None if few else self.shared(operand)
        del x, logits, slots, weights
        yield "dispatch"
        arrived = pending.wait()
        y = self.experts(arrived)
        pending = dispatcher.combine(y, arrived, shared() if few else plus)
        del operand, arrived, y, shared, plus  # the operand only now: a second stream may have read it until here
        yield "experts"
        return pending.wait()

    def shared(self, operand: Tensor | Quantized) -> Tensor | None:
        return self.shared_experts(operand) if self.shared_experts is not None else None
