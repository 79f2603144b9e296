"""The multi-token-prediction layer (DeepSeek-V3, section 2.2), with which the model drafts its own next tokens.

At position p it joins the main model's output h for the token at p, after the final norm, with the token at p + 1:

    embedding (t[p + 1]) -- enorm --+
                                    +-- eh_proj -- one Block, with experts -- norm --> h' --> LM head: t[p + 2]
    h[p] ------------------- hnorm --+

Applied again at p + 1, to h' and the token that it predicted, it predicts the token at p + 3. Its attention has KV of
its own, at position p for h[p]. Embedding and LM head are the main model's (README_WEIGHTS.md of DeepSeek-V3). A
checkpoint holds copies of them, which are not read. eh_proj keeps the activations' dtype even with fp8 weights.

Its experts have a placement map and a load counter of their own, in as many slots as those of the other layers.
"""

import torch
from torch import Tensor, nn

from kernels.ops import Ops
from model.batch import Batch
from model.block import Block, Residual
from model.config import ModelConfig
from model.layers import Embedding, Linear, RMSNorm
from parallel.dispatchers import Dispatcher
from parallel.load_counter import LoadCounter
from parallel.mesh import Mesh
from parallel.overlap import Beside, run
from parallel.placement import Placement


class MTP(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        placement: Placement,
        rope: tuple[Tensor, Tensor],
        ops: Ops,
        beside: Beside,
        dtype: torch.dtype,
        fp8: bool,
    ) -> None:
        """`placement`: of this layer's experts, a map of one layer."""
        super().__init__()
        hidden, on = config.hidden_size, {"dtype": dtype, "device": mesh.device}
        self.enorm, self.hnorm, self.norm = (RMSNorm(hidden, config.rms_norm_eps, ops, **on) for _ in range(3))
        self.eh_proj = Linear(2 * hidden, hidden, ops, **on)
        self.placement = placement
        self.load_counter: LoadCounter | None = None
        self.block = Block(config, 0, mesh, placement, rope, ops, beside, dtype, fp8)

    def forward(
        self, hidden: Tensor, batch: Batch, embed: Embedding, kv_pages: Tensor, dispatcher: Dispatcher
    ) -> Tensor:
        """Run the layer: hidden [T, D] and the tokens after it, batch.token_ids [T] -> h' [T, D].

        kv_pages [pages, 64, C + R] is written in place. Collective: the layer has experts.
        """
        residual = Residual(self._joined(hidden, batch, embed))
        observers = (self.load_counter,) if self.load_counter is not None else ()
        run(self.block.steps(residual, batch, kv_pages, dispatcher, observers))
        normed = self.norm.add(*residual.take())[0]
        assert normed is not None  # the norm does not quantise
        return normed

    def fill(self, hidden: Tensor, batch: Batch, embed: Embedding, kv_pages: Tensor) -> None:
        """Write the KV that `forward` writes, and draft nothing: without attention, experts and communication."""
        self.block.fill(self._joined(hidden, batch, embed), batch, kv_pages)

    def _joined(self, hidden: Tensor, batch: Batch, embed: Embedding) -> Tensor:
        """Return the block's input [T, D]."""
        return self.eh_proj(torch.cat((self.enorm(embed(batch.token_ids)), self.hnorm(hidden)), -1))


def spread(num_experts: int, num_slots: int, mesh: Mesh) -> Placement:
    """Return a placement of one layer: expert e in slot e, and further copies of the first experts after the last."""
    expert_of_slot = torch.arange(num_slots).remainder(num_experts)[None]
    return Placement.of_map(expert_of_slot, num_experts, mesh.ep.size, mesh.ep.rank, mesh.ranks_per_node, mesh.device)
