"""The whole model.

Its layers with experts are a generator. `parallel/overlap.py` drives it: alone, or two halves of a batch in turns. The
dense layers before them have nothing to overlap. In a decode step, reading their weights takes the time, so they run
once, on the whole batch. Halves of prompts go through them one after the other, because that halves the memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.backend import Shape
from kernels.ops import Ops
from model.batch import Batch
from model.block import Block, Residual
from model.config import ModelConfig
from model.divisibility import check_split, fp8_misfit
from model.head import Head
from model.layers import Embedding, rope_table
from model.mtp import MTP, spread
from model.precision import dtype_name
from model.prompt_logprobs import PromptLogprobs
from parallel.chosen_experts import ChosenExperts, Part
from parallel.dispatchers import Dispatcher
from parallel.load_counter import LoadCounter
from parallel.mesh import Mesh
from parallel.overlap import Beside, Steps, run, run_two
from parallel.placement import Placement


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
        draft_placement: Placement | None = None,
    ) -> None:
        """Allocate this rank's share of the weights, uninitialised. `max_model_len` sizes the rope table.

        `fp8`: the projections stay in block fp8 (`model/precision.py` decides). Embeddings, norms, gates, kv_b_proj and
        the LM head never do. `draft_placement`: of the draft layer's experts; None: one for equal loads.
        Raises ValueError with the equation that does not hold.
        """
        super().__init__()
        check_split(config, mesh.attn.size)
        if fp8 and (obstacle := fp8_misfit(config, mesh.attn.size, dtype_name(dtype))):
            raise ValueError(f"fp8: {obstacle}")
        self.config, self.dtype, self.placement, self.ops, self.fp8 = config, dtype, placement, ops, fp8
        self.load_counter: LoadCounter | None = None
        self.heads = config.num_attention_heads // mesh.attn.size  # on this rank
        self.first = config.first_k_dense_replace  # the first layer with experts
        rope, beside = rope_table(config, max_model_len, mesh.device), Beside(mesh.device)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, mesh.device)
        self.layers = nn.ModuleList(
            Block(config, i - self.first if i >= self.first else None, mesh, placement, rope, ops, beside, dtype, fp8)
            for i in range(config.num_hidden_layers)
        )
        self.head = Head(config, mesh.attn, ops, dtype, mesh.device)
        self.mtp: MTP | None = None
        if config.drafts:
            of_drafts = draft_placement or spread(config.n_routed_experts, placement.num_slots, mesh)
            self.mtp = MTP(config, mesh, of_drafts, rope, ops, beside, dtype, fp8)

    def count_loads(self) -> None:
        """Count the tokens per expert from now on: those of the draft layer apart."""
        self.load_counter = LoadCounter(self.placement, self.config.n_routed_experts)
        if self.mtp is not None:
            self.mtp.load_counter = LoadCounter(self.mtp.placement, self.config.n_routed_experts)

    @property
    def load_counters(self) -> list[LoadCounter]:
        """The counter of the model's layers, and then that of the draft layer, as far as there are any."""
        both = self.load_counter, self.mtp.load_counter if self.mtp is not None else None
        return [counter for counter in both if counter is not None]

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
        """Run a step: return logits [N, V] of batch.logit_rows. The rest is as in `body`."""
        return self.head(self.body(batch, kv_pool, dispatcher, halves, chosen, scored), batch)

    @torch.inference_mode()
    def body(
        self,
        batch: Batch,
        kv_pool: Tensor,
        dispatcher: Dispatcher,
        halves: tuple[Batch, Batch] | None = None,
        chosen: ChosenExperts | None = None,
        scored: PromptLogprobs | None = None,
    ) -> Tensor:
        """Run all layers of a step: return [T, D], the input of the final norm.

        kv_pool [layers, pages, 64, C + R] is written in place.

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
        return out

    @torch.inference_mode()
    def draft(self, hidden: Tensor, batch: Batch, kv_pool: Tensor, dispatcher: Dispatcher) -> Tensor:
        """Run the multi-token-prediction layer: return [T, D] for `head.project`, and for its next application.

        Row i, at position p, takes `hidden` [T, D] of the token at p, after its final norm. batch.token_ids has the
        token at p + 1. The output predicts the token at p + 2. The layer's KV is the last of kv_pool's layers.
        """
        assert self.mtp is not None
        return self.mtp(hidden, self.planned(batch), self.embed_tokens, kv_pool[-1], dispatcher)

    @torch.inference_mode()
    def fill_draft(self, hidden: Tensor, batch: Batch, kv_pool: Tensor) -> None:
        """Write the KV that `draft` writes, and draft nothing. No communication: each rank may do it or not."""
        assert self.mtp is not None
        self.mtp.fill(hidden, batch, self.embed_tokens, kv_pool[-1])

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
        for layer, kv_pages in zip(self.layers[self.first :], kv_pool[self.first : len(self.layers)], strict=True):
            assert isinstance(layer, Block)
            yield from layer.steps(residual, batch, kv_pages, dispatcher, observers)
        return residual.sum(self.ops.ep_gather)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Inside, a step has at most two dense layers, two with experts, and the draft layer, if the model has one.

        It launches all kernels that a whole step does. Two of a kind, because the very first layer has another norm
        than the rest: there is no sum before it.
        """
        layers, first = self.layers, self.first
        self.layers, self.first = layers[: min(first, 2)].extend(layers[first : first + 2]), min(first, 2)
        try:
            yield
        finally:
            self.layers, self.first = layers, first

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with the `decode_plan` that its layers share."""
        return replace(batch, decode_plan=self.ops.decode_plan(batch.kv_lens, batch.q_len, self.heads))


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
