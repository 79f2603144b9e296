"""Drafts change no token and no distribution: the model's own sampling, with the noise of the seed and the position."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from disagg.front.tokenizer import load_tokenizer
from disagg.request import Request
from disagg.sampler import process, sampling_rows
from disagg.scheduler import Plan, Sequence
from disagg.speculative_sampler import SpeculativeSampler
from disagg.step import Drafts, Work
from disagg.steps import places
from model.batch import Batch, Chunk, Decodes
from model.kv_cache import make_pool
from model.sampling import SamplingRows, accepted, keep_top, sample, top_logprobs
from parallel.mesh import Group
from tests import hf
from tests.test_mtp import draft_rows

REQUESTS, LENGTH = 4000, 3  # tokens of each request that are looked at
SEEDS = range(20)


def rows_of(seeds: Tensor, positions: Tensor, top_k: int) -> SamplingRows:
    """Sampling at temperature 1, for seeds and positions of the same shape."""
    count = seeds.numel()
    warm, all_of_it = torch.ones(count), torch.ones(count)
    return SamplingRows(warm, all_of_it, torch.full((count,), top_k), seeds.flatten(), positions.flatten())


def speculate(target: Tensor, draft: Tensor, first: int, seeds: Tensor, drafts: int, top_k: int = 0) -> Tensor:
    """Return the first LENGTH tokens of each request, [requests, LENGTH], and how many drafts were right on average.

    target, draft [V, V]: logits of the token after each token. `first`: the token that all requests begin with.
    """
    count, said = len(seeds), torch.full((len(seeds), LENGTH), -1)
    current, positions = torch.full((count,), first), torch.zeros(count, dtype=torch.int64)
    while (said < 0).any():
        tokens = [current]
        for i in range(drafts):
            tokens.append(sample(draft[tokens[-1]], rows_of(seeds, positions + i, top_k)))
        places = positions[:, None] + torch.arange(drafts + 1)
        logits = target[torch.stack(tokens, 1)].flatten(0, 1)
        chosen = sample(logits, rows_of(seeds[:, None].expand_as(places), places, top_k)).view_as(places)
        right = accepted(torch.stack(tokens[1:], 1), chosen)
        new = (torch.arange(drafts + 1) <= right[:, None]) & (places < LENGTH)
        said[new.nonzero()[:, 0], places[new]] = chosen[new]
        current, positions = chosen.gather(1, right[:, None])[:, 0], positions + right + 1
    return said


def exact(target: Tensor, first: int, top_k: int) -> Tensor:
    """The probability of each LENGTH tokens, [V, V, V]."""
    size = len(target)
    limits = torch.full((size,), top_k), torch.ones(size)
    each = keep_top(target, *limits).double().softmax(-1)
    return each[first][:, None, None] * each[:, :, None] * each[None]


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-squared test. Outcomes that are expected less than 10 times count as one."""
    often = expected >= 10
    counts, expected = (torch.cat((x[often], x[~often].sum()[None])).double() for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def fits(target: Tensor, draft: Tensor, first: int, drafts: int, top_k: int, seed: int) -> float:
    size = len(target)
    said = speculate(target, draft, first, seed * REQUESTS + torch.arange(REQUESTS), drafts, top_k)
    outcome = (said * torch.tensor([size * size, size, 1])).sum(-1)
    return p_value(torch.bincount(outcome, minlength=size**3), exact(target, first, top_k).flatten() * REQUESTS)


@pytest.mark.parametrize("likeness", [0.0, 0.7, 1.0], ids=["another", "alike", "the same"])
def test_tokens_have_the_models_distribution(likeness: float) -> None:
    """Whatever the draft's: of three tokens together, over made-up distributions of eight tokens."""
    generator = torch.Generator().manual_seed(5)
    target, other = (2 * torch.randn(8, 8, generator=generator) for _ in range(2))
    draft = likeness * target + (1 - likeness) * other
    found = [fits(target, draft, 3, drafts, top_k=0, seed=seed) for seed in SEEDS for drafts in (1 + seed % 4,)]
    assert min(found) > 0.01, found


@torch.inference_mode()
def test_the_shipped_models_tokens_have_its_distribution(tiny: Path) -> None:
    """Of its three likeliest tokens after a prompt, of theirs, and of theirs again, with its own drafts.

    A token's likeliest are those after the first text in which it comes.
    """
    model, keep = hf.load(tiny, drafts=True), 3
    prompt = load_tokenizer(tiny).text("And the LORD spake unto Moses, saying,")
    pool = make_pool(model.config, 2, torch.float32, "cpu")

    def after(text: list[int]) -> Tensor:
        return model(Batch.build([], [Chunk(text, 0, [1])], "cpu"), pool, hf.dispatchers(model)[0])[0]

    texts, following = {prompt[-1]: prompt}, {}  # of each token: the text that ends with it, and the logits behind it
    for _ in range(LENGTH):
        for name in [name for name in texts if name not in following]:
            following[name] = after(texts[name])
            for token in following[name].topk(keep).indices.tolist():
                texts.setdefault(token, [*texts[name], token])
    names = list(texts)
    target, draft = (torch.zeros(len(names), len(names)) for _ in range(2))
    for i, name in enumerate(names):
        if name in following:
            target[i], draft[i] = following[name][names], draft_rows(model, texts[name])[-1][names]
    assert len(following) > 6 and names[0] == prompt[-1]
    assert not torch.equal(target.argmax(-1), draft.argmax(-1)), "drafts that are always right would show little"
    found = [fits(target, draft, 0, 2, keep, seed) for seed in SEEDS]
    assert min(found) > 0.01, found


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_no_token_depends_on_the_drafts(drafts: int) -> None:
    """Drafts that are never right, and drafts that always are: the same tokens."""
    generator, seeds = torch.Generator().manual_seed(7), torch.arange(500)
    target, other = (2 * torch.randn(30, 30, generator=generator) for _ in range(2))
    said = [speculate(target, draft, 3, seeds, drafts) for draft in (target, other, -target)]
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    assert len(said[0].unique(dim=0)) > 300


def test_a_draft_counts_until_the_first_wrong_one() -> None:
    drafts = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [5, 6, 0], [5, 6, 7]])
    chosen = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, -1, 8]])
    assert accepted(drafts, chosen).tolist() == [3, 1, 0, 2, 2]
    assert accepted(drafts[:0], chosen[:0]).tolist() == []


def test_alike_logits_choose_the_same_token_as_often_as_is_known() -> None:
    """At least (1 - d) / (1 + d), where d is the total variation distance (Daliri et al.), and never over 1 - d."""
    generator = torch.Generator().manual_seed(1)
    count = 20_000
    for spread in (0.1, 0.5, 2.0):
        target = 2 * torch.randn(20, generator=generator)
        draft = target + spread * torch.randn(20, generator=generator)
        rows = rows_of(torch.arange(count), torch.zeros(count).long(), 0)
        same = (sample(target.expand(count, -1), rows) == sample(draft.expand(count, -1), rows)).float().mean().item()
        distance = (target.softmax(-1) - draft.softmax(-1)).abs().sum().item() / 2
        margin = 4 * (0.25 / count) ** 0.5  # four standard deviations, at most
        assert (1 - distance) / (1 + distance) - margin <= same <= 1 - distance + margin, (spread, distance, same)


@pytest.mark.parametrize("overlapped", [False, True])
def test_each_row_is_chosen_as_that_of_a_sequence_with_its_drafts(overlapped: bool) -> None:
    """Whatever the requests beside it want, and wherever it lies: as alone, with the drafts before it as its tokens."""
    generator, rng, vocab, drafts, rows = torch.Generator().manual_seed(2), random.Random(2), 12, 2, 8
    kinds = [
        {},
        {"temperature": 1.0, "seed": 3, "top_k": 5, "logprobs": 2},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logprobs": 1},
        {"repetition_penalty": 3.0, "temperature": 0.7, "seed": 4},
        {"min_tokens": 9, "stop_token_ids": list(range(6))},
        {"logit_bias": {7: 5.0}, "frequency_penalty": 2.0},
    ]
    sequences, each = [], drafts + 1
    for i, kind in enumerate(kinds * 20):
        tokens = [rng.randrange(vocab) for _ in range(3 + i % 4)]
        request = Request(i, tokens[:2], **{"max_tokens": 40, "ignore_eos": True} | kind)
        sequences.append(Sequence(request, tokens=tokens, computed=len(tokens)))
    for at in range(0, len(sequences), len(kinds)):
        mine = sequences[at : at + len(kinds)]
        where = places(len(mine), rows, overlapped)
        nothing = np.zeros(len(mine), np.int64)
        decodes = Decodes(nothing, nothing, [[1]] * len(mine))
        work = Work(Plan(mine, []), decodes, [], rows, overlapped, mine, where, drafts=Drafts(drafts, drafts))
        fed = torch.randint(vocab, (rows, each), generator=generator)
        logits, after = torch.randn(rows * each, vocab, generator=generator), torch.zeros(rows, each, dtype=torch.int64)
        for row, sequence in zip(where, mine, strict=True):
            after[row] = len(sequence.tokens) + torch.arange(each)
        choice, later = logits.argmax(-1), fed[:, 0].clone()
        sampler = SpeculativeSampler(Group())
        found = sampler.choose(logits.clone(), choice, work, fed, after.flatten())
        sampler.draft(logits[::each], later, work, after[:, 0], place=2)
        assert found is not None
        for i, (row, sequence) in enumerate(zip(where, mine, strict=True)):
            for place in range(each):
                known = [*sequence.tokens, *fed[row, 1 : place + 1].tolist()]
                alone = Sequence(sequence.request, tokens=known, computed=len(known))
                line = logits[row * each + place][None].clone()
                best = top_logprobs(line, choice[row * each + place][None], 2)
                process(line, [alone], line.new_zeros(0, dtype=torch.int64), nothing[:0], [len(known)])
                assert choice[row * each + place] == sample(line, sampling_rows([alone], line.device))
                assert all(torch.allclose(a[i, place], b[0]) for a, b in zip(found, best, strict=True))
            if sequence.request.temperature:
                further = Sequence(sequence.request, computed=len(sequence.tokens) + 2)
                assert later[row] == sample(logits[row * each][None], sampling_rows([further], logits.device))
