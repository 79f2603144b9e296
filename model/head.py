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

    def forward(self, x: Tensor, batch: Batch, out: Tensor | None = None) -> Tensor:
        """Return logits [N, V] float32 of x [T, D] at batch.logit_rows, equal on all ranks of mesh.attn.

        `out` [N or more, V] float32: they go to its first rows; None: to a new tensor.
        """
        return self.logits(x if batch.logit_rows is None else x[batch.logit_rows], out)

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits [N, V] float32 of rows [N, D], equal on all ranks of mesh.attn. Collective in the replica."""
        return self.project(self.norm(rows), out)

    def project(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """Do the same with rows [N, D] that a norm, this one or a draft's own, has had."""
        weight, out = self.lm_head.weight, out[: len(normed)] if out is not None else None
        if self.attn.size == 1:
            return self.linear_float32(normed, weight, out)
        mine = self.linear_float32(normed, weight)
        parts = self.attn.all_gather(mine).view(self.attn.size, *mine.shape)  # [t, N, V / t]
        return torch.cat(parts.unbind(), 1, out=out)
