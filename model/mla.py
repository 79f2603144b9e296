"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1), in its two equal forms.

The cache holds c [C] (the normed latent) and k_rope [R] for each token. Per head, with W_UK, W_UV from kv_b_proj:

    expanded (prefill):  k = [W_UK c, k_rope], v = W_UV c             many queries share the expansion of c
    absorbed (decode):   q' = [W_UK^T q_nope, q_rope] attends the cache rows themselves; out = W_UV (attended c)

Heads are split over mesh.attn; o_proj's output is this rank's PARTIAL sum, which the block reduces. With fp8 weights
kv_b_proj still is of the activations' dtype: it is a part of the attention itself, in both forms.
"""

import torch
from torch import Tensor, nn

from kernels.backend import Ops, Quantized
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
    ):
        super().__init__()
        self.config, self.ops, self.rope = config, ops, rope
        self.heads = config.num_attention_heads // attn_tp  # on this rank
        self.scale = softmax_scale(config)
        hidden, on = config.hidden_size, {"dtype": dtype, "device": device}
        projection = {"ops": ops, "dtype": FP8 if fp8 else dtype, "device": device}
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, self.heads * config.qk_head_dim, **projection)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, **projection)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6, ops, **on)
            self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim, **projection)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_dim, **projection)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6, ops, **on)
        kv_b = self.heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, kv_b, ops, **on)
        self.o_proj = Linear(self.heads * config.v_head_dim, hidden, **projection)

    def forward(self, x: Tensor, batch: Batch, kv_pages: Tensor) -> Tensor:
        """x [T, D], kv_pages [pages, 64, C + R] (written in place) -> [T, D], to be summed over mesh.attn."""
        cos, sin = (table[batch.positions] for table in self.rope)
        x = self.kv_a_proj_with_mqa.operand(x)  # once: the queries start from the same
        q_nope, q_rope = self.queries(x, cos, sin)
        self.write_kv(x, cos, sin, batch.kv_rows, kv_pages)
        split = batch.num_decodes
        out = torch.cat(
            (
                self.absorbed(q_nope[:split], q_rope[:split], batch, kv_pages),
                self.expanded(q_nope[split:], q_rope[split:], batch, kv_pages),
            )
        )
        return self.o_proj(out.flatten(1))

    def queries(self, x: Tensor | Quantized, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(-1, self.heads, config.qk_head_dim).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), -1
        )
        return q_nope, self.ops.rope(q_rope, cos, sin)  # [T, H, nope], [T, H, R]

    def write_kv(self, x: Tensor | Quantized, cos: Tensor, sin: Tensor, rows: Tensor, kv_pages: Tensor) -> None:
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        kv = torch.cat((self.kv_a_layernorm(latent), self.ops.rope(k_rope, cos, sin)), -1)
        kv_pages.view(-1, kv.shape[-1])[rows] = kv  # padding rows all land in the null page

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, nope, C], W_UV [H, v, C]."""
        config = self.config
        return self.kv_b_proj.weight.view(self.heads, -1, config.kv_lora_rank).split(
            (config.qk_nope_head_dim, config.v_head_dim), 1
        )

    def expanded(self, q_nope: Tensor, q_rope: Tensor, batch: Batch, kv_pages: Tensor) -> Tensor:
        config = self.config
        if q_nope.shape[0] == 0:
            return q_nope.new_empty(0, self.heads, config.v_head_dim)
        context = kv_pages.view(-1, config.kv_dim)[batch.context_rows]
        latent, k_rope = context.split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_nope, v = (
            self.kv_b_proj(latent)
            .view(-1, self.heads, config.qk_nope_head_dim + config.v_head_dim)
            .split((config.qk_nope_head_dim, config.v_head_dim), -1)
        )
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, self.heads, -1)), -1)  # [sum kv, H, nope + R]
        q = torch.cat((q_nope, q_rope), -1)
        return self.ops.prefill_attention(
            q, k, v, batch.q_starts, batch.kv_starts, batch.max_q, batch.max_kv, self.scale
        )

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, batch: Batch, kv_pages: Tensor) -> Tensor:
        if q_nope.shape[0] == 0:
            return q_nope.new_empty(0, self.heads, self.config.v_head_dim)
        w_uk, w_uv = self.up_projections()
        q = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_rope), -1)  # [B, H, C + R]
        attended = self.ops.mla_decode(
            q, kv_pages, batch.page_table, batch.kv_lens, self.scale, v_dim=self.config.kv_lora_rank
        )
        return torch.einsum("thc,hvc->thv", attended, w_uv)
