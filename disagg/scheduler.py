"""Continuous batching: which tokens run in the next step.

    waiting --(a place in the batch, all its pages)--> running --> finished

A request gets all its pages when it is admitted, so a running request never runs out and nothing is preempted. The
first of them may come from the prefix cache. Then its prompt is computed from behind them.

A plan is launched before another is made. So the pages that a chunk fills are published with the plan: who finds them
reads them in the same step or a later one. In the same step its chunk comes after the one that writes them, and each
layer writes a step's KV before it reads any. A step with room for another prompt computes all earlier ones to their
end. So what prompts share is computed once, even if they arrive together.

The scheduler is deterministic: the ranks of an attention replica give it the same events, so it makes the same choices.
"""

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from disagg.history import History
from disagg.page_cache import PageCache, never
from disagg.request import FinishReason, Request
from model.batch import Chunk
from model.pages import PAGE, pages_for
from model.sampling import COLDEST, NO_TOKEN


@dataclass(eq=False)
class Sequence:
    """A request that is queued or running."""

    request: Request
    eos_token_ids: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)  # the prompt, then the generated tokens that the host has seen
    computed: int = 0  # tokens with their KV in `pages`, once all launched steps are done
    pages: list[int] = field(default_factory=list)
    hits: int = 0  # pages that came from the cache with their KV
    drafts: list[int] = field(default_factory=list)  # of the tokens after its first one, which came with it
    verified: int = 0  # drafts that count for it (`acceptance.py`) and are not reported yet
    _page_tokens: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uid = self.request.uid
        self.tokens = self.tokens or list(self.request.prompt)
        self.prompt_len = len(self.request.prompt)
        self.limit = self.request.most_tokens
        self.stop_tokens = self.request.stop_tokens(self.eos_token_ids)
        # Is the argmax of the model's logits all that the request needs?
        self.is_plain = (
            self.request.temperature <= COLDEST and not self.request.logprobs and not self.request.processes_logits
        )

    @cached_property
    def history(self) -> History:
        return History(self.request, self.stop_tokens)

    @property
    def in_prompt(self) -> bool:
        return self.computed < self.prompt_len

    @property
    def unseen(self) -> int:
        """Tokens sampled by launched steps that the host has not seen yet.

        The step that computes the KV of the latest token also samples the next one.
        """
        return max(0, self.computed + 1 - len(self.tokens))

    def page_tokens(self, count: int) -> list[bytes]:
        """Return the tokens of the first `count` pages, as bytes. Each page becomes bytes once."""
        begin = len(self._page_tokens) * PAGE
        if begin < count * PAGE:
            numbers = array("i", self.tokens[begin : count * PAGE])  # signed, because NO_TOKEN may be among them
            raw, size = numbers.tobytes(), PAGE * numbers.itemsize
            self._page_tokens += [raw[at : at + size] for at in range(0, len(raw), size)]
        return self._page_tokens[:count]

    def targets(self, count: int) -> list[int]:
        """Return the tokens after each of the next `count` prompt tokens, if their log probabilities are wanted.

        The last row of a chunk predicts the first token of the next chunk. That of a prompt predicts no prompt token.
        """
        if self.request.prompt_logprobs is None:
            return []
        return self.request.prompt[self.computed + 1 : self.computed + 1 + count]

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token. Returns the finish reason if it is the last one."""
        self.tokens.append(token)
        if token in self.stop_tokens and self.request.max_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def extend(self, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """Add the tokens that one step gave, up to the first that ends the request.

        Returns how many were added, and the finish reason of the last one. The step was counted as one token.
        """
        count, reason = 0, None
        while reason is None and count < len(tokens):
            reason = self.append(tokens[count])
            count += 1
        self.computed += count - 1
        return count, reason


@dataclass(frozen=True)
class Plan:
    """One step of one replica."""

    decodes: list[Sequence]
    prefills: list[tuple[Sequence, int]]  # (sequence, tokens to compute now)
    may_end: bool = True  # with this step's token, a sequence may reach its limit

    @cached_property
    def is_plain(self) -> bool:
        return all(s.is_plain for s in self.decodes) and all(s.is_plain for s, _ in self.prefills)

    @cached_property
    def processes_logits(self) -> bool:
        """Does a request in this step change its logits before a token is chosen?"""
        return any(s.request.processes_logits for s in [*self.decodes, *(s for s, _ in self.prefills)])

    @cached_property
    def returns_experts(self) -> bool:
        """Does a request in this step ask for its chosen experts?"""
        return any(s.request.return_experts for s in [*self.decodes, *(s for s, _ in self.prefills)])

    # Cached, because a plan is reused while its decodes stay the same.

    @cached_property
    def uids(self) -> dict[int, None]:
        """The uids of the decoding sequences, in order."""
        return dict.fromkeys(s.uid for s in self.decodes)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens of which one or another ends a decoding sequence."""
        return frozenset({NO_TOKEN}).union(*(s.stop_tokens for s in self.decodes))

    @cached_property
    def appends(self) -> list[Callable[[int], None]]:
        """Per decoding sequence, the function that appends a token to it."""
        return [s.tokens.append for s in self.decodes]

    @property
    def has_last_token(self) -> bool:
        """Will a sequence be at its limit with one more token? Unlike `may_end`, it counts tokens that drafts gave."""
        return any(len(s.tokens) + 1 >= s.limit for s in self.decodes)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(count for _, count in self.prefills)

    def prompt_chunks(self) -> list[Chunk]:
        return [
            Chunk(
                s.tokens[s.computed : s.computed + n],
                s.computed,
                s.pages,
                s.computed + n == len(s.tokens),
                s.targets(n),
                s.request.prompt_logprobs or 0,
            )
            for s, n in self.prefills
        ]

    def advance(self) -> list[Sequence]:
        """Count the step as launched. Returns the sequences that get a token from it, in the order of its logits."""
        for sequence in self.decodes:
            sequence.computed += 1
        for sequence, count in self.prefills:
            sequence.computed += count
        return self.decodes + [s for s, _ in self.prefills if not s.in_prompt]


class Scheduler:
    def __init__(
        self,
        cache: PageCache,
        max_batch: int,
        max_tokens_per_step: int,
        max_model_len: int,
        drafts: int = 0,
        max_context: int | None = None,
    ) -> None:
        """At most `max_batch` sequences run at once. A step computes at most `max_tokens_per_step` tokens.

        A decoding sequence takes at most 1 + `drafts` of them. The prompts of a step see at most `max_context` tokens
        together, which only cached ones can reach. None: a step's tokens and the longest request, as without the cache.
        Raises ValueError if a step could not hold the tokens of every running sequence.
        """
        self.decode_tokens = 1 + drafts  # of a decoding sequence, in the next step
        if max_batch * self.decode_tokens > max_tokens_per_step:
            each = f" x (1 + --speculate {drafts}) = {max_batch * self.decode_tokens}" if drafts else ""
            raise ValueError(
                f"--max-batch ({max_batch}){each} is over --max-tokens-per-step ({max_tokens_per_step}): a step must "
                f"hold {'one token' if not drafts else f'{self.decode_tokens} tokens'} of every running request"
            )
        self.cache, self.max_model_len = cache, max_model_len
        self.max_batch, self.max_tokens_per_step = max_batch, max_tokens_per_step
        self.max_context = max_context or max_tokens_per_step + min(max_model_len, cache.capacity * PAGE)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        # `_same` is the plan of the next `_times` steps, too, unless a sequence is added or removed.
        self._same, self._times = Plan([], []), 0

    def check_fits(self, num_tokens: int) -> None:
        """Raise ValueError, with the numbers, if a request with `num_tokens` tokens of KV can never run here."""
        if num_tokens > self.max_model_len:
            raise ValueError(f"the request needs {num_tokens} tokens, over max_model_len ({self.max_model_len})")
        need, have = pages_for(num_tokens), self.cache.capacity
        if need > have:
            raise ValueError(
                f"the request can never fit: {num_tokens} tokens need {need} pages of {PAGE}, "
                f"this rank has {have} ({have * PAGE} tokens; --kv-tokens)"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `check_fits`. A handed-over sequence already has its pages."""
        self.waiting.append(sequence)

    def reserve(self, sequence: Sequence, num_tokens: int, may_await: Callable[[int], bool] = never) -> bool:
        """Give a sequence all its pages. Returns False if there are not enough free pages now.

        At least the last token of its prompt stays to be computed, because its logits are needed. `may_await`: as in
        `PageCache.reserve`.
        """
        request, most = sequence.request, 0
        if self.cache.keeps and request.reads_cache:
            most = (sequence.prompt_len - 1) // PAGE
        prefix = sequence.page_tokens(most)
        found = self.cache.reserve(pages_for(num_tokens), request.cache_salt, prefix, may_await)
        if found is None:
            return False
        sequence.pages, sequence.hits = found
        sequence.computed = sequence.hits * PAGE
        return True

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the pages of the sequence's first tokens, whose KV is there, or in the plan that is made."""
        if self.cache.keeps:
            written = sequence.page_tokens(num_tokens // PAGE)
            self.cache.publish(sequence.pages, sequence.request.cache_salt, written)

    def promise(self, sequence: Sequence) -> list[int]:
        """Promise the whole pages of a prompt whose KV is on its way. Returns the pages that are promised now."""
        if not self.cache.keeps:
            return []
        tokens = sequence.page_tokens(sequence.prompt_len // PAGE)
        return self.cache.promise(sequence.pages, sequence.request.cache_salt, tokens)

    def schedule(self, reserve_output: bool = True) -> Plan:
        """Plan the next step: the next token of every running request, then prompt chunks, oldest first.

        The previous step's tokens may still be in flight. If one of them ends its request, the request has taken part
        in one step too many.

        `reserve_output`: allocate pages for the generated tokens too. (The prefill role needs the prompt's only.)
        """
        if self._times > 0 and not self.waiting:
            self._times -= 1
            return self._same if self._times else replace(self._same, may_end=True)
        prompts = [s for s in self.running if s.computed < s.prompt_len]
        decodes = [s for s in self.running if s.prompt_len <= s.computed < s.limit - 1]  # the last token needs no KV
        budget = self.max_tokens_per_step - self.decode_tokens * len(decodes)
        prefills: list[tuple[Sequence, int]] = []
        context = 0

        def compute(sequence: Sequence, count: int) -> None:
            nonlocal budget, context
            prefills.append((sequence, count))
            budget -= count
            context += sequence.computed + count
            self.publish(sequence, sequence.computed + count)

        for sequence in prompts:
            if budget > 0:
                compute(sequence, min(budget, sequence.prompt_len - sequence.computed))
        while self.waiting and len(self.running) < self.max_batch and budget > 0:
            sequence = self.waiting[0]
            if not sequence.in_prompt and budget < self.decode_tokens:
                break
            wanted = sequence.limit if reserve_output else sequence.prompt_len
            if not sequence.pages and not self.reserve(sequence, wanted):
                break  # in order, so that smaller requests never starve a large one
            if not sequence.in_prompt:
                decodes.append(sequence)
                budget -= self.decode_tokens
            else:
                count = min(budget, sequence.prompt_len - sequence.computed)
                if context + sequence.computed + count > self.max_context:
                    break
                compute(sequence, count)
            self.running.append(self.waiting.popleft())
        self._times = 0 if prefills else min((s.limit - 2 - s.computed for s in decodes), default=0)
        self._same = Plan(decodes, prefills, may_end=self._times == 0)
        return self._same

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queues. It keeps its pages until `release`."""
        self._times = 0
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def release(self, sequence: Sequence) -> None:
        """Let go of a sequence's pages, and publish those that are whole.

        Never call it while a transfer, or a step that samples for the sequence, may still write them.
        """
        written = sequence.page_tokens(sequence.computed // PAGE) if self.cache.keeps else []
        self.cache.free(sequence.pages, sequence.request.cache_salt, written)
        sequence.pages = []

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that no launched step computes."""
        return sum(s.prompt_len - s.computed for s in (*self.running, *self.waiting) if s.in_prompt)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)
