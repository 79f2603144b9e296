"""Speculation: the model drafts its own next tokens with its multi-token-prediction layer, and verifies them together.

A step of B decoding sequences with N drafts each, here N = 2. x is a sequence's latest token, at position p. Its drafts
d are for p + 1 and p + 2:

    x d d    target    B (N + 1) rows -> y y y, its own tokens for p + 1 .. p + 3; the first k equal the drafts
    y y y    fill      the same rows, each with the token after it: the draft layer's KV, and nothing else
    y        draft     one row per sequence, its latest one: the first of the next drafts
    d        draft     N - 1 times: the others

So a step gives k + 1 tokens to a sequence. Every rank runs as many drafts behind each target, whether it is idle or
not. A step may verify fewer drafts than N, and make fewer, down to none. It fills in any case, chunks of prompts too:
so drafts can be made after any step. (On a CPU, steps without drafts fill together: `late_fill.py`.) The KV of wrong
drafts lies behind the sequence's end, where the next step writes. Tokens behind a request's last page write to the null
page: a step may go too far, as it always may.
Where a step overlaps, the target runs as two halves of whole sequences, and the draft layer runs whole.

A step has four parts. The host lays its inputs out (`speculation_inputs.py`). The device verifies, fills, and drafts;
behind the first, and behind each draft, the host chooses for requests that are not plainly greedy
(`speculative_sampler.py`). Then what the step gave is copied to the host. In a step without prompts on a GPU, the
device's parts are CUDA graphs: one up to the logits, one that fills, and one up to each draft. So all ranks replay the
same ones, whatever a request of one rank asks for. Only the first two depend on how many drafts were verified.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.fixed_inputs import FixedInputs
from disagg.graphs import Graphs
from disagg.late_fill import LateFill, Left, leaves
from disagg.speculation_inputs import Half, Inputs, SpeculationInputs
from disagg.speculative_sampler import SpeculativeSampler
from disagg.step import Work
from model.batch import Batch
from model.prompt_logprobs import PromptLogprobs
from model.sampling import accepted, likeliest
from model.transformer import Transformer
from parallel.chosen_experts import ChosenExperts
from parallel.dispatchers import Dispatcher, Dispatchers
from parallel.mesh import Group


class Outcome(NamedTuple):
    """What a step gives, by row, on the host once the step is done. Read it before the second step after this one."""

    tokens: Tensor  # [rows, N + 1] int64; of a prompt that ends here, its first token and the drafts after it
    counts: Tensor  # [rows] int64: so many of them are new
    logprobs: tuple[Tensor, Tensor] | None  # ids and values [S, verified + 1, K + 1], if a request asks


class Verified(NamedTuple):
    """What the target's forward leaves to the rest of the step. R rows of decodes, T tokens, P prompts that end."""

    batch: Batch
    fed: Tensor  # [R, v + 1] int64: each sequence's latest token, and the v drafts that were verified
    start: Tensor  # [R] int64: that token's position
    hidden: Tensor  # [T, D], after the final norm
    choice: Tensor  # [R (v + 1) + P] int64: the model's own tokens, which the sampler may replace in place
    after: Tensor  # [R (v + 1) + P] int64: their positions


class Speculation:
    """Runs the steps of one rank, and keeps the fronts of the sequences in the latest one."""

    def __init__(
        self,
        model: Transformer,
        pool: Tensor,
        dispatchers: Dispatchers,
        attn: Group,
        inputs: FixedInputs,
        logits: Tensor,
        graphs: Graphs,
        body: Callable[..., Tensor],
    ) -> None:
        """`inputs`: with a column per draft behind ids and positions. Its pages reach behind those of a sequence.

        `logits` [rows (N + 1), V] float32: where each part puts its own, over those of the part before. `body`:
        `PromptGraphs.body`, the target's layers.
        """
        self.model, self.pool, self.dispatchers, self.device = model, pool, dispatchers, pool.device
        self.logits, self.graphs, self.body = logits, graphs, body
        self.inputs, self.sampler = SpeculationInputs(inputs, attn.size), SpeculativeSampler(attn)
        columns, rows = inputs.columns.shape
        kind = {"dtype": torch.int64, "device": self.device}
        # The fronts: each sequence's latest token and drafts, by its row in the latest step, and the token's position.
        self.tokens, self.positions = torch.zeros(rows, columns - 1, **kind), torch.zeros(rows, **kind)
        width = model.config.hidden_size
        self._hidden = torch.zeros(rows, width, dtype=model.dtype, device=self.device)  # what the next draft follows
        # What a step gives: its number of new tokens, and the tokens. Two host copies, used in turn: one is read when
        # the next step may have been launched, but not the one after.
        self._given = torch.zeros(rows, columns, **kind)
        on_gpu = self.device.type == "cuda"
        self.late = None if on_gpu else LateFill(model, pool, self.tokens, self.positions)
        self._seen = [torch.zeros(rows, columns, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]

    @torch.inference_mode()
    def run(self, work: Work, chosen: ChosenExperts | None = None, scored: PromptLogprobs | None = None) -> Outcome:
        """Run a step: verify, draft, and keep the fronts. `chosen`, `scored`: as in `Transformer.body`."""
        assert work.drafts is not None
        verifies, makes = work.drafts
        going_on = self.late.goes_on(work) if self.late is not None else None
        inputs, front = going_on or (self.inputs.lay_out(work), None)
        dispatcher = self.dispatchers.contiguous if work.mixed else self.dispatchers.masked
        eager, rows = work.mixed or work.eager, inputs.rows
        assert eager or chosen is None, "a graph records no experts"
        verify = partial(self._verify, inputs, verifies, front, dispatcher, chosen, scored)
        verified, logits = self.graphs.part(("verify", rows, verifies), verify, eager)
        logprobs = self.sampler.choose(logits, verified.choice, work, verified.fed, verified.after)
        if self.late is not None and leaves(work):
            self.late.add(inputs, Left(verified.hidden, verified.choice, verified.start, verified.after))
            return Outcome(verified.choice[:, None], torch.ones(rows, dtype=torch.int64), logprobs)
        self.graphs.part(("accept", rows, verifies), partial(self._accept, inputs, verified), eager)
        del verified
        for place in range(1, makes + 1):
            draft = partial(self._draft, inputs, place, dispatcher)
            logits, drafts = self.graphs.part(("draft", rows, place), draft, eager)
            self.sampler.draft(logits, drafts, work, self.positions, place)
        return self._report(inputs, makes, logprobs)

    def settle(self) -> None:
        """Write all that steps have put off. Call it before a sequence lets go of its pages."""
        if self.late is not None:
            self.late.fill()

    def _verify(
        self,
        inputs: Inputs,
        verifies: int,
        front: tuple[Tensor, Tensor] | None,
        dispatcher: Dispatcher,
        chosen: ChosenExperts | None,
        scored: PromptLogprobs | None,
    ) -> tuple[Verified, Tensor]:
        """Run the target over each sequence's latest token and first drafts, `verifies` of them, and over the prompts.

        `front`: as `_fronts` returns, if it is known. Returns also its logits [R (v + 1) + P, V].
        """
        fed, start = front or self._fronts(inputs, verifies)
        places, head = start[:, None] + torch.arange(verifies + 1, device=self.device), self.model.head
        batch, halves = batches(inputs, fed, places)
        hidden = head.norm(self.body(batch, dispatcher, halves, chosen, scored))
        logits = head.project(hidden if batch.logit_rows is None else hidden[batch.logit_rows], self.logits)
        after = places.flatten() + 1
        if inputs.prompts is not None:
            after = torch.cat((after, inputs.prompts.lengths))
        return Verified(batch, fed, start, hidden, likeliest(logits), after), logits

    def _fronts(self, inputs: Inputs, verifies: int) -> tuple[Tensor, Tensor]:
        """Return each sequence's latest token and first drafts [R, v + 1], and that token's position [R]."""
        row, known = (-1 - inputs.ids).clamp(min=0), inputs.ids >= 0
        brought = torch.cat((inputs.ids[:, None], inputs.drafts[:verifies].T), 1)
        fed = torch.where(known[:, None], brought, self.tokens[row, : verifies + 1])
        return fed, torch.where(known, inputs.positions, self.positions[row])

    def _accept(self, inputs: Inputs, verified: Verified) -> None:
        """Write what the step gives, and the fronts without their drafts. Fill, so that drafts can follow."""
        (rows, each), size = verified.fed.shape, inputs.fronts
        own, first = verified.choice[: rows * each].view(rows, each), verified.choice[rows * each :]
        right = accepted(verified.fed[:, 1:], own)
        self._given[:rows, 0], self._given[:rows, 1 : each + 1] = right + 1, own
        self._given[rows:size, 0], self._given[rows:size, 1] = 1, first
        self.tokens[:rows, 0] = own.gather(1, right[:, None])[:, 0].clamp(min=0)
        self.tokens[rows:size, 0] = first.clamp(min=0)
        self.positions[:rows] = verified.start + right + 1
        following, latest = own.flatten(), torch.arange(rows, device=self.device) * each + right
        if inputs.prompts is not None and verified.batch.logit_rows is not None:
            self.positions[rows:size] = inputs.prompts.lengths
            after = inputs.prompts.following
            if len(first):
                after = first[(-1 - after).clamp(min=0)].where(after < 0, after)
            following = torch.cat((following, after))
            latest = torch.cat((latest, verified.batch.logit_rows[rows * each :]))
        batch = replace(verified.batch, token_ids=following.clamp(min=0))
        self.model.fill_draft(verified.hidden, batch, self.pool)
        self._hidden[:size], self._hidden[size : len(inputs.page_table)] = verified.hidden[latest], 0

    def _draft(self, inputs: Inputs, place: int, dispatcher: Dispatcher) -> tuple[Tensor, Tensor]:
        """Run the draft layer over each sequence's token before the one at `place`, 1 to N, and draft that one.

        Returns its logits [S, V], and the likeliest drafts [S], for the sampler to replace in place in the fronts.
        """
        size, rows = inputs.fronts, len(inputs.page_table)
        padding = (0, rows - size)
        ids, at = F.pad(self.tokens[:size, place - 1], padding), F.pad(self.positions[:size] - 1, padding)
        batch = Batch.decode(ids, at + place - 1, inputs.page_table)
        self._hidden[:rows] = self.model.draft(self._hidden[:rows], batch, self.pool, dispatcher)
        logits, drafts = self.model.head.project(self._hidden[:size], self.logits), self.tokens[:size, place]
        drafts[:] = likeliest(logits).clamp(min=0)
        return logits, drafts

    def _report(self, inputs: Inputs, makes: int, logprobs: tuple[Tensor, Tensor] | None) -> Outcome:
        """Copy what the step gives to the host."""
        rows, size = inputs.rows, inputs.fronts
        self._given[rows:size, 2 : makes + 2] = self.tokens[rows:size, 1 : makes + 1]
        seen = self._seen[0][:size].copy_(self._given[:size], non_blocking=True)
        self._seen.reverse()
        return Outcome(seen[:, 1:], seen[:, 0], logprobs)


def batches(inputs: Inputs, fed: Tensor, places: Tensor) -> tuple[Batch, tuple[Batch, Batch] | None]:
    """Return the target's batch, and its halves if the step overlaps.

    fed, places [R, v + 1]: the tokens of the decoding sequences, and their positions.
    """

    def batch(half: Half) -> Batch:
        table = inputs.page_table[: inputs.rows]
        decodes = Batch.decode(fed[half.rows].flatten(), places[half.rows].flatten(), table[half.rows])
        return decodes if half.prompts is None else Batch.join(decodes, half.prompts)

    whole = batch(Half(slice(None), None if inputs.prompts is None else inputs.prompts.batch))
    return whole, None if inputs.halves is None else (batch(inputs.halves[0]), batch(inputs.halves[1]))
