"""The scheduler, under any sequence of events.

A page is held by exactly those that list it, and a step stays within its limits. What a request reads is the KV of its
own tokens, whoever computed it. Requests start in the order of arrival, and all of them end. Two schedulers that see
the same events decide the same. One step is always in flight: its tokens are seen after the next step was launched.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from disagg.page_cache import PageCache
from disagg.request import Request
from disagg.scheduler import Plan, Scheduler, Sequence
from disagg.step import NO_WORK, Work
from model.pages import NULL_PAGE, PAGE, PageAllocator

EOS, OTHER = 1, 2
CAPACITY = 7  # pages
MAX_MODEL_LEN = 6 * PAGE


@dataclass
class Replica:
    """A scheduler and what its role remembers of each request. Two of them live the same life."""

    scheduler: Scheduler
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by uid, all that are not over
    over: list[Sequence] = field(default_factory=list)  # but a step in flight still writes to their pages
    latest: Work = NO_WORK  # in flight
    kv: dict[tuple[int, int], tuple[Sequence, int]] = field(default_factory=dict)  # page, slot -> whose, and where

    @property
    def flying(self) -> list[Sequence]:
        """Those that get a token from the step in flight."""
        return self.latest.sequences

    def write(self, sequence: Sequence, begin: int, end: int) -> None:
        """Write the KV of the sequence's tokens from `begin` to `end`."""
        for position in range(begin, end):
            self.kv[sequence.pages[position // PAGE], position % PAGE] = sequence, position

    def read(self, sequence: Sequence, end: int) -> None:
        """Attend to the first `end` tokens. Of another sequence's KV all tokens are seen."""
        for position in range(end):
            writer, at = self.kv[sequence.pages[position // PAGE], position % PAGE]
            if writer is not sequence:
                assert at == position and at < len(writer.tokens), "the KV of another place"
                assert writer.tokens[: at + 1] == sequence.tokens[: at + 1], "the KV of other tokens"
                assert writer.request.cache_salt == sequence.request.cache_salt

    @property
    def holders(self) -> list[Sequence]:
        return [s for s in [*self.sequences.values(), *self.over] if s.pages]


def make_scheduler(
    max_batch: int, max_tokens_per_step: int, capacity: int = CAPACITY, max_context: int | None = None
) -> Scheduler:
    return Scheduler(PageCache(capacity + 1), max_batch, max_tokens_per_step, MAX_MODEL_LEN, max_context=max_context)


def make_sequence(uid: int, prompt_len: int, max_tokens: int = 1, base: int = OTHER, **fields: Any) -> Sequence:
    return Sequence(Request(uid, [base] * prompt_len, max_tokens, **fields), (EOS,))


def shape_of(plan: Plan) -> tuple[list, list]:
    """All that a plan decides, by value."""
    decodes = [(s.uid, s.computed, s.pages) for s in plan.decodes]
    return decodes, [(s.uid, s.computed, s.pages, count) for s, count in plan.prefills]


class Life(RuleBasedStateMachine):
    """The unified role: a request takes pages for its prompt and its output when it is admitted."""

    reserve_output = True
    waits_for_flight = True  # somebody else than the steps may write to freed pages at once

    @initialize(max_batch=st.integers(1, 5), more=st.integers(0, 200))
    def start(self, max_batch: int, more: int) -> None:
        self.max_batch, self.max_tokens = max_batch, max_batch + more
        self.twins = [Replica(make_scheduler(max_batch, max_batch + more)) for _ in range(2)]
        self.submitted = 0
        self.started: list[int] = []  # uids, in the order of their first step
        self.queued: list[int] = []  # uids, in the order in which they were added

    @property
    def one(self) -> Replica:
        return self.twins[0]

    def add(self, uid: int) -> None:
        self.queued.append(uid)
        for twin in self.twins:
            twin.scheduler.add(twin.sequences[uid])

    @rule(
        prompt_len=st.integers(1, 2 * PAGE + 1) | st.integers(1, 5) | st.sampled_from((PAGE, 2 * PAGE)),
        max_tokens=st.integers(1, 4) | st.just(PAGE),
        base=st.sampled_from((OTHER, OTHER, 3)),
        fields=st.sampled_from(({}, {}, {"cache_salt": "mine"}, {"return_experts": True})),
    )
    def submit(self, prompt_len: int, max_tokens: int, base: int, fields: dict[str, Any]) -> None:
        """Prompts of OTHER repeat others' answers, too."""
        uid, self.submitted = self.submitted, self.submitted + 1
        for twin in self.twins:
            twin.scheduler.check_fits(prompt_len + max_tokens)
            twin.sequences[uid] = make_sequence(uid, prompt_len, max_tokens, base, **fields)
        self.arrive(uid)

    def arrive(self, uid: int) -> None:
        self.add(uid)

    @rule(ends=st.lists(st.booleans(), min_size=10, max_size=10))
    def step(self, ends: list[bool]) -> None:
        plans = [twin.scheduler.schedule(self.reserve_output) for twin in self.twins]
        assert shape_of(plans[0]) == shape_of(plans[1])
        self.check(plans[0])
        for plan, twin in zip(plans, self.twins, strict=True):
            before = {uid: s.computed for uid, s in twin.sequences.items()}
            decodes, prompts = twin.latest.next_decodes(plan.decodes), plan.prompt_chunks()
            chunks = decodes.chunks() + prompts
            sampled = plan.advance()
            for sequence, chunk in zip(plan.decodes + [s for s, _ in plan.prefills], chunks, strict=True):
                assert sequence.computed == before[sequence.uid] + len(chunk.token_ids)
                assert chunk.wants_logits == (sequence in sampled)
                twin.write(sequence, chunk.start, sequence.computed)
                twin.read(sequence, sequence.computed)
            landing, rows = twin.flying, np.arange(len(sampled))[::-1]
            twin.latest = Work(plan, decodes, prompts, None, False, sampled, rows)
            self.launched(twin, plan)
            for sequence, end in zip(landing, ends, strict=False):
                if twin.sequences.get(sequence.uid) is sequence:
                    self.sampled(twin, sequence, EOS if end else OTHER)
                elif sequence in twin.over:
                    sequence.append(OTHER)
                    assert not sequence.unseen
                    twin.over.remove(sequence)
                    twin.scheduler.release(sequence)

    def launched(self, twin: Replica, plan: Plan) -> None:
        pass

    def check(self, plan: Plan) -> None:
        decodes = self.one.latest.next_decodes(plan.decodes).chunks()
        chunks = decodes + plan.prompt_chunks()
        running = plan.decodes + [s for s, _ in plan.prefills]
        assert len(self.one.scheduler.running) <= self.max_batch
        assert plan.decodes == [s for s in self.one.scheduler.running if s.prompt_len <= s.computed < s.limit - 1]
        assert plan.may_end or not (plan.prefills or any(s.computed + 2 >= s.limit for s in plan.decodes))
        assert list(plan.uids) == [s.uid for s in plan.decodes]
        assert sum(len(c.token_ids) for c in chunks) <= self.max_tokens
        assert len({s.uid for s in running}) == len(running), "a sequence twice in one step"
        for sequence, chunk in zip(running, chunks, strict=True):
            written = chunk.start + len(chunk.token_ids)
            assert chunk.token_ids, "a chunk of nothing"
            assert chunk.start == sequence.computed and chunk.pages is sequence.pages
            if sequence.unseen:
                row = self.one.latest.rows[self.one.flying.index(sequence)]
                assert list(chunk.token_ids) == [-1 - row]
            else:
                assert list(chunk.token_ids) == sequence.tokens[chunk.start : written]
            assert written <= len(chunk.pages) * PAGE, "a token without a page"
            if sequence.uid not in self.started:
                self.started.append(sequence.uid)
        in_order = [uid for uid in self.queued if uid in self.started]
        assert self.started == in_order, "overtaken"
        skipped = [s for s in self.one.scheduler.running if s not in running and s.computed < s.limit - 1]
        assert not skipped or sum(len(c.token_ids) for c in chunks) == self.max_tokens, "idle for nothing"

        context = sum(s.computed + count for s, count in plan.prefills)
        assert context <= self.max_tokens + MAX_MODEL_LEN, "more than the memory table counts"

        queue, room = self.one.scheduler.waiting, self.max_batch - len(self.one.scheduler.running)
        left = self.max_tokens - sum(len(c.token_ids) for c in chunks)
        if queue and room and left:
            request = queue[0].request
            if queue[0].pages:
                context += queue[0].computed + min(left, len(request.prompt) - queue[0].computed)
                assert context > self.max_tokens + MAX_MODEL_LEN, "it has its pages, and waits for nothing"
                return
            tokens = len(request.prompt) + (request.max_tokens if self.reserve_output else 0)
            assert tokens > self.one.scheduler.cache.num_free * PAGE, "there is room, and it waits for nothing"

    def sampled(self, twin: Replica, sequence: Sequence, token: int) -> None:
        before = len(sequence.tokens) - sequence.prompt_len
        reason = sequence.append(token)
        assert len(sequence.tokens) - sequence.prompt_len == before + 1 <= sequence.request.max_tokens
        assert (reason == "stop") == (token == EOS)
        assert (reason is not None) == (token == EOS or before + 1 == sequence.request.max_tokens)
        if reason is not None:
            self.drop(twin, sequence.uid)

    def drop(self, twin: Replica, uid: int) -> None:
        sequence = twin.sequences.pop(uid)
        twin.scheduler.remove(sequence)
        if sequence.unseen and self.waits_for_flight:
            twin.over.append(sequence)
        else:
            twin.scheduler.release(sequence)

    @precondition(lambda self: self.one.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        uid = data.draw(st.sampled_from(sorted(self.one.sequences)))
        if uid in self.queued and uid not in self.started:
            self.queued.remove(uid)
        for twin in self.twins:
            self.drop(twin, uid)

    @invariant()
    def every_page_is_held_by_those_that_list_it(self) -> None:
        for twin in self.twins if hasattr(self, "twins") else []:
            held = Counter(page for s in twin.holders for page in s.pages)
            assert NULL_PAGE not in held and all(0 < page <= CAPACITY for page in held)
            assert twin.scheduler.cache._holders == held
            assert twin.scheduler.cache.num_free + len(held) == CAPACITY

    def settle(self) -> None:
        """What goes on outside the scheduler comes to its end."""

    def teardown(self) -> None:
        if not hasattr(self, "twins"):
            return
        for _ in range(5_000):
            self.settle()
            if not self.one.sequences and not self.one.flying:
                break
            self.step([False] * 10)
            self.every_page_is_held_by_those_that_list_it()
        for twin in self.twins:
            assert not twin.sequences and not twin.scheduler.has_work, "a request never ended"
            assert twin.scheduler.cache.num_free == CAPACITY, "a page was lost"


class PrefillLife(Life):
    """The prefill role: room for the prompt alone; after the first token the pages stay until the links let go."""

    reserve_output = False
    waits_for_flight = False

    def launched(self, twin: Replica, plan: Plan) -> None:
        for sequence, _ in plan.prefills:
            if not sequence.in_prompt:
                assert len(sequence.pages) == -(-len(sequence.request.prompt) // PAGE), "more than the prompt"
                twin.scheduler.remove(sequence)  # its KV is still being read

    def sampled(self, twin: Replica, sequence: Sequence, token: int) -> None:
        assert sequence not in twin.scheduler.running

    @property
    def computed(self) -> list[int]:
        return [uid for uid, s in self.one.sequences.items() if s.computed == len(s.request.prompt)]

    @precondition(lambda self: self.computed)
    @rule(data=st.data())
    def links_ended(self, data: st.DataObject) -> None:
        uid = data.draw(st.sampled_from(self.computed))
        for twin in self.twins:
            self.drop(twin, uid)

    def settle(self) -> None:
        for uid in self.computed:
            for twin in self.twins:
                self.drop(twin, uid)


class DecodeLife(Life):
    """The decode role: pages first, then the prompt's KV from elsewhere, and only then the scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.without_pages: deque[int] = deque()
        self.on_its_way: list[int] = []

    def arrive(self, uid: int) -> None:
        self.without_pages.append(uid)
        self.reserve()

    def reserve(self) -> None:
        while self.without_pages:
            uid = self.without_pages[0]
            got = []
            for twin in self.twins:
                sequence, free = twin.sequences[uid], twin.scheduler.cache.num_free
                tokens = len(sequence.request.prompt) + sequence.request.max_tokens
                got.append(twin.scheduler.reserve(sequence, tokens))
                assert got[-1] >= (-(-tokens // PAGE) <= free)
                assert len(sequence.pages) == (-(-tokens // PAGE) if got[-1] else 0)
            assert got[0] == got[1]
            if not got[0]:
                break
            self.on_its_way.append(self.without_pages.popleft())

    def handed_over(self, uid: int) -> None:
        self.on_its_way.remove(uid)
        for twin in self.twins:
            sequence = twin.sequences[uid]
            twin.write(sequence, sequence.computed, len(sequence.tokens))
            sequence.computed = len(sequence.tokens)
            twin.scheduler.publish(sequence, sequence.computed)
            if sequence.append(OTHER):
                self.drop(twin, uid)
        if uid in self.one.sequences:
            self.add(uid)

    @precondition(lambda self: self.on_its_way)
    @rule(data=st.data())
    def kv_came(self, data: st.DataObject) -> None:
        self.handed_over(data.draw(st.sampled_from(self.on_its_way)))

    def drop(self, twin: Replica, uid: int) -> None:
        """Of a request whose KV is on its way, some may have come."""
        sequence = twin.sequences[uid]
        if uid in self.on_its_way:
            twin.write(sequence, sequence.computed, len(sequence.tokens) // 2)
        super().drop(twin, uid)
        if uid in self.without_pages:
            self.without_pages.remove(uid)
        if uid in self.on_its_way:
            self.on_its_way.remove(uid)

    def check(self, plan: Plan) -> None:
        assert not plan.prefills, "the decode role computes no prompt"
        super().check(plan)

    def settle(self) -> None:
        self.reserve()
        for uid in list(self.on_its_way):
            self.handed_over(uid)


@pytest.mark.parametrize("life", (Life, PrefillLife, DecodeLife))
def test_a_life_of_requests_keeps_every_invariant(life: type[Life]) -> None:
    run_state_machine_as_test(
        life, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
    )


def test_a_prompt_is_computed_in_chunks_of_the_step_budget_and_has_logits_once() -> None:
    scheduler = make_scheduler(max_batch=2, max_tokens_per_step=50)
    sequence = make_sequence(0, prompt_len=120, max_tokens=5)
    scheduler.add(sequence)
    counts, rows = [], []
    for _ in range(3):
        plan = scheduler.schedule()
        counts.append(plan.num_prefill_tokens)
        (chunk,) = plan.prompt_chunks()
        rows.append((chunk.start, len(chunk.token_ids), chunk.wants_logits))
        sampled = plan.advance()
    assert counts == [50, 50, 20]
    assert rows == [(0, 50, False), (50, 50, False), (100, 20, True)]
    assert sampled == [sequence]
    assert len(sequence.pages) == 2  # 120 + 5 tokens


def test_running_requests_decode_before_prompts_share_what_is_left_of_the_budget() -> None:
    scheduler = make_scheduler(max_batch=4, max_tokens_per_step=10)
    old = make_sequence(0, prompt_len=4, max_tokens=9)
    scheduler.add(old)
    scheduler.schedule().advance()
    old.append(OTHER)
    for uid, length in ((1, 6), (2, 6), (3, 6)):
        scheduler.add(make_sequence(uid, length))
    plan = scheduler.schedule()
    assert [s.uid for s in plan.decodes] == [0]
    assert [(s.uid, count) for s, count in plan.prefills] == [(1, 6), (2, 3)]
    assert [s.uid for s in scheduler.waiting] == [3]


def test_a_request_that_was_handed_over_takes_its_token_out_of_the_budget() -> None:
    scheduler = make_scheduler(max_batch=3, max_tokens_per_step=10)
    handed_over = make_sequence(0, prompt_len=30, max_tokens=5)
    assert scheduler.reserve(handed_over, 35)
    handed_over.computed = 30
    handed_over.append(OTHER)
    scheduler.add(handed_over)
    scheduler.add(make_sequence(1, prompt_len=20))
    plan = scheduler.schedule()
    assert plan.decodes == [handed_over] and plan.num_prefill_tokens == 9
    decodes = NO_WORK.next_decodes(plan.decodes)
    assert (decodes.ids.tolist(), decodes.positions.tolist()) == ([OTHER], [30])


def test_what_prompts_share_is_computed_once_even_if_they_arrive_together() -> None:
    """The second begins behind what the first computes in the same step, the third behind what the second adds."""
    scheduler = make_scheduler(max_batch=4, max_tokens_per_step=5 * PAGE)
    first, second, third = (make_sequence(i, length) for i, length in enumerate((PAGE + 5, 2 * PAGE, 3 * PAGE)))
    other = make_sequence(3, PAGE, cache_salt="another tenant's")
    for sequence in (first, second, third, other):
        scheduler.add(sequence)
    plan = scheduler.schedule(reserve_output=False)
    assert [count for _, count in plan.prefills] == [PAGE + 5, PAGE, PAGE, PAGE]
    assert [chunk.start for chunk in plan.prompt_chunks()] == [0, PAGE, 2 * PAGE, 0]
    assert [s.hits for s in (first, second, third, other)] == [0, 1, 2, 0]
    assert third.pages[:2] == [first.pages[0], second.pages[1]]
    plan.advance()
    scheduler.remove(other)
    scheduler.add(make_sequence(4, 2 * PAGE))
    assert [count for _, count in scheduler.schedule(reserve_output=False).prefills] == [PAGE], (
        "not all of it: one token"
    )


@pytest.mark.parametrize("fields", [{"return_experts": True}, {"prompt_logprobs": 0}], ids=str)
def test_a_prompt_whose_rows_are_wanted_is_computed_whole_and_serves_others(fields: dict[str, Any]) -> None:
    scheduler = make_scheduler(max_batch=4, max_tokens_per_step=9 * PAGE)
    for sequence in (make_sequence(0, PAGE + 1), make_sequence(1, PAGE + 1, **fields), make_sequence(2, PAGE + 1)):
        scheduler.add(sequence)
    assert [count for _, count in scheduler.schedule().prefills] == [PAGE + 1, PAGE + 1, 1]


@pytest.mark.parametrize(
    ("most", "steps"),
    [
        (None, [[1], [2], [3]]),  # as without the cache: only one prompt of a step can have begun in an earlier one
        (2 * (5 * PAGE + 2), [[1, 2], [3]]),
        (2 * (5 * PAGE + 2) - 1, [[1], [2], [3]]),
    ],
)
def test_a_step_sees_no_more_context_than_the_memory_table_counts(most: int | None, steps: list[list[int]]) -> None:
    scheduler = make_scheduler(max_batch=8, max_tokens_per_step=2 * PAGE, capacity=40, max_context=most)
    scheduler.add(make_sequence(0, 5 * PAGE))
    for _ in range(3):
        scheduler.schedule().advance()
    for uid in range(1, 4):
        scheduler.add(make_sequence(uid, 5 * PAGE + 2))
    for uids in steps:
        plan = scheduler.schedule()
        assert [(s.uid, s.hits, count) for s, count in plan.prefills] == [(uid, 5, 2) for uid in uids]
        plan.advance()


def test_a_large_request_is_not_overtaken_by_a_small_one_that_would_fit() -> None:
    scheduler = make_scheduler(max_batch=4, max_tokens_per_step=400)
    first, large, small = make_sequence(0, 3 * PAGE), make_sequence(1, 5 * PAGE, base=3), make_sequence(2, 1)
    for sequence in (first, large, small):
        scheduler.add(sequence)
    assert [s.uid for s, _ in scheduler.schedule().prefills] == [0]
    assert [s.uid for s in scheduler.waiting] == [1, 2]
    scheduler.remove(first)
    scheduler.release(first)
    assert not first.pages, "they are another's soon"
    assert [s.uid for s, _ in scheduler.schedule().prefills] == [1, 2]


@pytest.mark.parametrize("reserve_output, pages", ((True, 3), (False, 1)))
def test_the_prefill_role_reserves_the_prompt_and_the_others_the_output_too(reserve_output: bool, pages: int) -> None:
    scheduler = make_scheduler(max_batch=1, max_tokens_per_step=PAGE)
    sequence = make_sequence(0, prompt_len=PAGE, max_tokens=PAGE + 1)
    scheduler.add(sequence)
    scheduler.schedule(reserve_output)
    assert len(sequence.pages) == pages


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(max_batch=1, max_tokens_per_step=1, capacity=3)
    scheduler.check_fits(3 * PAGE)
    with pytest.raises(ValueError, match=f"{3 * PAGE + 1} tokens need 4 pages of {PAGE}, this rank has 3"):
        scheduler.check_fits(3 * PAGE + 1)


def test_a_request_over_max_model_len_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(max_batch=1, max_tokens_per_step=1, capacity=100)
    scheduler.check_fits(MAX_MODEL_LEN)
    with pytest.raises(ValueError, match=rf"needs {MAX_MODEL_LEN + 1} tokens, over max_model_len \({MAX_MODEL_LEN}\)"):
        scheduler.check_fits(MAX_MODEL_LEN + 1)


def test_a_batch_larger_than_a_step_is_refused_with_the_numbers() -> None:
    make_scheduler(max_batch=8, max_tokens_per_step=8)
    with pytest.raises(ValueError, match=r"--max-batch \(9\) is over --max-tokens-per-step \(8\)"):
        make_scheduler(max_batch=9, max_tokens_per_step=8)


def test_the_end_of_text_token_ends_a_request_unless_it_is_to_be_ignored() -> None:
    assert Sequence(Request(0, [5], max_tokens=3), (7, EOS)).append(EOS) == "stop"
    ignoring = Sequence(Request(0, [5], max_tokens=3, ignore_eos=True), (7, EOS))
    assert [ignoring.append(EOS) for _ in range(3)] == [None, None, "length"]


def test_stop_token_ids_end_a_request_even_if_eos_does_not() -> None:
    stopping = Sequence(Request(0, [5], max_tokens=9, ignore_eos=True, stop_token_ids=[3, 4]), (7, EOS))
    assert [stopping.append(token) for token in (EOS, 7, 5, 4)] == [None, None, None, "stop"]
    assert stopping.tokens == [5, EOS, 7, 5, 4]
    also = Sequence(Request(0, [5], max_tokens=9, stop_token_ids=[3]), (7, EOS))
    assert [also.append(token) for token in (5, 7)] == [None, "stop"]


def test_the_allocator_gives_all_or_nothing_and_takes_only_what_it_gave() -> None:
    allocator = PageAllocator(5)
    assert allocator.alloc(5) is None and allocator.num_free == 4
    pages = allocator.alloc(4)
    assert sorted(pages) == [1, 2, 3, 4]
    allocator.free(pages[:1])
    with pytest.raises(AssertionError, match="is not allocated"):
        allocator.free(pages[:1])
    with pytest.raises(AssertionError, match="is not allocated"):
        allocator.free([NULL_PAGE])
    assert allocator.num_free == 1


@pytest.mark.parametrize(("how", "pages"), [({}, 2), ({"reserve_output": False}, 1)])
def test_pages_for_the_output_are_reserved_unless_told_otherwise(how: dict[str, bool], pages: int) -> None:
    """10 tokens of prompt and 100 generated ones need two pages, the prompt alone one."""
    scheduler = Scheduler(PageCache(10), max_batch=4, max_tokens_per_step=64, max_model_len=640)
    sequence = Sequence(Request(0, [5] * 10, 100))
    scheduler.add(sequence)
    scheduler.schedule(**how)
    assert len(sequence.pages) == pages
