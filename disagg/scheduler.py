"""Continuous batching: which tokens run in the next step.

    waiting --(a place in the batch, all its pages)--> running --> finished

A request's pages are all reserved when it is admitted, so a running request never runs out and nothing is preempted.
Deterministic: the ranks of an attention replica feed it the same events and it makes the same choices on each.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from disagg.request import Request
from model.batch import PAGE, Chunk
from model.kv_cache import PageAllocator, pages_for
from model.sampling import COLDEST


@dataclass(eq=False)
class Sequence:
    """A request at work: its tokens so far, and how many have their KV in `pages` once the steps that were launched are
    done."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uid = self.request.uid
        self.tokens = self.tokens or list(self.request.prompt)
        self.prompt_len = len(self.request.prompt)
        self.limit = self.request.most_tokens
        self.is_plain = self.request.temperature <= COLDEST and not self.request.logprobs  # greedy choice is all

    @property
    def in_prompt(self) -> bool:
        return self.computed < self.prompt_len

    @property
    def unseen(self) -> int:
        """Sampled tokens, of steps that were launched, that the host has not seen yet: a step that computes the KV of
        the latest token samples the next."""
        return max(0, self.computed + 1 - len(self.tokens))

    def append(self, token: int, eos_token_ids: tuple[int, ...]) -> str | None:
        """Add a sampled token; the reason if it is the last one."""
        self.tokens.append(token)
        if token in eos_token_ids and not self.request.ignore_eos:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None


@dataclass(frozen=True)
class Plan:
    """One step of one replica."""

    decodes: list[Sequence]
    prefills: list[tuple[Sequence, int]]  # (sequence, tokens to compute now)
    may_end: bool = True  # one of them at its limit, with this step's token

    @cached_property
    def is_plain(self) -> bool:
        return all(s.is_plain for s in self.decodes) and all(s.is_plain for s, _ in self.prefills)

    # Of those that decode: what is the same while a plan is.

    @cached_property
    def uids(self) -> dict[int, None]:
        return dict.fromkeys(s.uid for s in self.decodes)

    @cached_property
    def appends(self) -> list[Callable[[int], None]]:
        """To each one's tokens."""
        return [s.tokens.append for s in self.decodes]

    @property
    def num_prefill_tokens(self) -> int:
        return sum(count for _, count in self.prefills)

    def prompt_chunks(self) -> list[Chunk]:
        return [
            Chunk(s.tokens[s.computed : s.computed + n], s.computed, s.pages, s.computed + n == len(s.tokens))
            for s, n in self.prefills
        ]

    def advance(self) -> list[Sequence]:
        """The step was launched. Returns the sequences that get a token from it, in the order of its logits."""
        for sequence in self.decodes:
            sequence.computed += 1
        for sequence, count in self.prefills:
            sequence.computed += count
        return self.decodes + [s for s, _ in self.prefills if not s.in_prompt]


class Scheduler:
    def __init__(self, allocator: PageAllocator, max_batch: int, max_tokens_per_step: int, max_model_len: int):
        """`max_batch` sequences run at once; a step computes at most `max_tokens_per_step` tokens."""
        if max_batch > max_tokens_per_step:
            raise ValueError(
                f"--max-batch ({max_batch}) is over --max-tokens-per-step ({max_tokens_per_step}): "
                f"a step must hold one token of every running request"
            )
        self.allocator, self.max_model_len = allocator, max_model_len
        self.max_batch, self.max_tokens_per_step = max_batch, max_tokens_per_step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._same, self._times = Plan([], []), 0  # the plan of so many more steps, if nobody comes or goes

    def check_fits(self, num_tokens: int) -> None:
        """ValueError, with the numbers, if a request that fills this many tokens of KV can never run here."""
        if num_tokens > self.max_model_len:
            raise ValueError(f"the request needs {num_tokens} tokens, over max_model_len ({self.max_model_len})")
        need, have = pages_for(num_tokens), self.allocator.capacity
        if need > have:
            raise ValueError(
                f"the request can never fit: {num_tokens} tokens need {need} pages of {PAGE}, "
                f"this rank has {have} ({have * PAGE} tokens; --kv-tokens)"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `check_fits`. It may bring its pages with it (KV that was handed over)."""
        self.waiting.append(sequence)

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence its pages, all at once; False if there are not enough now."""
        pages = self.allocator.alloc(pages_for(num_tokens))
        sequence.pages = pages or []
        return pages is not None

    def schedule(self, reserve_output: bool = True) -> Plan:
        """The next step: every running request's next token, then prompt chunks, oldest first.

        The tokens of the step before may still be in flight: a request that turns out to have ended with one of them
        has then taken part in a step too many.

        `reserve_output`: reserve room for the tokens to be generated, not the prompt alone (the prefill role).
        """
        if self._times > 0 and not self.waiting:
            self._times -= 1
            return self._same if self._times else replace(self._same, may_end=True)
        prompts = [s for s in self.running if s.computed < s.prompt_len]
        decodes = [s for s in self.running if s.prompt_len <= s.computed < s.limit - 1]  # the last token needs no KV
        budget = self.max_tokens_per_step - len(decodes)
        prefills = []
        for sequence in prompts:
            if budget > 0:
                prefills.append((sequence, count := min(budget, len(sequence.tokens) - sequence.computed)))
                budget -= count
        while self.waiting and len(self.running) < self.max_batch and budget > 0:
            sequence = self.waiting[0]
            wanted = sequence.limit if reserve_output else sequence.prompt_len
            if not sequence.pages and not self.reserve(sequence, wanted):
                break  # in order: a large request is not overtaken for ever
            self.running.append(self.waiting.popleft())
            if not sequence.in_prompt:
                decodes.append(sequence)
                budget -= 1
            else:
                prefills.append((sequence, count := min(budget, len(sequence.tokens))))
                budget -= count
        self._times = 0 if prefills else min((s.limit - 2 - s.computed for s in decodes), default=0)
        self._same = Plan(decodes, prefills, may_end=self._times == 0)
        return self._same

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queues. Its pages stay its own: see `release`."""
        self._times = 0
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's pages back. Never while a transfer may still write them."""
        self.allocator.free(sequence.pages)
        sequence.pages = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)
