"""The final norm of the rows whose logits are wanted, and the LM head, split over mesh.attn."""

import torch
from torch import Tensor, nn

from kernels.ops import Ops
from model.batch import Batch
from model.config import ModelConfig
from model.layers import Linear, RMSNorm
from parallel.mesh import Group


class Head(nn.Module):
    def __init__(
        self, config: ModelConfig, attn: Group, ops: Ops, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.attn, self.linear_float32 = attn, ops.linear_float32
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, dtype, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size // attn.size, ops, dtype, device)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return logits [N, V] float32 of x [T, D] at batch.logit_rows, equal on all ranks of mesh.attn."""
        return self.logits(x if batch.logit_rows is None else x[batch.logit_rows])

    def logits(self, rows: Tensor) -> Tensor:
        """Return logits [N, V] float32 of rows [N, D], equal on all ranks of mesh.attn. Collective in the replica."""
        return self.project(self.norm(rows))

    def project(self, normed: Tensor) -> Tensor:
        """Do the same with rows [N, D] that a norm, this one or a draft's own, has had."""
        logits = self.linear_float32(normed, self.lm_head.weight)
        if self.attn.size == 1:
            return logits
        parts = self.attn.all_gather(logits).view(self.attn.size, *logits.shape)  # [t, N, V / t]
        return parts.transpose(0, 1).flatten(1)
