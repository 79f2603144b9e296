"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1), in its two equal forms.

The cache holds c [C] (the normed latent) and k_rope [R] per token. Per head, with W_UK, W_UV from kv_b_proj:

    expanded (prefill):  k = [W_UK c, k_rope], v = W_UV c             many queries share the expansion of c
    absorbed (decode):   q' = [W_UK^T q_nope, q_rope] attends the cache rows themselves; out = W_UV (attended c)

Heads are split over mesh.attn. o_proj's output is this rank's PARTIAL sum, which the block reduces. kv_b_proj keeps the
activations' dtype even with fp8 weights, because it is a part of the attention itself, in both forms. The norms of the
latents have epsilon 1e-6 whatever `rms_norm_eps` is, as in DeepSeek's code and in transformers.
"""

import torch
from torch import Tensor, nn

from kernels.fp8 import Quantized, unquantized
from kernels.ops import Ops
from model.batch import Batch
from model.config import ModelConfig
from model.layers import FP8, Linear, RMSNorm, softmax_scale


class MLA(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        attn_tp: int,
        rope: tuple[Tensor, Tensor],
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device | str,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.ops, self.rope = config, ops, rope
        self.heads = config.num_attention_heads // attn_tp  # on this rank
        self.scale = softmax_scale(config)
        hidden, on = config.hidden_size, {"dtype": dtype, "device": device}
        projection = {"ops": ops, "dtype": FP8 if fp8 else dtype, "device": device}
        all_heads = self.heads * config.qk_head_dim
        # The rows of q_proj or q_a_proj, then those of kv_a_proj_with_mqa: one product, because they share their input.
        self.split = (config.q_lora_rank or all_heads, config.kv_dim)
        self.qkv_a_proj = Linear(hidden, sum(self.split), **projection)
        if config.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6, ops, **on, quantize=fp8)
            self.q_b_proj = Linear(config.q_lora_rank, all_heads, **projection)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6, ops, **on)
        kv_b = self.heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, kv_b, ops, **on)
        self.o_proj = Linear(self.heads * config.v_head_dim, hidden, **projection)

    def forward(self, x: Tensor | Quantized, batch: Batch, kv_pages: Tensor) -> Tensor:
        """Do attention: x [T, D] -> [T, D], to be summed over mesh.attn. kv_pages is written in place."""
        return self.attend(*self.project(x, batch, kv_pages), batch, kv_pages)

    def project(self, x: Tensor | Quantized, batch: Batch, kv_pages: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project x [T, D]: return q [T, H, nope + R], not yet rotated, and KV [T, C + R] if `attend` must write it.

        Otherwise KV is written to kv_pages [pages, 64, C + R] here, and the second result is None. `attend` writes that
        of decodes, beside the query's absorption. With a q_lora all is written here, beside the norm of q_a_proj.
        """
        q, kv = self.qkv_a_proj(x).split(self.split, -1)
        if self.config.q_lora_rank is None and batch.decode_tokens == batch.num_tokens:
            return self.queries(q), kv
        self.write_kv(kv, batch, kv_pages)
        return self.queries(q), None

    def fill(self, x: Tensor | Quantized, batch: Batch, kv_pages: Tensor) -> None:
        """Write to kv_pages what `project` writes, and attend nothing. The product is whole, so it is the same."""
        self.write_kv(self.qkv_a_proj(x).split(self.split, -1)[1], batch, kv_pages)

    def attend(self, q: Tensor, kv: Tensor | None, batch: Batch, kv_pages: Tensor) -> Tensor:
        """Attend with `project`'s results -> [T, D], to be summed over mesh.attn. q may be rotated in place."""
        split, quantize = batch.decode_tokens, self.o_proj.weight_scale_inv is not None
        if split == 0:
            out = self.expanded(q, batch, kv_pages, quantize)
        elif split == batch.num_tokens:
            out = self.absorbed(q, kv, batch, kv_pages, quantize)
        else:
            out = torch.cat(
                (
                    unquantized(self.absorbed(q[:split], None, batch, kv_pages)),
                    unquantized(self.expanded(q[split:], batch, kv_pages)),
                )
            )
        return self.o_proj(out)

    def queries(self, q: Tensor) -> Tensor:
        """Return q [T, H, nope + R] from qkv_a_proj's columns [T, q_lora or H (nope + R)]."""
        if self.config.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm.operand(q))
        return q.view(-1, self.heads, self.config.qk_head_dim)

    def write_kv(self, kv: Tensor, batch: Batch, kv_pages: Tensor) -> None:
        """Write kv [T, C + R] to the cache. Padding rows all go to the null page."""
        norm = self.kv_a_layernorm
        self.ops.norm_rope_write(kv, norm.weight, norm.eps, *self.rope, batch.positions, batch.kv_rows, kv_pages)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Return views W_UK [H, nope, C], W_UV [H, v, C] of kv_b_proj."""
        config = self.config
        per_head = self.kv_b_proj.weight.view(self.heads, -1, config.kv_lora_rank)
        w_uk, w_uv = per_head.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        return w_uk, w_uv

    def expanded(self, q: Tensor, batch: Batch, kv_pages: Tensor, quantize: bool = False) -> Tensor | Quantized:
        """Attend prompts: q [sum q, H, nope + R], rotated in place -> [sum q, H v].

        `quantize`: return it quantised, as an fp8 o_proj takes it.
        """
        config = self.config
        if q.shape[0] == 0:
            return q.new_empty(0, self.heads * config.v_head_dim)
        self.ops.rope_query(q, *self.rope, batch.positions[batch.decode_tokens :], config.qk_rope_head_dim)
        context = kv_pages.view(-1, config.kv_dim)[batch.context_rows]
        latent, k_rope = context.split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_nope, v = (
            self.kv_b_proj(latent)
            .view(-1, self.heads, config.qk_nope_head_dim + config.v_head_dim)
            .split((config.qk_nope_head_dim, config.v_head_dim), -1)
        )
        out = self.ops.prefill_attention(
            q, k_nope, k_rope, v, batch.q_starts, batch.kv_starts, batch.max_q, batch.max_kv, self.scale, quantize
        )
        return out if quantize else unquantized(out).flatten(1)

    def absorbed(
        self, q: Tensor, kv: Tensor | None, batch: Batch, kv_pages: Tensor, quantize: bool = False
    ) -> Tensor | Quantized:
        """Attend decodes: q [B Q, H, nope + R] -> [B Q, H v]. `kv`: to be written. `quantize`: as in `expanded`."""
        ops, plan, (w_uk, w_uv) = self.ops, batch.decode_plan, self.up_projections()
        if kv is None:
            absorbed = ops.absorb_query(q, w_uk, *self.rope, batch.positions[: batch.decode_tokens], plan)
        else:
            norm, to = self.kv_a_layernorm, (batch.positions, batch.kv_rows, kv_pages)
            absorbed = ops.write_and_absorb(q, w_uk, kv, norm.weight, norm.eps, *self.rope, *to, plan)
        attended = ops.mla_decode(
            absorbed,
            kv_pages,
            batch.page_table,
            batch.kv_lens,
            self.scale,
            v_dim=self.config.kv_lora_rank,
            plan=plan,
        )
        out = ops.project_values(attended, w_uv, quantize)
        return out if quantize else unquantized(out).flatten(1)
