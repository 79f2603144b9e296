"""What a replica's cache has, and what the router takes it to have: the same, once all is reported.

Two ends: a page cache with its catalogue, and the router's `Known`. Between them messages, encoded and decoded.
"""

import random
import time
from array import array

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from disagg import catalogue as module
from disagg.catalogue import Catalogue
from disagg.control.messages import MOST_DIGESTS, Decoder, Kept, ToRouter, encode
from disagg.front import known
from disagg.front.known import REPORTS, Known
from disagg.page_cache import PageCache
from disagg.page_digest import DIGEST, following, page_digests, root
from disagg.request import Request
from disagg.scheduler import Sequence
from model.pages import PAGE

CAPACITY = 9
SALTS = ("", "mine")
PROMPTS = st.builds(
    lambda same, own: [token for page in [1] * same + own for token in [page] * PAGE],
    st.integers(0, 3),
    st.sampled_from([[], [1], [2], [2, 1]]),
)
decode = Decoder[ToRouter](ToRouter)


def told(catalogue: Catalogue) -> list[Kept]:
    """The news, as the router gets it."""
    return [decode(encode(message)) for message in catalogue.news()]


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache, self.router = PageCache(CAPACITY + 1), Known(CAPACITY)
        self.cache.catalogue = Catalogue()
        self.held: list[tuple[Sequence, str, list[int]]] = []

    def prefix(self, sequence: Sequence, salt: str) -> array:
        return page_digests(sequence.tokens, salt, CAPACITY)

    @rule(prompt=PROMPTS, salt=st.sampled_from(SALTS), promised=st.booleans())
    def come(self, prompt: list[int], salt: str, promised: bool) -> None:
        sequence = Sequence(Request(0, prompt or [1], 1))
        pages = sequence.page_tokens(len(prompt) // PAGE)
        found = self.cache.reserve(len(pages), salt, pages)
        if found is None:
            return
        do = self.cache.promise if promised else self.cache.publish
        do(found[0], salt, pages)
        self.router.bring(self.prefix(sequence, salt))
        self.held.append((sequence, salt, found[0]))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), good=st.booleans())
    def end(self, data: st.DataObject, good: bool) -> None:
        sequence, salt, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        (self.cache.fulfil if good else self.cache.retract)(pages)
        self.cache.free(pages, salt)
        self.router.brought(self.prefix(sequence, salt))

    @rule()
    def distrust(self) -> None:
        self.cache.distrust()

    @rule()
    def report(self) -> None:
        for message in told(self.cache.catalogue):
            self.router.hear(message)

    @rule()
    def restart(self) -> None:
        """Another router, which knows nothing."""
        self.router = Known(CAPACITY)
        for sequence, salt, _ in self.held:
            self.router.bring(self.prefix(sequence, salt))
        self.cache.catalogue.tell_all()

    @invariant()
    def what_is_on_its_way_counts(self) -> None:
        for sequence, salt, _ in self.held:
            prefix = self.prefix(sequence, salt)
            assert self.router.count(prefix) == len(prefix)

    def teardown(self) -> None:
        for sequence, salt, pages in self.held:
            self.cache.fulfil(pages)
            self.cache.free(pages, salt)
            self.router.brought(self.prefix(sequence, salt))
        self.report()
        for _ in range(REPORTS):
            self.router.hear(Kept())
        assert not self.router._coming and not self.router._lately
        assert self.router._reported == {
            int.from_bytes(digest, "little") for digest in self.cache.catalogue._digests.values()
        }
        for same in range(4):
            for own in ([], [1], [2], [2, 1]):
                for salt in SALTS:
                    sequence = Sequence(Request(0, [t for page in [1] * same + own for t in [page] * PAGE] or [1], 1))
                    prefix = self.prefix(sequence, salt)
                    there = len(self.cache._find(salt, sequence.page_tokens(len(prefix))))
                    assert self.router.count(prefix) == there


def test_the_router_knows_what_the_cache_has_once_all_is_reported() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, phases=[Phase.generate]
        ),
    )


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7])
def test_a_digest_covers_its_page_those_before_it_and_the_salt(length: int) -> None:
    rng = random.Random(length)
    prompt = [rng.randrange(2**31) for _ in range(length)]
    digests = page_digests(prompt, "", 100)
    assert len(digests) == length // PAGE and digests[:2] == page_digests(prompt, "", 2)
    for i in range(length):
        other = page_digests([*prompt[:i], prompt[i] ^ 1, *prompt[i + 1 :]], "", 100)
        assert [a == b for a, b in zip(digests, other, strict=True)] == [
            page < i // PAGE for page in range(len(digests))
        ]
    assert not set(digests) & set(page_digests(prompt, "mine", 100))


def test_many_pages_are_told_in_several_messages_and_the_first_one_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DIGESTS", 3)
    catalogue, router = Catalogue(), Known(100)
    router.hear(Kept(array("Q", [1, 2]).tobytes()))
    for node in range(7):
        catalogue.add(node, node - 1 if node else "", bytes([node]))
    catalogue.tell_all()
    messages = told(catalogue)
    assert [(len(one.got) // DIGEST, one.anew) for one in messages] == [(3, True), (3, False), (1, False)]
    for message in messages:
        router.hear(message)
    assert len(router._reported) == 7 and 1 not in router and not told(catalogue)
    catalogue.drop(6)
    catalogue.add(7, 5, b"7")
    (message,) = told(catalogue)
    assert (len(message.got), len(message.lost), message.anew) == (DIGEST, DIGEST, False)
    catalogue.clear()
    assert told(catalogue) == [Kept(anew=True)]


def test_a_page_that_is_reported_gone_does_not_count_although_a_request_brought_it_lately() -> None:
    """An idle replica may send no second report."""
    catalogue, router, page = Catalogue(), Known(9), int.from_bytes(following(root(""), b"page"), "little")
    catalogue.add(0, "", b"page")
    (there,) = told(catalogue)
    catalogue.drop(0)
    (gone,) = told(catalogue)
    router.hear(there)
    router.bring([page])
    router.brought([page])
    assert page in router
    router.hear(gone)
    assert page not in router
    router.bring([page])
    router.brought([page])
    assert page in router, "it may be there again, and its report under way"


def test_a_full_cache_never_seems_to_have_more_pages_than_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that goes and comes back is told where it went first: before the page that made room for it."""
    monkeypatch.setattr(module, "MOST_DIGESTS", 2)
    catalogue, router = Catalogue(), Known(4)
    for node in range(4):
        catalogue.add(node, "", bytes([node]))
    for message in told(catalogue):
        router.hear(message)
    for gone, node, tokens in ((0, 4, bytes([4])), (1, 5, bytes([0]))):
        catalogue.drop(gone)
        catalogue.add(node, "", tokens)
    for message in told(catalogue):
        router.hear(message)
    assert router._reported == {int.from_bytes(digest, "little") for digest in catalogue._digests.values()}


def test_a_cache_that_is_too_large_is_listed_in_part_and_always_from_the_start() -> None:
    catalogue = Catalogue(most=2)
    for node, before in ((0, ""), (1, 0), (2, 1), (3, 2)):
        catalogue.add(node, before, b"x")
    catalogue.drop(1)
    catalogue.add(4, 3, b"x")
    catalogue.add(5, 0, b"y")
    assert set(catalogue._digests) == {0, 5}


def test_a_report_that_cannot_be_true_is_refused_and_takes_bounded_memory() -> None:
    router, full = Known(3), array("Q", [1, 2, 3]).tobytes()
    router.hear(Kept(full))
    router.hear(Kept(full))
    with pytest.raises(ValueError, match="4 cached pages; there can be 3"):
        router.hear(Kept(array("Q", [4]).tobytes()))
    assert not router._reported
    router.hear(Kept(full))
    with pytest.raises(ValueError, match="9 and 0 bytes are no whole digests"):
        router.hear(Kept(bytes(9)))
    assert not router._reported
    with pytest.raises(ValueError, match="1 cached pages; there can be 0"):
        Known(0).hear(Kept(array("Q", [4]).tobytes()))
    with pytest.raises(ValueError, match="not a message"):
        decode(encode(Kept(bytes(DIGEST * (MOST_DIGESTS + 1)))))


def test_what_was_sent_is_bounded_even_if_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pages of a prompt go before the first ones, so that what is left is found."""
    monkeypatch.setattr(known, "MOST_LATELY", 5)
    router = Known(100)
    for prefix in ([1, 2, 3], [4, 5, 6]):
        router.bring(prefix)
        router.brought(prefix)
    assert len(router._lately) == 5 and (router.count([1, 2, 3]), router.count([4, 5, 6])) == (2, 3)
    nothing = Known(0)
    nothing.bring([1])
    assert nothing.count([1]) == 0
    nothing.brought([1])


def test_digests_cost_little() -> None:
    """Of a prompt of 2,000 tokens: well under a millisecond, and 248 bytes of a report."""
    prompt, times = list(range(2000)), []
    for _ in range(20):
        began = time.perf_counter()
        digests = page_digests(prompt, "", 256)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3 and len(digests) * DIGEST == 248
