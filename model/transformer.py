"""The whole model.

Its layers with experts are a generator. `parallel/overlap.py` drives it: alone, or two halves of a batch in turns. The
dense layers before them have nothing to overlap. In a decode step, reading their weights takes the time, so they run
once, on the whole batch. Halves of prompts go through them one after the other, because that halves the memory.

With attention TP t, a dense layer has the usual two all-reduces. An MoE layer scatters instead, so that each rank
dispatches 1/t of its replica's tokens:

    x [T, D] -- attention (partial) -- reduce_scatter --> [T/t, D] -- MoE --> [T/t, D] -- all_gather --> x [T, D]
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.backend import Shape
from kernels.ops import Ops
from model.batch import Batch
from model.config import ModelConfig
from model.divisibility import check_split, fp8_misfit
from model.ffn import FFN
from model.head import Head
from model.layers import FP8, Embedding, RMSNorm, rope_table
from model.mla import MLA
from model.moe import MoE
from model.precision import dtype_name
from model.prompt_logprobs import PromptLogprobs
from parallel.chosen_experts import ChosenExperts, Part
from parallel.dispatchers import Dispatcher
from parallel.load_counter import LoadCounter
from parallel.mesh import Mesh
from parallel.overlap import Beside, Steps, run, run_two
from parallel.placement import Placement


class Residual:
    """The residual stream of some rows: x [T, D], and a `delta` that the next norm adds to it.

    It passes from layer to layer by `take` and `put`, so that no reference keeps a replaced tensor alive.
    """

    def __init__(self, x: Tensor, delta: Tensor | None = None) -> None:
        self.held: tuple[Tensor, Tensor | None] | None = (x, delta)

    def take(self) -> tuple[Tensor, Tensor | None]:
        stream, self.held = self.held, None
        assert stream is not None, "another layer has taken it"
        return stream

    def put(self, x: Tensor, delta: Tensor | None) -> None:
        self.held = (x, delta)

    def sum(self) -> Tensor:
        x, delta = self.take()
        return x if delta is None else x + delta

    def cut(self, row: int) -> tuple["Residual", "Residual"]:
        """Split into the rows before `row`, and the others."""
        x, delta = self.take()
        first = Residual(x[:row], None if delta is None else delta[:row])
        return first, Residual(x[row:], None if delta is None else delta[row:])


class Block(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        mesh: Mesh,
        placement: Placement,
        rope: tuple[Tensor, Tensor],
        ops: Ops,
        beside: Beside,
        dtype: torch.dtype,
        fp8: bool,
    ) -> None:
        super().__init__()
        self.attn, device = mesh.attn, mesh.device
        hidden, eps, on = config.hidden_size, config.rms_norm_eps, {"dtype": dtype, "device": device}
        self.input_layernorm = RMSNorm(hidden, eps, ops, **on, quantize=fp8)
        projection = FP8 if fp8 else dtype
        self.self_attn = MLA(config, mesh.attn.size, rope, ops, **on, fp8=fp8)
        self.is_moe = layer >= config.first_k_dense_replace
        self.post_attention_layernorm = RMSNorm(hidden, eps, ops, **on, quantize=fp8, bare=self.is_moe)
        if self.is_moe:
            moe_layer = layer - config.first_k_dense_replace
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
        q = self.self_attn.project(operand, batch, kv_pages)
        del operand
        return x, self.self_attn.attend(q, batch, kv_pages)

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
            x, delta = self.attn.all_gather(x + delta), None
        residual.put(x, delta)
        del x, delta
        yield "return"


class Transformer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        placement: Placement,
        ops: Ops,
        dtype: torch.dtype,
        max_model_len: int,
        fp8: bool = False,
    ) -> None:
        """Allocate this rank's share of the weights, uninitialised. `max_model_len` sizes the rope table.

        `fp8`: the projections stay in block fp8 (`model/precision.py` decides). Embeddings, norms, gates, kv_b_proj and
        the LM head never do. Raises ValueError with the equation that does not hold.
        """
        super().__init__()
        check_split(config, mesh.attn.size)
        if fp8 and (obstacle := fp8_misfit(config, mesh.attn.size, dtype_name(dtype))):
            raise ValueError(f"fp8: {obstacle}")
        self.config, self.dtype, self.placement, self.ops, self.fp8 = config, dtype, placement, ops, fp8
        self.load_counter: LoadCounter | None = None
        self.first = config.first_k_dense_replace  # the first layer with experts
        rope, beside = rope_table(config, max_model_len, mesh.device), Beside(mesh.device)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, mesh.device)
        self.layers = nn.ModuleList(
            Block(config, i, mesh, placement, rope, ops, beside, dtype, fp8) for i in range(config.num_hidden_layers)
        )
        self.head = Head(config, mesh.attn, ops, dtype, mesh.device)

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        kv_pool: Tensor,
        dispatcher: Dispatcher,
        halves: tuple[Batch, Batch] | None = None,
        chosen: ChosenExperts | None = None,
        scored: PromptLogprobs | None = None,
    ) -> Tensor:
        """Run a step: return logits [N, V] of batch.logit_rows. kv_pool [layers, pages, 64, C + R] is written in place.

        `halves`: the batch's first and last rows, which overlap in all layers with experts. Meanwhile the products
        leave the dispatcher's SMs free. `chosen`: where to record the experts that the gates choose. `scored`: the
        prompt tokens whose log probabilities are wanted, and where to put them.
        """
        batch = self.planned(batch)
        part = chosen.part if chosen is not None else lambda: None
        residual = Residual(self.embed_tokens(batch.token_ids))
        if halves is None or not batch.max_q:
            self.dense_layers([(residual, batch)], kv_pool)
        if halves is None:
            out = run(self.moe_steps(residual, batch, kv_pool, dispatcher, part()))
        else:
            parts = list(zip(residual.cut(halves[0].num_tokens), map(self.planned, halves), strict=True))
            if batch.max_q:
                self.dense_layers(parts, kv_pool)
            with self.ops.leave_sms(dispatcher.num_sms):
                out = torch.cat(run_two(*(self.moe_steps(*half, kv_pool, dispatcher, part()) for half in parts)))
        if scored is not None:
            scored.compute(out, self.head.logits)
        return self.head(out, batch)

    def dense_layers(self, parts: list[tuple[Residual, Batch]], kv_pool: Tensor) -> None:
        """Run the layers without experts, in each layer one part after the other."""
        for layer, kv_pages in zip(self.layers[: self.first], kv_pool, strict=False):
            assert isinstance(layer, Block)
            for residual, batch in parts:
                layer.dense(residual, batch, kv_pages)

    def moe_steps(
        self, residual: Residual, batch: Batch, kv_pool: Tensor, dispatcher: Dispatcher, chosen: Part | None = None
    ) -> Steps[Tensor]:
        """Run all layers with experts, one after the other -> [T, D]."""
        observers = [observer for observer in (self.load_counter, chosen) if observer is not None]
        for layer, kv_pages in zip(self.layers[self.first :], kv_pool[self.first :], strict=True):
            assert isinstance(layer, Block)
            yield from layer.steps(residual, batch, kv_pages, dispatcher, observers)
        return residual.sum()

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with the `decode_plan` that its layers share."""
        return replace(batch, decode_plan=self.ops.decode_plan(batch.kv_lens))


def op_shape(config: ModelConfig) -> Shape:
    """Return the sizes that decide which kernels can serve this model."""
    return Shape(
        kv_lora_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        qk_head_dim=config.qk_head_dim,
        v_head_dim=config.v_head_dim,
        hidden=config.hidden_size,
        expert_width=config.moe_intermediate_size,
    )
