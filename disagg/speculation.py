"""Speculation: the model drafts its own next tokens with its multi-token-prediction layer, and verifies them together.

A step of B decoding sequences with N drafts each, here N = 2. x is a sequence's latest token, at position p. Its drafts
d are for p + 1 and p + 2:

    x d d    target    B (N + 1) rows -> y y y, its own tokens for p + 1 .. p + 3; the first k equal the drafts
    y y y    draft     the same rows, each with the token after it: the layer's KV, and from row k the next first draft
    d        draft     one row per sequence, N - 1 times: the other drafts

So a step gives k + 1 tokens to a sequence. Every rank runs N drafts behind each target, whether it is idle or not. The
KV of wrong drafts lies behind the sequence's end, where the next step writes. Chunks of prompts go through the draft
layer too. Tokens behind a request's last page write to the null page: a step may go too far, as it always may.

The device alone knows the front of a sequence: x, its drafts and p, by its row in the latest step. The host says
-1 - row for x and for p. A sequence that was handed over brings its own front: the prefill job made the drafts.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.sampler import process, sampling_rows
from disagg.step import Work
from model.batch import Batch, Chunk, Decodes, page_rows, to_device, to_host
from model.prompt_logprobs import PromptLogprobs
from model.sampling import COLDEST, NO_TOKEN, accepted, likeliest, sample, top_logprobs
from model.transformer import Transformer
from parallel.chosen_experts import ChosenExperts
from parallel.dispatchers import Dispatchers
from parallel.mesh import Group


class Outcome(NamedTuple):
    """What a step gives to its S sequences, decodes first. On the host once the step is done."""

    tokens: Tensor  # [S, N + 1] int64; of a prompt that ends here, its first token and the drafts after it
    counts: Tensor  # [S] int64: so many of them are new
    logprobs: tuple[Tensor, Tensor] | None  # ids and values [S, N + 1, K + 1], if a request asks


class Speculation:
    """Runs the steps of one rank, and keeps the fronts of the sequences in the latest one."""

    def __init__(
        self,
        model: Transformer,
        pool: Tensor,
        dispatchers: Dispatchers,
        attn: Group,
        drafts: int,
        rows: int,
        width: int,
    ) -> None:
        """`drafts`: N. `rows`: the most sequences of a step. `width`: the most pages of one, and those behind it."""
        self.model, self.pool, self.dispatchers, self.attn = model, pool, dispatchers, attn
        self.drafts, self.width, self.device = drafts, width, pool.device
        self.tokens = torch.zeros(rows, drafts + 1, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def run(self, work: Work, chosen: ChosenExperts | None = None, scored: PromptLogprobs | None = None) -> Outcome:
        """Run a step: verify, draft, and keep the fronts. `chosen`, `scored`: as in `Transformer.body`."""
        model, count, each = self.model, len(work.decodes.pages), self.drafts + 1
        rows = count if work.decode_rows is None else work.decode_rows  # of decodes, padding included
        dispatcher = self.dispatchers.contiguous if work.mixed else self.dispatchers.masked
        table = self._page_table(work, rows)
        tokens, start = self._fronts(work.decodes, rows)
        places = start[:, None] + torch.arange(each, device=self.device)
        batch = Batch.decode(tokens.flatten(), places.flatten(), table[:rows])
        if work.mixed:
            batch = Batch.join(batch, Batch.build([], self._padded(work.prompts, rows * each), self.device))

        hidden = model.head.norm(model.body(batch, self.pool, dispatcher, None, chosen, scored))
        logits = model.head.project(hidden if batch.logit_rows is None else hidden[batch.logit_rows])
        lengths = to_device(np.array([s.computed for s in work.sequences[count:]], np.int64), self.device)
        after = torch.cat((places[:count].flatten() + 1, lengths))
        choice, logprobs = self._choose(logits, work, tokens, after)
        del logits
        own, first = choice[: rows * each].view(rows, each), choice[rows * each :]
        right = accepted(tokens[:, 1:], own)

        following = own.flatten() if not work.mixed else torch.cat((own.flatten(), self._following(work, batch, first)))
        state = model.draft(hidden, replace(batch, token_ids=following.clamp(min=0)), self.pool, dispatcher)
        del hidden
        ends = torch.arange(rows, device=self.device) * each + right
        if batch.logit_rows is not None:
            ends = torch.cat((ends, batch.logit_rows[rows * each :]))
        state = F.pad(state[ends], (0, 0, 0, len(table) - len(ends)))
        front = torch.cat((own.gather(1, right[:, None])[:, 0], first)).clamp(min=0)
        position = torch.cat((start + right + 1, lengths))
        size, fronts = len(front), [front]
        at = F.pad(position, (0, len(table) - size))
        for i in range(self.drafts):
            if i > 0:
                ids = F.pad(fronts[-1], (0, len(table) - size))
                state = model.draft(state, Batch.decode(ids, at + i - 1, table), self.pool, dispatcher)
            fronts.append(self._draft(model.head.project(state[:size]), work, position + i + 1))
        self.tokens[:size], self.positions[:size] = torch.stack(fronts, 1), position
        return Outcome(
            to_host(torch.cat((own[:count], torch.stack((first, *(f[rows:] for f in fronts[1:])), 1)))),
            to_host(torch.cat((right[:count] + 1, torch.ones_like(first)))),
            logprobs,
        )

    def _fronts(self, decodes: Decodes, rows: int) -> tuple[Tensor, Tensor]:
        """Return each sequence's latest token and drafts [rows, N + 1], and that token's position [rows]."""
        known = np.zeros((len(decodes.pages), self.drafts + 2), np.int64)
        known[:, 0], known[:, 1] = decodes.positions, decodes.ids
        for row, drafts in zip(known, decodes.drafts, strict=False):
            row[2 : 2 + len(drafts)] = drafts
        columns = to_device(known, self.device)
        positions, ids, front = columns[:, 0], columns[:, 1], columns[:, 1:]
        place = (-1 - ids).clamp(min=0)
        tokens = self.tokens[place].where(ids[:, None] < 0, front)
        start = self.positions[place].where(positions < 0, positions)
        more = rows - len(ids)
        return F.pad(tokens, (0, 0, 0, more)), F.pad(start, (0, more))

    def _page_table(self, work: Work, rows: int) -> Tensor:
        """Return the pages [.., width] of the decodes, padded to `rows`, and of the prompts that end here.

        In a step with prompts, empty rows follow until they divide over the replica's ranks.
        """
        pages = [*work.decodes.pages, *[()] * (rows - len(work.decodes.pages))]
        pages += [chunk.pages for chunk in work.prompts if chunk.wants_logits]
        pages += [()] * (-len(pages) % self.attn.size)
        return to_device(page_rows(pages, self.width).astype(np.int32), self.device)

    def _padded(self, prompts: list[Chunk], decode_tokens: int) -> list[Chunk]:
        """Put a chunk of padding before the prompts, so that the step's tokens divide over the replica's ranks."""
        missing = -(decode_tokens + sum(len(c.token_ids) for c in prompts)) % self.attn.size
        return [Chunk((0,) * missing, 0, (), wants_logits=False), *prompts] if missing else prompts

    def _following(self, work: Work, batch: Batch, first: Tensor) -> Tensor:
        """Return the token after each of the step's prompt tokens, padding included. `first`: those after prompts."""
        ids, ended = [], 0
        for (sequence, count), chunk in zip(work.plan.prefills, work.prompts, strict=True):
            ids += chunk.token_ids[1:]
            if chunk.wants_logits:
                ended += 1
                ids.append(-ended)
            else:
                ids.append(sequence.request.prompt[chunk.start + count])
        padding = batch.num_tokens - batch.decode_tokens - len(ids)
        known = to_device(np.array([0] * padding + ids, np.int64), self.device)
        return first[(-1 - known).clamp(min=0)].where(known < 0, known) if ended else known

    def _choose(
        self, logits: Tensor, work: Work, tokens: Tensor, after: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the model's own token for each row of logits [R, V], as without drafts, and log probabilities.

        tokens [.., N + 1]: what was verified. `after`: the position behind each row that belongs to a sequence.
        """
        choice, plan, count, each = likeliest(logits), work.plan, len(work.decodes.pages), self.drafts + 1
        if plan.is_plain:
            return choice, None
        sequences = [*(s for s in plan.decodes for _ in range(each)), *work.sequences[count:]]
        real = torch.arange(len(choice), device=self.device)[: len(after)]
        if work.mixed:
            assert len(choice) == len(after)
        rows, greedy = logits[real], choice[real]
        if plan.processes_logits:
            seen = [len(s.tokens) for s in plan.decodes for _ in range(each)]
            ends = [n + i % each for i, n in enumerate(seen)] + [s.computed for s in work.sequences[count:]]
            owner, column = before_each(count, each)
            process(rows, sequences, tokens[to_device(owner // each, self.device), to_device(column, self.device)],
                    owner, ends)  # fmt: skip
        warm = any(s.request.temperature > COLDEST for s in sequences)
        if warm or plan.processes_logits:
            parameters = replace(sampling_rows(sequences, self.device), position=after)
            mine = sample(rows, parameters) if warm else rows.argmax(-1)
            choice[real] = self.attn.broadcast(mine.masked_fill(greedy == NO_TOKEN, NO_TOKEN))
        most = max((s.request.logprobs for s in sequences), default=0)
        if not most:
            return choice, None
        ids, values = top_logprobs(logits[real], choice[real].clamp(min=0), most)
        return choice, (self._by_sequence(ids, count), self._by_sequence(values, count))

    def _by_sequence(self, rows: Tensor, count: int) -> Tensor:
        """Return rows [R, K] of `count` decodes, N + 1 each, and of prompts as [S, N + 1, K] on the host."""
        each = self.drafts + 1
        decodes = rows[: count * each].view(count, each, rows.shape[1])
        prompts = rows[count * each :, None].expand(-1, each, -1)
        return to_host(torch.cat((decodes, prompts)))

    def _draft(self, logits: Tensor, work: Work, positions: Tensor) -> Tensor:
        """Return a draft [S] for each row of logits [S, V], with the noise that the model will choose with."""
        drafts, sequences = likeliest(logits).clamp(min=0), work.sequences
        if any(s.request.temperature > COLDEST for s in sequences):
            real = slice(len(sequences))
            parameters = replace(sampling_rows(sequences, self.device), position=positions[real])
            drafts[real] = self.attn.broadcast(sample(logits[real], parameters))
        return drafts


def before_each(count: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the drafts before each row of `count` sequences of `each` rows, as pairs (row, place among its tokens).

    Row 0 follows on the latest token alone, row 2 on the drafts in the places 1 and 2.
    """
    place = np.concatenate([np.arange(1, i + 1) for i in range(each)])
    row = np.repeat(np.arange(each), np.arange(each))
    rows = (np.arange(count)[:, None] * each + row).ravel()
    return rows, np.tile(place, count)
