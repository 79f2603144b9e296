"""The cache of pages, under any sequence of requests that come, write, publish and end.

A page's content is simulated: its tokens, those of all pages before it, and the salt. What a request finds must be its
own prefix. Nothing is written that another one may read. No page is lost, and pages go before those that they need.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from disagg.page_cache import PageCache
from model.pages import NULL_PAGE

CAPACITY = 9
SALTS = ("", "mine")
PAGES = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=5)  # the tokens of each page
Content = tuple[str, ...]


@dataclass
class Holder:
    """A request: the tokens of its whole pages, and how many of these pages have their KV."""

    salt: str
    tokens: list[bytes]
    pages: list[int]
    hits: int
    awaits: list[int] = field(default_factory=list)  # pages that another one promised it
    promised: list[int] = field(default_factory=list)
    written: int = field(init=False)

    def __post_init__(self) -> None:
        self.written = self.hits

    def content(self, page: int) -> Content:
        return (self.salt, *map(bytes.decode, self.tokens[: page + 1]))


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache, self.twin = PageCache(CAPACITY + 1), PageCache(CAPACITY + 1)
        self.holders: list[Holder] = []
        self.written: list[Holder] = []  # those that failed, and whose pages may still be written
        self.content: dict[int, Content] = {}  # by page: what was written to it last
        self.damaged: set[int] = set()  # pages that were there when the cache was told to distrust them

    def may_await(self, page: int) -> bool:
        return page % 3 > 0

    def both(self, name: str, *args: object) -> object:
        """Two caches that hear the same answer the same."""
        one, other = (getattr(cache, name)(*args) for cache in (self.cache, self.twin))
        assert one == other
        return one

    @rule(salt=st.sampled_from(SALTS), tokens=PAGES, more=st.integers(0, 5), reads=st.booleans())
    def come(self, salt: str, tokens: list[bytes], more: int, reads: bool) -> None:
        """`reads`: may it use what is there? `more`: pages beyond the tokens that are known now."""
        free, idle, prefix = self.cache.num_free, set(self.cache._idle), tokens if reads else []
        found = self.both("reserve", len(tokens) + more, salt, prefix, self.may_await)
        if found is None:
            assert self.cache.num_free == free < len(tokens) + more and set(self.cache._idle) == idle
            return
        pages, hits = found
        assert len(set(pages)) == len(pages) == len(tokens) + more and NULL_PAGE not in pages and hits <= len(prefix)
        one = Holder(salt, [*tokens, *[b"c"] * more], pages, hits)
        one.awaits = [page for page in pages[:hits] if any(page in other.promised for other in self.holders)]
        assert all(self.may_await(page) for page in one.awaits)
        for i, page in enumerate(pages):
            if page in one.awaits:
                assert any(one.content(i) == other.content(i) for other in self.holders if page in other.promised)
            elif i < hits:
                assert self.content[page] == one.content(i), "another prefix"
                assert page not in self.damaged
            else:
                assert not any(page in other.pages for other in self.everybody), "it is held"
        self.holders.append(one)

    def holder(self, data: st.DataObject) -> Holder:
        return data.draw(st.sampled_from(self.holders))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def promise(self, data: st.DataObject) -> None:
        """As a room does that has just been opened."""
        one = self.holder(data)
        if one.written == one.hits and not one.promised:
            one.promised = list(self.both("promise", one.pages, one.salt, one.tokens))
            assert not set(one.promised) & set(one.pages[: one.hits])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def fulfil(self, data: st.DataObject) -> None:
        """All KV of a prompt has come; that which it awaited was there before."""
        one = self.holder(data)
        if one.awaits:
            return
        for i in range(one.written, len(one.pages)):
            self.content[one.pages[i]] = one.content(i)
        one.written = len(one.pages)
        self.both("fulfil", one.promised)
        for other in self.holders:
            other.awaits = [page for page in other.awaits if page not in one.promised]
        one.promised = []
        self.both("publish", one.pages, one.salt, one.tokens)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), written=st.booleans())
    def retract(self, data: st.DataObject, written: bool) -> None:
        """It fails, and so do those that await it, unread and the last one first. `written`: it ends later."""
        one = self.holder(data)
        for other in reversed(self.holders.copy()):
            if other is one or set(one.promised) & set(other.awaits):
                self.both("retract", other.promised)
                other.promised = []
                self.holders.remove(other)
                if other is one and written and one.written == one.hits:
                    self.written.append(one)
                else:
                    self.both("free", other.pages, other.salt, [])
        self.forget_damage()

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def write_late(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.written))
        for page in one.pages[one.hits :]:
            assert page not in self.cache._places, "it can be found"
            assert not any(page in other.pages for other in self.everybody if other is not one), "it is another one's"
            self.content[page] = ("late",)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def end_writing(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.written))
        self.written.remove(one)
        self.both("free", one.pages, one.salt, [])
        self.forget_damage()

    @property
    def everybody(self) -> list[Holder]:
        return [*self.holders, *self.written]

    def forget_damage(self) -> None:
        self.damaged &= {page for one in self.everybody for page in one.pages}

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 3), published=st.booleans())
    def write(self, data: st.DataObject, count: int, published: bool) -> None:
        """Fill the next pages. A damaged page stays damaged, whoever publishes it."""
        one = self.holder(data)
        if one.promised or one.awaits:
            return
        for _ in range(min(count, len(one.pages) - one.written)):
            page = one.pages[one.written]
            assert not any(page in other.pages for other in self.holders if other is not one), "another one reads it"
            self.content[page] = one.content(one.written)
            one.written += 1
        if published:
            self.both("publish", one.pages, one.salt, one.tokens[: one.written])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), published=st.booleans())
    def end(self, data: st.DataObject, published: bool) -> None:
        one = self.holder(data)
        if one.promised or one.awaits:
            return
        self.holders.remove(one)
        promised = {page for other in self.holders for page in other.promised}
        self.both("free", one.pages, one.salt, one.tokens[: one.written] if published else [])
        doubted = self.damaged & set(one.pages)
        assert not doubted & self.cache._places.keys(), "published, though it may be damaged"
        self.forget_damage()
        if published and not doubted:
            for i in range(one.written):
                page = self.cache._find(one.salt, one.tokens[: i + 1], lambda page: True)[i]
                if page in promised:
                    break
                assert self.content[page] == one.content(i), "a page that was written is not found"

    @precondition(lambda self: self.holders)
    @rule()
    def distrust(self) -> None:
        self.both("distrust")
        self.damaged = {page for one in self.everybody for page in one.pages}
        for one in self.holders:
            one.promised, one.awaits = [], []
        assert (
            not self.cache._published
            and not self.cache._promised
            and self.cache.num_free == CAPACITY - len(self.damaged)
        )

    @invariant()
    def every_page_has_its_holders_and_one_state(self) -> None:
        cache = self.cache
        held = Counter(page for one in self.everybody for page in one.pages)
        assert cache._holders == held
        assert not held.keys() & cache._idle.keys() and len(held) + cache.num_free == CAPACITY
        assert set(cache._published.values()) == cache._places.keys() >= cache._idle.keys()
        assert len(cache._published) == len(cache._places) and not self.damaged & cache._places.keys()
        promised = [page for one in self.holders for page in one.promised]
        assert cache._promised == set(promised) <= cache._places.keys() and len(set(promised)) == len(promised)

    @invariant()
    def a_page_goes_before_those_that_it_needs(self) -> None:
        cache, ages = self.cache, list(self.cache._idle)
        by_node = {node: page for page, (_, node) in cache._places.items()}
        assert len(by_node) == len(cache._places)
        for page, ((before, _), _) in cache._places.items():
            if before in SALTS:
                continue
            parent = by_node[before]
            assert page in cache._promised or parent not in cache._promised, "kept behind one that is only promised"
            if page not in cache._promised:
                assert self.content[page][:-1] == self.content[parent]
            if page in cache._holders:
                assert parent in cache._holders, "held without the page before it"
            elif parent in cache._idle:
                assert ages.index(page) < ages.index(parent), "evicted before the page that needs it"

    def teardown(self) -> None:
        for one in reversed(self.holders):
            self.cache.retract(one.promised)
        for one in self.holders:
            self.cache.free(one.pages, one.salt, one.tokens[: one.written])
        for one in self.written:
            self.cache.free(one.pages)
        assert self.cache.num_free == CAPACITY and not self.cache._holders and not self.cache._doubtful
        found = self.cache.reserve(CAPACITY)
        assert found is not None and sorted(found[0]) == list(range(1, CAPACITY + 1)), "a page was lost"


def test_a_life_of_pages_keeps_every_invariant() -> None:
    run_state_machine_as_test(
        Life, settings=settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
    )


def test_what_was_used_last_stays_longest() -> None:
    cache = PageCache(5)
    for tokens in ([b"a", b"b"], [b"c", b"d"]):
        pages, _ = cache.reserve(2, "", tokens)
        cache.free(pages, "", tokens)
    pages, hits = cache.reserve(2, "", [b"a", b"b"])
    assert hits == 2 and cache.num_free == 2
    cache.free(pages, "", [b"a", b"b"])
    cache.reserve(3)
    assert cache.evictions == 3 and cache.reserve(1, "", [b"a"]) == (pages[:1], 1), "the first of those used last"


def test_a_page_that_is_found_is_no_free_page_too() -> None:
    cache, tokens = PageCache(5), [b"a", b"b"]
    pages, _ = cache.reserve(2, "", tokens)
    cache.free(pages, "", tokens)
    assert cache.num_free == 4 and cache.reserve(5, "", tokens) is None and cache.num_free == 4
    assert cache.reserve(4, "", tokens)[1] == 2


def test_a_promised_page_takes_no_other_ones_place() -> None:
    """Another prompt's own pages are ready first. They are let go of, and what follows on them is not kept."""
    cache, tokens = PageCache(9), [b"a", b"b"]
    pages, _ = cache.reserve(2, "", tokens)
    assert cache.promise(pages, "", tokens) == pages
    others, hits = cache.reserve(3, "", tokens)
    assert hits == 0
    cache.publish(others, "", [*tokens, b"c"])
    cache.free(others, "", [*tokens, b"c"])
    assert cache.num_free == 6 and set(cache._places) == set(pages)
    with pytest.raises(AssertionError, match="is promised"):
        cache.free(pages)


def test_a_cache_that_is_off_keeps_nothing() -> None:
    cache = PageCache(5, keeps=False)
    pages, _ = cache.reserve(2)
    cache.publish(pages, "", [b"a", b"b"])
    cache.free(pages, "", [b"a", b"b"])
    assert cache.reserve(2, "", [b"a", b"b"])[1] == 0 and not cache._places
    assert cache.stats() == {"cache_hit_tokens": 0, "cache_evictions": 0, "cache_idle_pages": 0}


def test_only_what_is_held_can_be_let_go_of() -> None:
    cache = PageCache(5)
    (page,), _ = cache.reserve(1)
    cache.free([page])
    for wrong in (page, NULL_PAGE):
        with pytest.raises(AssertionError, match="is not held"):
            cache.free([wrong])
