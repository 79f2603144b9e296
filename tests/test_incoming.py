"""Rooms that promise pages to one another, under any order of what links, the router and requests do.

A decode role without a model. Its links are played by the test, which writes the content of each page: the salt, the
page's tokens, and those of all pages before it. What a request starts with must be its own prompt. No page is written
while another request may read it. No page and no request is lost, and no room waits for ever. A link that goes down may
write a room's pages until it ends the room, and says at once that it has failed.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from disagg.control.messages import Abort, Forget, Member, Submit
from disagg.decode import Decode
from disagg.handoff.protocol import Cancel, Join, RoomEnded, RoomFailed, RoomState
from disagg.handoff.receive_link import Pieces
from disagg.page_cache import PageCache
from disagg.request import Request
from disagg.scheduler import Scheduler
from model.pages import PAGE, pages_for
from tests.news import singly

CAPACITY, RANKS = 14, 2
# A token per page. Most prompts begin alike.
PROMPTS = st.builds(lambda same, own: [1] * same + own, st.integers(0, 4), st.sampled_from([[], [1], [2], [2, 1]]))
Content = tuple[Any, ...]


@dataclass
class FakeLink:
    """Keeps what it is told."""

    peer: Member
    generation: int
    told: list[Any] = field(default_factory=list)
    experts: Pieces = field(default_factory=lambda: Pieces("chosen experts"))
    prompt_rows: Pieces = field(default_factory=lambda: Pieces("prompt log probabilities"))
    in_flight = 0
    is_down = False

    def put(self, command: Any) -> None:
        self.told.append(command)

    def stop(self) -> None:
        self.is_down = True


def make_decode(capacity: int = CAPACITY) -> Decode:
    """The first rank of a replica of RANKS."""
    scheduler = Scheduler(PageCache(capacity + 1), 4, 64, capacity * PAGE)
    engine: Any = SimpleNamespace(
        scheduler=scheduler,
        release=scheduler.release,
        mesh=SimpleNamespace(attn=SimpleNamespace(rank=0)),
        settings=SimpleNamespace(speculate=0),
        config=SimpleNamespace(vocab_size=100, eos_token_ids=()),
    )
    endpoint: Any = None
    role = Decode(engine, [Member(str(rank), "") for rank in range(RANKS)], endpoint)
    role.links._make = FakeLink
    return role


@dataclass
class Sender:
    """What prefill still has to do for a room."""

    link: FakeLink
    pages: list[int]  # of this rank that it has yet to fill, from the first
    open: set[int] = field(default_factory=lambda: set(range(RANKS)))  # links where the room has not ended
    failed: bool = False


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.decode = make_decode()
        self.requests: dict[int, Request] = {}  # every one, by uid
        self.rooms: dict[int, Sender] = {}
        self.written: dict[int, Sender] = {}  # rooms that failed, and whose pages may still be written
        self.content: dict[int, Content] = {}  # by page: what was written to it last
        self.fate: dict[int, str] = {}  # of the requests that are not here any more
        self.begun: set[int] = set()
        self.heard: dict[str, int] = {}  # by link: what it was told so far

    def content_of(self, request: Request, page: int) -> Content:
        return request.cache_salt, *request.prompt[: (page + 1) * PAGE]

    # -- what the router does

    @rule(
        several=st.lists(PROMPTS, min_size=1, max_size=4),
        more=st.integers(0, 1),
        salt=st.sampled_from(["", "", "mine"]),
        peer=st.sampled_from([0, 0, 1]),
    )
    def submit(self, several: list[list[int]], more: int, salt: str, peer: int) -> None:
        """`more`: tokens behind the last whole page."""
        for pages in several:
            uid, prompt = len(self.requests), [token for page in pages for token in [page] * PAGE] + [3] * more
            self.requests[uid] = request = Request(uid, prompt or [3], 4, cache_salt=salt)
            self.decode.handle(Submit(request, [Member(f"peer {peer}", "")]))
        self.look()

    def some(self, data: st.DataObject, uids: Any) -> int:
        return data.draw(st.sampled_from(sorted(uids)))

    @precondition(lambda self: len(self.fate) < len(self.requests))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        uid = self.some(data, self.requests.keys() - self.fate.keys())
        self.fate[uid] = "aborted"
        self.decode.handle(Abort(uid))
        self.look()

    @precondition(lambda self: self.rooms)
    @rule(data=st.data(), what=st.sampled_from(["nothing"] * 6 + ["a new session", "damage", "a link goes down"]))
    def trouble(self, data: st.DataObject, what: str) -> None:
        if what == "a new session":
            for uid in self.requests.keys() - self.fate.keys():
                self.fate[uid] = "aborted"
            self.decode.handle(Forget())
        elif what == "damage":
            self.decode.scheduler.cache.distrust()
        elif what == "a link goes down":  # then all of the replica's links to that peer are given up
            link = self.rooms[self.some(data, self.rooms)].link
            for uid in [uid for uid, room in self.rooms.items() if room.link is link]:
                room = self.rooms.pop(uid)
                writing = data.draw(st.sets(st.sampled_from(sorted(room.open))))
                for rank in sorted(room.open):
                    if rank in writing:
                        self.decode.handle(RoomFailed(uid, "link down"))
                    else:
                        self.decode.handle(RoomEnded(uid, "link down", link_down=True))
                if writing:
                    room.open = writing
                    self.written[uid] = room
            self.look()
            assert self.written.keys() <= self.fate.keys(), "a failure was not told at once"
        self.look()

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def write_late(self, data: st.DataObject) -> None:
        uid = self.some(data, self.written)
        room, role = self.written[uid], self.decode
        for page in room.pages:
            assert page not in role.scheduler.cache._places, "others find it"
            for other in (*role.sequences.values(), *(one.sequence for one in role.incoming if not one.cancelled)):
                assert other.uid == uid or page not in other.pages, "it is somebody else's"
            self.content[page] = "late", uid

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def end_writing(self, data: st.DataObject) -> None:
        self.end_late(self.some(data, self.written))

    def end_late(self, uid: int) -> None:
        room = self.written[uid]
        room.open.pop()
        if not room.open:
            del self.written[uid]
        self.decode.handle(RoomEnded(uid, "link down", link_down=True))
        self.look()

    # -- what links do

    @precondition(lambda self: self.rooms)
    @rule(data=st.data(), count=st.integers(1, 5))
    def fill(self, data: st.DataObject, count: int) -> None:
        uid = self.some(data, self.rooms)
        self.arrive(uid, count)

    def arrive(self, uid: int, count: int) -> None:
        """The next pages of a room come over this rank's link."""
        room = self.rooms[uid]
        if 0 not in room.open:
            return
        arrival = self.decode.incoming[uid]
        for page in room.pages[:count]:
            for sequence in self.decode.sequences.values():
                assert page not in sequence.pages, "it is read"
            for other in self.decode.incoming:
                if other is not arrival and page in other.sequence.pages:
                    assert arrival in other.awaits or other.cancelled, "another room counts on it"
            self.content[page] = self.content_of(self.requests[uid], arrival.sequence.pages.index(page))
        del room.pages[:count]

    @precondition(lambda self: self.rooms)
    @rule(data=st.data(), error=st.sampled_from([None] * 7 + ["cut"]), rank=st.integers(0, RANKS - 1))
    def end(self, data: st.DataObject, error: str | None, rank: int) -> None:
        uid = self.some(data, self.rooms)
        if rank in self.rooms[uid].open:
            self.end_link(uid, rank, error)

    def end_link(self, uid: int, rank: int, error: str | None) -> None:
        if error is None:
            self.arrive(uid, CAPACITY)
        room = self.rooms[uid]
        room.open.remove(rank)
        room.failed |= error is not None
        if not room.open:
            del self.rooms[uid]
        self.decode.handle(RoomEnded(uid, error, 9))
        self.look()

    # -- what comes of it

    def look(self) -> None:
        """Open rooms, and read the news."""
        self.decode.admit()
        news = self.decode.news()
        for link in [*self.decode.links._links.values(), *self.decode.links._dropped.values()]:
            name = f"{link.peer.id}, {link.generation}"
            for command in link.told[self.heard.get(name, 0) :]:
                if isinstance(command, Join):
                    request, opening = self.requests[command.uid], command.opening
                    whole = opening.pages[: pages_for(len(request.prompt))]
                    assert command.pages == whole[opening.have :] and opening.have <= (len(request.prompt) - 1) // PAGE
                    self.rooms[command.uid] = Sender(link, list(command.pages))
                else:
                    assert isinstance(command, Cancel)
            self.heard[name] = len(link.told)
        if news is None:
            return
        self.begun |= set(news.begun)
        for uid in news.returned:
            assert uid not in self.fate and uid in self.begun
            self.fate[uid] = "returned"
        for update in singly(news.updates):
            assert update.uid not in self.fate, self.fate[update.uid]
            if update.error is not None:
                assert update.retry
                self.fate[update.uid] = "failed"
                continue
            assert update.tokens == [9]
            request, sequence = self.requests[update.uid], self.decode.sequences[update.uid]
            for i in range(pages_for(len(request.prompt))):
                assert self.content[sequence.pages[i]] == self.content_of(request, i), "not its own prompt"

    @invariant()
    def nothing_is_lost(self) -> None:
        role, cache = self.decode, self.decode.scheduler.cache
        rooms = list(role.incoming)
        here = {*role.sequences, *(one.uid for one in rooms), *(one.sequence.uid for one in role.queue)}
        assert self.requests.keys() - self.fate.keys() <= here
        held = {page for one in (*role.sequences.values(), *(one.sequence for one in rooms)) for page in one.pages}
        assert cache._holders.keys() == held and len(held) + cache.num_free == CAPACITY
        assert cache._promised <= held & cache._places.keys()
        promised = [page for one in rooms for page in one.promised]
        assert role.incoming._promises.keys() == set(promised) and len(set(promised)) == len(promised)
        assert cache._promised <= set(promised), "nobody will keep it"
        by_node = {node: page for page, (_, node) in cache._places.items()}
        for page, ((before, _), _) in cache._places.items():
            if before in ("", "mine"):
                continue
            parent = by_node[before]
            assert parent not in cache._promised or page in cache._promised, "published behind a promised page"
        for one in rooms:
            assert all(other in rooms[: rooms.index(one)] for other in one.awaits), "it awaits what is over or later"
            assert not one.promised or (one.room.state != RoomState.FAILED and not one.cancelled)
            here = one.uid in self.rooms or one.uid in self.written
            assert here or (one.awaits and one.is_good), "it waits for nothing"
        assert self.written.keys() <= {one.uid for one in rooms}, "its pages were let go of too early"

    def teardown(self) -> None:
        """The last room ends first, so rooms wait for one another as long as they can."""
        while self.rooms:
            uid = max(self.rooms)
            self.end_link(uid, max(self.rooms[uid].open), None)
        role = self.decode
        for uid in list(role.sequences):
            role.handle(Abort(uid))
        while self.written:
            self.end_late(min(self.written))
        for _ in self.requests:  # in each round at least one ends
            self.look()
            for uid in sorted(self.rooms):
                for rank in sorted(self.rooms[uid].open):
                    self.end_link(uid, rank, None)
            for uid in list(role.sequences):
                role.handle(Abort(uid))
            for uid in sorted(self.written):
                self.end_late(uid)
        cache = role.scheduler.cache
        assert not len(role.incoming) and cache.num_free == CAPACITY and not cache._promised
        assert role.scheduler.cache.reserve(CAPACITY) is not None


def test_no_order_of_events_loses_or_mixes_what_rooms_promise() -> None:
    run_state_machine_as_test(
        Life, settings=settings(max_examples=70, stateful_step_count=40, deadline=None, derandomize=True)
    )


# ---- one story at a time


def opened(role: Decode, uid: int, peer: str = "peer 0", pages: int = 3) -> tuple[int, list[int]]:
    """Begin a request that begins like all others. How many pages it need not get, and its pages."""
    role.handle(Submit(Request(uid, [7] * (pages * PAGE) + [uid], 4), [Member(peer, "")]))
    role.admit()
    (join,) = (one for link in role.links._links.values() for one in link.told if one.uid == uid)
    return join.opening.have, join.opening.pages


def end(role: Decode, uid: int, error: str | None = None) -> None:
    for _ in range(RANKS):
        role.handle(RoomEnded(uid, error, 9))


def cancelled(role: Decode) -> list[int]:
    return [one.uid for link in role.links._links.values() for one in link.told if isinstance(one, Cancel)]


def started(role: Decode) -> list[int]:
    return [update.uid for update in singly(role.news().updates) if update.tokens]


def test_pages_on_their_way_are_sent_once_and_read_when_they_are_there() -> None:
    """A room whose own pages came first waits for them. The next ones find them as usual."""
    role = make_decode()
    (have, first), (others, second), (more, third) = opened(role, 0), opened(role, 1), opened(role, 2, pages=2)
    assert (have, others, more) == (0, 3, 2) and first[:3] == second[:3] and third[:2] == first[:2]
    assert not set(first[3:]) & set(second[3:])
    for uid in (2, 1):
        end(role, uid)
        assert not role.sequences
    end(role, 0)
    assert started(role) == [0, 1, 2] and not len(role.incoming)
    assert opened(role, 3)[0] == 3 and not role.incoming[3].awaits


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("what", ["failed", "aborted", "failed on one link"])
def test_a_room_that_does_not_keep_its_promise_sends_the_others_back_to_the_router(what: str, done: bool) -> None:
    """Also those that await it by a room between, and those that had all that was their own."""
    role = make_decode()
    assert [opened(role, uid, pages=pages)[0] for uid, pages in ((0, 1), (1, 3), (2, 3))] == [0, 1, 3]
    if done:
        end(role, 1)
        end(role, 2)
    role.news()
    if what == "failed on one link":
        role.handle(RoomEnded(0, "cut"))
    elif what == "failed":
        end(role, 0, "cut")
    else:
        role.handle(Abort(0))
    assert cancelled(role) == ([0] if what == "aborted" else []) + [2, 1]
    assert opened(role, 3)[0] == 0, "nothing is promised any more"
    if what != "failed":
        role.handle(RoomEnded(0, None if what == "failed on one link" else "cancelled", 9))
    if what == "aborted":
        role.handle(RoomEnded(0, "cancelled"))
    if not done:
        end(role, 1, "cancelled")
        end(role, 2)
    news = role.news()
    assert [update.uid for update in news.updates] == ([] if what == "aborted" else [0])
    assert news.returned == [1, 2] and news.begun == [3] and role.failures == (what != "aborted")
    end(role, 3)
    assert started(role) == [3]
    role.handle(Abort(3))
    assert role.scheduler.cache.num_free == CAPACITY


def make_awaiting() -> Decode:
    """A role whose room 1 has all its own KV, and awaits room 0."""
    role = make_decode()
    opened(role, 0)
    opened(role, 1)
    end(role, 1)
    role.news()
    return role


def test_a_room_that_has_all_its_own_ends_as_soon_as_nobody_wants_it() -> None:
    """The room that it awaits may take long."""
    role = make_awaiting()
    free = role.scheduler.cache.num_free
    role.handle(Abort(1))
    assert 1 not in role.incoming and role.scheduler.cache.num_free == free + 1
    assert role.load().unwanted_pages == 0


def test_a_room_that_has_all_its_own_returns_at_the_first_error_of_the_one_that_it_awaits() -> None:
    """The other links of that one may take long."""
    role = make_awaiting()
    role.handle(RoomEnded(0, "cut"))
    news = role.news()
    assert news is not None and news.returned == [1] and not news.updates
    assert 0 in role.incoming, "its other link may still write"


def test_a_new_session_ends_what_only_awaits_another_room_and_says_nothing_of_it() -> None:
    role = make_awaiting()
    role.handle(Forget())
    assert [one.uid for one in role.incoming] == [0] and role.news() is None


def test_a_link_that_goes_down_fails_the_rooms_of_both() -> None:
    role = make_decode()
    opened(role, 0)
    assert opened(role, 1)[0] == 3
    for uid in (0, 1):
        for _ in range(RANKS):
            role.handle(RoomEnded(uid, "link down", link_down=True))
    news = role.news()
    assert [(update.uid, update.retry, update.link_down) for update in news.updates] == [
        (0, True, True),
        (1, True, True),
    ]
    assert not news.returned and role.scheduler.cache.num_free == CAPACITY


def test_a_room_that_may_still_be_written_is_told_as_failed_at_once_and_keeps_its_pages() -> None:
    """On one link of two. The room that awaits it is over at once, and nobody else gets the pages meanwhile."""
    role = make_decode()
    _, pages = opened(role, 0)
    assert opened(role, 1)[0] == 3
    role.news()
    role.handle(RoomFailed(0, "link down"))
    assert [(update.uid, update.error, update.retry, update.link_down) for update in role.news().updates] == [
        (0, "link down", True, True)
    ]
    assert cancelled(role) == [1], "it counts on pages that will not come"
    assert all(link.is_down for link in role.links._links.values()), "those of the replica's other ranks end, too"
    for uid in (0, 1, 1):
        role.handle(RoomEnded(uid, "link down", link_down=True))
    news = role.news()
    assert [update.uid for update in news.updates] == [1] and not news.returned and role.failures == 2
    assert [one.uid for one in role.incoming] == [0] and role.load().unwanted_pages == len(pages)
    assert role.scheduler.cache.num_free == CAPACITY - len(pages)
    role.handle(Submit(Request(2, [8] * ((CAPACITY - 1) * PAGE), 4), [Member("peer 1", "")]))
    role.admit()
    assert role.news() is None and len(role.queue) == 1, "it got pages that are still written"
    role.handle(RoomEnded(0, "link down", link_down=True))
    role.admit()
    news = role.news()
    assert news.begun == [2] and not news.updates and [one.uid for one in role.incoming] == [2]


def test_a_room_that_is_done_does_not_wait_for_the_end_of_a_write_to_the_one_that_it_awaits() -> None:
    role = make_decode()
    opened(role, 0)
    assert opened(role, 1)[0] == 3
    end(role, 1)
    role.news()
    role.handle(RoomFailed(0, "link down"))
    news = role.news()
    assert news.returned == [1] and [update.uid for update in news.updates] == [0]
    assert [one.uid for one in role.incoming] == [0]


@pytest.mark.parametrize("first", ["aborted", "link down"])
def test_of_an_aborted_room_nothing_is_told_when_its_link_goes_down_amid_a_write(first: str) -> None:
    role = make_decode()
    opened(role, 0)
    role.news()
    events = [Abort(0), RoomFailed(0, "link down")]
    for event in events if first == "aborted" else reversed(events):
        role.handle(event)
    news = role.news()
    assert (news is None) == (first == "aborted") and role.failures == (first != "aborted")
    role.handle(Forget())
    assert [one.uid for one in role.incoming] == [0] and not role.is_waiting
    end(role, 0, "link down")
    assert role.news() is None and role.scheduler.cache.num_free == CAPACITY


def test_rooms_of_other_links_are_not_awaited() -> None:
    """Their prompt may be computed much later, or never."""
    role = make_decode()
    assert [opened(role, 0)[0], opened(role, 1, "peer 1")[0]] == [0, 0]
    role.renew_links(["peer 0"])
    assert opened(role, 2)[0] == 0, "the links that follow"
    end(role, 1)
    assert started(role) == [1]
    role.handle(Abort(1))
    end(role, 0)
    assert opened(role, 3)[0] == 3


@pytest.fixture
def little_stack() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("error", [None, "cut"])
@pytest.mark.usefixtures("little_stack")
def test_a_long_chain_of_rooms_ends(error: str | None) -> None:
    """Each awaits all those before it. They are done in the reverse order, and the first one may fail."""
    role, count = make_decode(capacity=10_000), 100
    for uid in range(count):
        opened(role, uid, pages=uid + 1)
    assert len(role.incoming[count - 1].awaits) == count - 1
    for uid in reversed(range(count)):
        end(role, uid, None if uid else error)
    news = role.news()
    assert news.returned == (list(range(1, count)) if error else []) and not len(role.incoming)
    assert len(news.updates) == (1 if error else count)
