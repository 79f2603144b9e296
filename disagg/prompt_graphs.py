"""Steps with few prompt tokens, and no decoding sequence, as CUDA graphs: all layers, without the head.

Without graphs such a step takes as long as the host needs to launch its kernels. Its shapes vary, so it is padded to
one of a few sizes (`buckets.py`), each captured once:

    host     the batch, made as for any step with prompts
    device   its tensors --copy--> fixed inputs, and padding behind them
    graph    embedding, layers -> hidden [tokens, D], in one buffer for all sizes
    host     final norm, LM head, choice of tokens, draft layer: as for any step, with the rows that are no padding

The padding is a sequence of its own. Its tokens stand in the null page, and see as many rows of it. So they are finite
whatever was in memory before, and they visit no routed expert. Rows of context behind all sequences belong to none.

Any other step runs eagerly: one of more tokens, context or sequences, one that decodes or overlaps, or that records
experts or log probabilities of prompts.
"""

from functools import partial

import torch
from torch import Tensor

from disagg.buckets import PromptSize
from disagg.graphs import Graphs
from disagg.step import Work
from model.batch import Batch
from model.pages import NULL_PAGE, PAGE
from model.prompt_logprobs import PromptLogprobs
from model.transformer import Transformer
from parallel.chosen_experts import ChosenExperts
from parallel.dispatchers import Dispatcher

SEQUENCES = 16  # of a captured step, padding included: attention starts programs for all of them


class PromptGraphs:
    """The layers of a rank's model, captured for steps of some sizes."""

    def __init__(
        self,
        model: Transformer,
        pool: Tensor,
        dispatcher: Dispatcher,
        graphs: Graphs,
        sizes: tuple[PromptSize, ...],
    ) -> None:
        """`dispatcher`: of steps with prompts; it must not wait for the host. `sizes`: ascending; none: no captures."""
        self.model, self.pool, self.dispatcher, self.graphs, self.sizes = model, pool, dispatcher, graphs, sizes
        tokens, context = (max(of_sizes) for of_sizes in zip((0, 0), *sizes, strict=True))
        device = pool.device
        self.columns = torch.zeros(3, tokens, dtype=torch.int64, device=device)  # ids, positions, rows of the pool
        self.context_rows = torch.zeros(context, dtype=torch.int64, device=device)
        self.starts = torch.zeros(2, SEQUENCES + 1, dtype=torch.int32, device=device)  # of queries, of keys
        self.hidden = torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype, device=device)

    @torch.inference_mode()
    def body(
        self,
        batch: Batch,
        dispatcher: Dispatcher,
        halves: tuple[Batch, Batch] | None = None,
        chosen: ChosenExperts | None = None,
        scored: PromptLogprobs | None = None,
    ) -> Tensor:
        """Do `Transformer.body`, in a graph if one fits. What it returns is overwritten by the next step."""
        plain = halves is None and chosen is None and scored is None and dispatcher is self.dispatcher
        size = self.size_of(batch) if plain else None
        if size is None:
            return self.model.body(batch, self.pool, dispatcher, halves, chosen, scored)
        self.stage(batch, size)
        self.run(size)
        return self.hidden[: batch.num_tokens]

    def size_of(self, batch: Batch) -> PromptSize | None:
        """Return the size at which a batch runs in a graph, or None. The host knows all that decides it."""
        if batch.num_decodes:
            return None
        return self.fitting(batch.num_tokens, batch.context_rows.numel(), batch.q_starts.numel() - 1)

    def serves(self, work: Work) -> bool:
        """Will the layers of a step run in a graph?"""
        if work.overlapped or len(work.decodes.pages) or work.plan.returns_experts:
            return False
        lengths = [len(chunk.token_ids) for chunk in work.prompts]
        context = sum(lengths) + sum(chunk.start for chunk in work.prompts)
        scored = any(chunk.targets for chunk in work.prompts)
        return not scored and self.fitting(sum(lengths), context, len(lengths)) is not None

    def fitting(self, tokens: int, context: int, sequences: int) -> PromptSize | None:
        """Return the captured size for so many tokens, which see `context` tokens together, of so many sequences."""
        for size in self.sizes if tokens else ():
            padding = size.tokens - tokens
            if padding >= 0 and context + padding <= size.context:
                fits = sequences + (padding > 0) <= SEQUENCES and key(size) in self.graphs.captured
                return size if fits else None
        return None

    def stage(self, batch: Batch, size: PromptSize) -> None:
        """Copy a batch to the fixed inputs, on the device, and pad it to `size`."""
        tokens, context, ends = batch.num_tokens, batch.context_rows.numel(), batch.q_starts.numel()
        padding, null_row = size.tokens - tokens, NULL_PAGE * PAGE
        for fixed, column, fill in zip(
            self.columns, (batch.token_ids, batch.positions, batch.kv_rows), (0, 0, null_row), strict=True
        ):
            fixed[:tokens] = column
            fixed[tokens : size.tokens] = fill
        self.context_rows[:context] = batch.context_rows
        self.context_rows[context : size.context] = null_row
        for fixed, starts, count in zip(self.starts, (batch.q_starts, batch.kv_starts), (tokens, context), strict=True):
            fixed[:ends] = starts
            fixed[ends:] = count + padding

    def run(self, size: PromptSize) -> None:
        """Run the layers over the fixed inputs."""
        self.graphs.part(key(size), partial(self._layers, size))

    def _layers(self, size: PromptSize) -> None:
        ids, positions, kv_rows = self.columns[:, : size.tokens]
        q_starts, kv_starts = self.starts
        batch = Batch(
            token_ids=ids,
            positions=positions,
            kv_rows=kv_rows,
            page_table=q_starts[:0, None],
            kv_lens=q_starts[:0],
            q_starts=q_starts,
            kv_starts=kv_starts,
            context_rows=self.context_rows[: size.context],
            logit_rows=None,
            max_q=size.tokens,
            max_kv=size.context,
        )
        self.hidden[: size.tokens] = self.model.body(batch, self.pool, self.dispatcher)

    @torch.inference_mode()
    def run_padding(self, size: PromptSize) -> None:
        """Run the layers of a step of padding alone."""
        self.stage(Batch.build([], [], self.pool.device), size)
        self.run(size)


def key(size: PromptSize) -> tuple[str, PromptSize]:
    return "prompts", size
