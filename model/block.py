"""One layer: attention, then a dense FFN or experts; and the residual stream that passes from layer to layer.

With attention TP t, a dense layer has the usual two all-reduces. An MoE layer scatters instead, so that each rank
dispatches 1/t of its replica's tokens:

    x [T, D] -- attention (partial) -- reduce_scatter --> [T/t, D] -- MoE --> [T/t, D] -- all_gather --> x [T, D]
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kernels.addends import Addends, Delta, summed
from kernels.ops import Ops
from model.batch import Batch
from model.config import ModelConfig
from model.ffn import FFN
from model.layers import FP8, RMSNorm
from model.mla import MLA
from model.moe import MoE
from parallel.chosen_experts import Part
from parallel.dispatchers import Dispatcher
from parallel.load_counter import LoadCounter
from parallel.mesh import Mesh
from parallel.overlap import Beside, Steps
from parallel.placement import Placement


class Residual:
    """The residual stream of some rows: x [T, D], and a `delta` that the next norm adds to it.

    It passes from layer to layer by `take` and `put`, so that no reference keeps a replaced tensor alive.
    """

    def __init__(self, x: Tensor, delta: Delta | None = None) -> None:
        self.held: tuple[Tensor, Delta | None] | None = (x, delta)

    def take(self) -> tuple[Tensor, Delta | None]:
        stream, self.held = self.held, None
        assert stream is not None, "another layer has taken it"
        return stream

    def put(self, x: Tensor, delta: Delta | None) -> None:
        self.held = (x, delta)

    def sum(self, ep_gather: Callable[..., Tensor]) -> Tensor:
        """Return x + delta. `ep_gather`: the op."""
        x, delta = self.take()
        if delta is None:
            return x
        delta = summed(delta, ep_gather)  # frees the addends
        return x + delta

    def cut(self, row: int) -> tuple["Residual", "Residual"]:
        """Split into the rows before `row`, and the others."""
        x, delta = self.take()
        assert not isinstance(delta, Addends), "steps are cut before the layers with experts"
        first = Residual(x[:row], None if delta is None else delta[:row])
        return first, Residual(x[row:], None if delta is None else delta[row:])


class Block(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        moe_layer: int | None,
        mesh: Mesh,
        placement: Placement,
        rope: tuple[Tensor, Tensor],
        ops: Ops,
        beside: Beside,
        dtype: torch.dtype,
        fp8: bool,
    ) -> None:
        """`moe_layer`: the layer's row in the placement map; None: a layer without experts."""
        super().__init__()
        self.attn, self.ops, device = mesh.attn, ops, mesh.device
        hidden, eps, on = config.hidden_size, config.rms_norm_eps, {"dtype": dtype, "device": device}
        self.input_layernorm = RMSNorm(hidden, eps, ops, **on, quantize=fp8)
        projection = FP8 if fp8 else dtype
        self.self_attn = MLA(config, mesh.attn.size, rope, ops, **on, fp8=fp8)
        self.is_moe = moe_layer is not None
        self.post_attention_layernorm = RMSNorm(hidden, eps, ops, **on, quantize=fp8, bare=self.is_moe)
        if moe_layer is not None:
            self.mlp = MoE(config, moe_layer, placement, ops, beside, dtype, projection, device)
        else:
            self.mlp = FFN(hidden, config.intermediate_size // mesh.attn.size, ops, projection, device)

    def dense(self, residual: Residual, batch: Batch, kv_pages: Tensor) -> None:
        """Run a layer without experts."""
        x, attended = self.attended(residual, batch, kv_pages)
        operand, x = self.post_attention_layernorm.add(x, self.attn.all_reduce(attended))[1:]
        del attended
        residual.put(x, self.attn.all_reduce(self.mlp(operand)))

    def attended(self, residual: Residual, batch: Batch, kv_pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return x, and the attention's output for it, not yet summed over mesh.attn."""
        operand, x = self.input_layernorm.add(*residual.take())[1:]
        q, kv = self.self_attn.project(operand, batch, kv_pages)
        del operand
        return x, self.self_attn.attend(q, kv, batch, kv_pages)

    def fill(self, x: Tensor, batch: Batch, kv_pages: Tensor) -> None:
        """Write the layer's KV for x [T, D], and nothing else. No communication."""
        self.self_attn.fill(self.input_layernorm.operand(x), batch, kv_pages)

    def steps(
        self,
        residual: Residual,
        batch: Batch,
        kv_pages: Tensor,
        dispatcher: Dispatcher,
        observers: Sequence[LoadCounter | Part],
    ) -> Steps[None]:
        """Run a layer with experts, as stages.

        It frees each tensor as soon as it can: while one micro-batch waits for its turn, the other needs the memory.
        """
        x, attended = self.attended(residual, batch, kv_pages)
        normed, operand, x = self.post_attention_layernorm.add(self.attn.scatter(x), self.attn.reduce_scatter(attended))
        del attended
        assert isinstance(self.mlp, MoE) and normed is not None  # the norm is `bare`
        experts = self.mlp.steps(normed, operand, self.attn.scatter(batch.is_token), dispatcher, observers)
        del normed, operand
        delta = yield from experts
        if self.attn.size > 1:
            x, delta = self.attn.all_gather(x + summed(delta, self.ops.ep_gather)), None
        residual.put(x, delta)
        del x, delta
        yield "return"
