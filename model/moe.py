"""The mixture-of-experts layer: gate, dispatch, experts, combine (DeepSeek-V3, section 2.1.2).

`MoE.steps` is a generator that yields after each stage of `parallel/overlap.py`, where another micro-batch may run:

    gate  yield  dispatch>, shared expert  yield  >arrival  yield  experts  yield  combine>  yield  >return

Combine, or the next norm, adds the shared expert's output. With few tokens, neither the shared expert nor the gate and
the moves around dispatch fill the GPU. Then the shared expert runs beside them, on a second stream.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from kernels.addends import Delta
from kernels.fp8 import Quantized
from kernels.ops import Ops
from kernels.rooms import FEW_ROWS
from model.config import ModelConfig
from model.ffn import FFN
from model.layers import FP8, block_scales, weight
from parallel.chosen_experts import Part
from parallel.dispatch import Arrived, Contiguous, Copies, Masked, Sliced
from parallel.dispatchers import Dispatcher
from parallel.load_counter import LoadCounter
from parallel.overlap import Beside, Steps
from parallel.placement import Placement

FEW = 512  # the shared expert runs on the second stream up to this many tokens


class Gate(nn.Module):
    """Scores every expert for every token, in float32 as DeepSeek does. Its weights have the activations' dtype.

    `noaux_tc` (DeepSeek-V3): sigmoid scores, and a bias that takes part in the choice alone. The weights are
    normalised if `norm_topk_prob` says so, and then scaled.

    `greedy`, `group_limited_greedy` (DeepSeek-V2, section 2.2, and its published code): softmax scores, no bias. With
    `norm_topk_prob` the weights are normalised INSTEAD of scaled; a token's only expert is always scaled. No published
    V2 sets `norm_topk_prob`, and transformers ignores it there.
    """

    def __init__(self, config: ModelConfig, ops: Ops, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.weight = weight(config.n_routed_experts, config.hidden_size, dtype=dtype, device=device)
        self.e_score_correction_bias = None
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = weight(config.n_routed_experts, dtype=torch.float32, device=device)
        self.softmax = config.scoring_func == "softmax"
        self.group_best = 2 if config.topk_method == "noaux_tc" else 1
        self.normalize = config.norm_topk_prob and (config.num_experts_per_tok > 1 or not self.softmax)
        self.scale = 1.0 if self.softmax and self.normalize else config.routed_scaling_factor

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [T, E] float32 of x [T, D]."""
        return self.ops.linear_float32(x, self.weight)

    def forward(self, logits: Tensor, slot_of_expert: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of each token's experts [T, K] int64, -1 for padding, and weights [T, K] float32."""
        config = self.config
        return self.ops.gate_topk(
            logits,
            self.e_score_correction_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            self.normalize,
            self.scale,
            slot_of_expert,
            is_token,
            softmax=self.softmax,
            group_best=self.group_best,
        )


class Experts(nn.Module):
    """The experts in this rank's slots, stacked: gate_up_proj [L, 2I, D], down_proj [L, D, I] of `dtype`.

    In fp8, each has scales, `*_scale_inv` [L, ceil(rows / 128), ceil(columns / 128)], and x must be in fp8 too.
    """

    def __init__(
        self, config: ModelConfig, num_local: int, ops: Ops, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = weight(num_local, 2 * width, hidden, dtype=dtype, device=device)
        self.gate_up_proj_scale_inv = block_scales(self.gate_up_proj)
        self.down_proj = weight(num_local, hidden, width, dtype=dtype, device=device)
        self.down_proj_scale_inv = block_scales(self.down_proj)
        self.ops = ops

    def forward(self, group: Callable[[], Arrived]) -> tuple[Tensor, tuple]:
        """Run the experts. `group()` builds the layout. Returns their outputs, and `way_back`, which combine needs.

        The layout decides the GEMM and the outputs. Contiguous, Masked: rows in the layout of `arrived.x`. Copies: one
        row per copy [T * K, D]. Sliced: the weighted sums [N, D], one per token. Rows are freed as soon as the next
        ones exist.
        """
        ops = self.ops
        gate_up, gate_up_scale = self.gate_up_proj, self.gate_up_proj_scale_inv
        down, down_scale = self.down_proj, self.down_proj_scale_inv
        match group():
            case Sliced() as arrived:
                return self._sums(arrived), arrived.way_back
            case Copies(x, slots, way_back):
                return ops.gemm_of_copies(ops.swiglu_of_copies(x, gate_up, slots), down, slots), way_back
            case Contiguous(x, groups, way_back, None):
                x = ops.grouped_gemm_contiguous(x, gate_up, groups)
                x = ops.silu_mul(x, groups)
                return ops.grouped_gemm_contiguous(x, down, groups), way_back
            case Contiguous(x, groups, way_back, scale):
                assert scale is not None and gate_up_scale is not None and down_scale is not None
                x = ops.grouped_gemm_contiguous_fp8(x, scale, gate_up, gate_up_scale, groups)
                x, scale = ops.silu_mul_quant(x, groups)
                return ops.grouped_gemm_contiguous_fp8(x, scale, down, down_scale, groups), way_back
            case Masked(x, counts, way_back, None):
                x = ops.swiglu_masked(x, gate_up, counts)
                return ops.grouped_gemm_masked(x, down, counts), way_back
            case Masked(x, counts, way_back, scale):
                assert scale is not None and gate_up_scale is not None and down_scale is not None
                x = ops.grouped_gemm_masked_fp8(x, scale, gate_up, gate_up_scale, counts)
                x, scale = ops.silu_mul_quant_masked(x, counts)
                return ops.grouped_gemm_masked_fp8(x, scale, down, down_scale, counts), way_back

    def _sums(self, arrived: Sliced) -> Tensor:
        """Return the weighted sums [N, D], slice by slice. A slice's rows are freed before the next slice's exist."""
        out = None
        for at in range(0, len(arrived.x), arrived.size):
            part = self.ops.ep_gather(*self._slice(arrived, at))
            out = part.new_empty(len(arrived.x), part.shape[1]) if out is None else out
            out[at : at + arrived.size] = part
            del part
        assert out is not None  # there is at least one slice
        return out

    def _slice(self, arrived: Sliced, at: int) -> tuple[Tensor, ...]:
        y, way_back = self(partial(arrived.part, at, self.ops, len(self.gate_up_proj)))
        return y, *way_back


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
    ) -> None:
        """`layer`: the number among MoE layers, from 0, which is its row in the placement map. `dtype`: activations."""
        super().__init__()
        self.layer, self.placement, self.beside = layer, placement, beside
        self.gate = Gate(config, ops, dtype, device)
        self.experts = Experts(config, placement.slots_per_rank, ops, expert_dtype, device)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = FFN(config.hidden_size, width, ops, expert_dtype, device, beside=True)
        # Up to so many tokens the shared expert comes before the gate. With more, or in fp8, its kernels take whole
        # SMs, and the gate would wait for them.
        self.shared_first_up_to = 0 if expert_dtype == FP8 else FEW_ROWS

    def steps(
        self,
        x: Tensor,
        operand: Tensor | Quantized,
        is_token: Tensor,
        dispatcher: Dispatcher,
        observers: Iterable[LoadCounter | Part] = (),
    ) -> Steps[Delta]:
        """Run the layer's stages: x [T, D] -> [T, D], as a tensor or `Addends`. `operand` is x as the experts take it.

        Rows where `is_token` is False are padding and visit no routed expert. `observers` see the chosen slots.
        """
        few, shared = x.shape[0] <= FEW, None
        if x.shape[0] <= self.shared_first_up_to:
            shared = self.beside.start(partial(self.shared, operand))
        logits = self.gate.logits(x)
        if few and shared is None:
            shared = self.beside.start(partial(self.shared, operand))
        slots, weights = self.gate(logits, self.placement.slot_of_expert[self.layer], is_token)
        for observer in observers:
            observer.add(self.layer, slots)
        yield "attention"
        pending = dispatcher.dispatch(x if dispatcher.casts else operand, slots, weights)
        plus = None if few else self.shared(operand)
        del x, logits, slots, weights
        yield "dispatch"
        group = pending.receive()
        del pending
        yield "arrival"
        y, way_back = self.experts(group)
        yield "experts"
        pending = dispatcher.combine(y, way_back, plus if shared is None else shared())
        del operand, group, y, way_back, shared, plus  # operand lives until here: the second stream reads it
        yield "combine"
        return pending.wait()

    def shared(self, operand: Tensor | Quantized) -> Tensor | None:
        return self.shared_experts(operand) if self.shared_experts is not None else None
