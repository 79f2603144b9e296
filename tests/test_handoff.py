"""The KV handoff over real links.

Pages arrive at their places bit for bit. Every room ends exactly once on either side, whichever messages cross. After
the end nothing writes its pages.
"""

import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from disagg.control.messages import Member
from disagg.handoff.connect import Door, dial, link_key, listen
from disagg.handoff.credits import IN_FLIGHT, Credits
from disagg.handoff.endpoints import TRANSPORTS, Handoff
from disagg.handoff.link import Link
from disagg.handoff.links import Links
from disagg.handoff.pipe import Pipe
from disagg.handoff.protocol import (
    Cancel,
    Chosen,
    Closed,
    Command,
    Join,
    Last,
    Message,
    Open,
    Read,
    Room,
    RoomEnded,
    RoomFailed,
    RoomState,
    Scored,
    Sending,
    SendLast,
    SendPages,
)
from disagg.handoff.receive_link import ReceiveLink
from disagg.handoff.send_link import SendLink
from disagg.handoff.transport import Endpoint, Transfer
from disagg.handoff.transports.torch_dist import TorchEndpoint, TorchTransport
from disagg.request import Request
from model.pages import PAGE, PageAllocator
from tests.conftest import ROOT, eventually
from tests.processes import fork_server

CPU = torch.device("cpu")
HOST = "127.0.0.1"
TORCH = TorchEndpoint(CPU, HOST)
MADE: list["Rank"] = []  # those that no test is using; to make an endpoint takes half a second
LAYERS, WIDTH, NUM_PAGES = 2, 24, 16
CANARY = -7.5
SOON = 20  # seconds; nothing here takes one
OF_A_LINK = 3  # transfers of a lone link in flight


# ---- rooms

OPS = st.one_of(
    st.tuples(st.just("rise"), st.sampled_from((RoomState.WAITING, RoomState.TRANSFERRING))),
    st.tuples(st.just("fail"), st.just("broken")),
    st.tuples(st.just("end_link"), st.sampled_from((None, None, "cut"))),
)


@given(st.integers(1, 4), st.lists(OPS, max_size=12))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_a_room_only_rises_or_fails_and_lets_go_of_its_pages_last(links: int, ops: list[tuple[str, Any]]) -> None:
    room = Room(links)
    seen, ends, errors = [room.state], [], []
    for name, value in ops:
        try:
            getattr(room, name)(value)
        except AssertionError:
            illegal_rise = name == "rise" and value < room.state
            assert illegal_rise or len(ends) == links, f"{name}({value}) was refused in {room.state.name}"
            assert room.state == seen[-1], "refused, and yet done"
            continue
        seen.append(room.state)
        if name == "end_link":
            ends.append(value)
        if name != "rise" and value is not None:
            errors.append(value)
        assert room.may_release == (len(ends) == links)
        assert (room.state == RoomState.FAILED) == bool(errors)
        assert room.error == (errors[0] if errors else None)
        assert (room.state == RoomState.DONE) == (ends == [None] * links and not errors)
    for before, after in zip(seen, seen[1:], strict=False):
        assert after == RoomState.FAILED or (before != RoomState.FAILED and after >= before)


def test_a_link_that_ends_a_room_twice_is_caught() -> None:
    room = Room(1)
    room.end_link(None)
    with pytest.raises(AssertionError, match="twice"):
        room.end_link(None)


def test_a_room_that_failed_on_one_link_keeps_its_pages_until_the_other_has_ended() -> None:
    room = Room(2)
    room.end_link("cut")
    assert room.state == RoomState.FAILED and not room.may_release
    room.end_link(None)
    assert room.state == RoomState.FAILED and room.may_release


# ---- a pair of links in one process


def make_pool(value: float | None, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (LAYERS, NUM_PAGES, PAGE, WIDTH)
    return torch.randn(shape).to(dtype) if value is None else torch.full(shape, value, dtype=dtype)


@dataclass
class End:
    """One side: its pool, its link, and what it heard from it."""

    pool: Tensor
    link: Link
    events: queue.SimpleQueue
    endings: list[RoomEnded] = field(default_factory=list)

    def hear(self, within: float = SOON) -> Any:
        event = self.events.get(timeout=within)
        if isinstance(event, RoomEnded):
            self.endings.append(event)
        return event

    def hear_end(self, uid: int, error: str | None = None, within: float = SOON) -> RoomEnded:
        """The next event must be that this room ended, with an error that contains this (or with none)."""
        event = self.hear(within)
        assert isinstance(event, RoomEnded) and event.uid == uid, event
        assert (event.error is None) == (error is None) and (error or "") in (event.error or ""), event
        return event

    def hear_failure(self, uid: int, error: str) -> None:
        """The next event must be that this room failed, and has not ended."""
        event = self.hear()
        assert isinstance(event, RoomFailed) and event.uid == uid and error in event.error, event

    def hear_bad_end(self, uid: int, error: str) -> RoomEnded:
        """The same error may come twice: when the room fails, and when it ends."""
        event = self.hear()
        if isinstance(event, RoomFailed):
            assert event.uid == uid and error in event.error, event
            return self.hear_end(uid, event.error)
        assert isinstance(event, RoomEnded) and event.uid == uid and error in (event.error or ""), event
        return event

    def hear_open(self, uid: int) -> Open:
        event = self.hear()
        assert isinstance(event, Open) and event.request.uid == uid, event
        return event

    def say(self, message: Message) -> None:
        """Through the link's own thread, which alone may use its pipe."""
        handle, said = self.link.handle, threading.Event()

        def handling(item: Any) -> None:
            if item is message:
                self.link.pipe.send(message)
                said.set()
            else:
                handle(item)

        self.link.handle = handling
        self.link.put(message)
        assert said.wait(SOON)

    def hush(self) -> None:
        """No more is to be heard, not even when the link stops."""
        self.link.stop()
        self.link.join(SOON)
        assert not self.link.is_alive(), "stop() did not end the thread"
        assert self.events.empty(), f"one more: {self.events.get()}"


@dataclass
class Pair:
    prefill: End
    decode: End
    me: Member

    def opening(self, uid: int, pages: list[int]) -> Join:
        return Join(uid, Open(Request(uid, [1, 2, 3]), pages, [self.me]), pages=pages)

    def open(self, uid: int, pages: list[int]) -> None:
        """A room that both sides have joined."""
        self.decode.link.put(self.opening(uid, pages))
        assert self.prefill.hear_open(uid).pages == pages
        self.prefill.link.put(Join(uid))

    def sync(self, uid: int) -> None:
        """What the decode side put before has reached the prefill link when this returns; leaves a room `uid` open."""
        self.decode.link.put(self.opening(uid, [NUM_PAGES - 1]))
        self.prefill.hear_open(uid)

    def hush(self) -> None:
        for end in (self.prefill, self.decode):
            end.hush()


def obstacle(library: str) -> str | None:
    """Return why the transport's library cannot be used here, or None."""
    try:
        Handoff(library).check(CPU)
    except ValueError as error:
        return str(error)
    return None


@dataclass
class Rank:
    """A process, as it were: several links may share its endpoint. Their pools lie in its registered memory."""

    library: str
    endpoint: Endpoint
    memory: Tensor
    credits: Credits = field(default_factory=Credits)
    taken: int = 0  # bytes of the memory

    def pool(self, value: float | None, dtype: torch.dtype = torch.float32) -> Tensor:
        pool = make_pool(value, dtype)
        start, self.taken = self.taken, self.taken + pool.nbytes
        return self.memory[0, 0, start : self.taken].view(dtype).view(pool.shape).copy_(pool)


def make_rank(library: str) -> Rank:
    """A rank that no other links use. Skips the test without the transport's package."""
    if why_not := obstacle(library):
        pytest.skip(why_not)
    for i, made in enumerate(MADE):
        if made.library == library:
            del MADE[i]
            return replace(made, credits=Credits(), taken=0)
    memory = torch.empty(1, 1, 2**24, dtype=torch.uint8)  # of one large page: a buffer has all pages of any test
    return Rank(library, Handoff(library).make_endpoint(HOST, memory), memory)


@pytest.fixture(params=TRANSPORTS)
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_pair(library: str) -> Iterator[Any]:
    """`make_pair.library`: how its pairs move bytes."""
    pairs: list[Pair] = []
    doors = []  # a door's store ends with it
    used: list[Rank] = []

    def one_more() -> Rank:
        used.append(make_rank(library))
        return used[-1]

    def make(
        dtype: torch.dtype = torch.float32,
        name: str = "d",
        rank: Rank | None = None,
        decode_rank: Rank | None = None,
        checksums: bool = False,
    ) -> Pair:
        """`rank`: the prefill rank, if it has other links."""
        doors.append(door := Door(HOST))
        prefill, decode = Member("p", HOST, door.port, door.store.port), Member(name, HOST)
        theirs, ours = queue.SimpleQueue(), queue.SimpleQueue()
        here, there = decode_rank or one_more(), rank or one_more()
        pool = here.pool(CANARY, dtype)
        knock_and_meet = dial(prefill, decode, here.endpoint)
        receive = ReceiveLink(link_key(prefill, decode), knock_and_meet, pool, ours, here.credits)
        (knock,) = door.poll(SOON * 1000)
        assert knock.decode == decode
        source = there.pool(None, dtype)
        connect = listen(door.store.port, HOST, there.endpoint)
        key = link_key(prefill, knock.decode)
        send = SendLink(key, connect, source, theirs, there.credits, checksums=checksums)
        pairs.append(Pair(End(source, send, theirs), End(pool, receive, ours), decode))
        return pairs[-1]

    make.rank, make.library = one_more, library
    yield make
    over = True
    for pair in pairs:
        for end in (pair.prefill, pair.decode):
            end.link.stop()
            end.link.join(1)
            if library == "torch":
                end.link._transport = None  # a peer that is still inside a transfer sees it end
            else:
                end.link._mover.join(SOON)
                over &= not end.link._mover.is_alive()
    assert over or library == "torch", "a transfer never ended"
    MADE.extend(used)


def torch_only(test: Any) -> Any:
    """Of a two-sided transport: it breaks it by hand, waits inside it, or hears `Last` before the bytes are there."""
    return pytest.mark.parametrize("library", ["torch"], indirect=True)(test)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_pages_arrive_bit_by_bit_where_they_belong_and_nowhere_else(make_pair: Any, dtype: torch.dtype) -> None:
    pair = make_pair(dtype)
    pair.prefill.pool[:, 3, ::5] = float("nan")
    pair.prefill.pool[:, 5, ::7] = float("-inf")
    pair.open(1, [9, 14, 2, 4])
    for mine, theirs in (([3], [9]), ([11, 5], [14, 2]), ([1], [4])):
        pair.prefill.link.put(SendPages(1, mine, theirs))
    known = time.perf_counter() - 100
    pair.prefill.link.put(SendLast(1, 77, [(77, -0.25), (3, -1.5)], 0.25, known))
    ended = pair.decode.hear_end(1)
    assert (ended.token, ended.logprobs, ended.link_down) == (77, [(77, -0.25), (3, -1.5)], False)
    assert ended.prefill == 0.25 and 100 < ended.transfer < 100 + SOON and 0 < ended.at - known < 100 + SOON
    pair.prefill.hear_end(1)
    assert bits(pair.decode.pool[:, [9, 14, 2, 4]]).equal(bits(pair.prefill.pool[:, [3, 11, 5, 1]]))
    others = [page for page in range(NUM_PAGES) if page not in (9, 2, 14, 4)]
    assert (pair.decode.pool[:, others] == CANARY).all()
    size = 4 * LAYERS * PAGE * WIDTH * dtype.itemsize
    assert pair.prefill.link.bytes_moved == pair.decode.link.bytes_moved == size
    pair.hush()


@pytest.mark.parametrize("checksums", (False, True))
def test_only_nixl_reads_from_the_pool_itself(make_pair: Any, checksums: bool) -> None:
    """The other transports pack. A checksum is of the same bytes either way."""
    pair, packed = make_pair(checksums=checksums), []
    link = pair.prefill.link
    pack = link._pack_pages
    link._pack_pages = lambda *args: (packed.append(len(args[1])), pack(*args))
    pair.open(1, [9, 2, 3])
    link.put(SendPages(1, [3, 4, 1], [9, 2, 3]))
    link.put(SendLast(1, 7, []))
    pair.decode.hear_end(1)
    pair.prefill.hear_end(1)
    assert pair.decode.pool[:, [9, 2, 3]].equal(pair.prefill.pool[:, [3, 4, 1]])
    assert packed == ([] if make_pair.library == "nixl" else [3])
    pair.hush()


class Gate:
    """Until it is opened no transfer that a link has started is through."""

    def __init__(self, link: Link) -> None:
        self.opened, self.started = threading.Event(), []  # the latter: pages of each transfer
        send, recv = link.transport.send, link.transport.recv
        link.transport.send = lambda x, pages: (self.held(len(pages or x[0]), (sent := send(x, pages))[0]), sent[1])
        link.transport.recv = lambda x, location, pages: self.held(len(pages or x[0]), recv(x, location, pages))

    def held(self, pages: int, transfer: Transfer) -> Transfer:
        self.started.append(pages)
        wait = transfer.wait
        transfer.wait = lambda: self.opened.wait(SOON) and wait()
        return transfer

    def await_start(self, count: int) -> None:
        assert eventually(lambda: len(self.started) >= count, SOON)
        time.sleep(0.2)


class Ready:
    """A step's event, which has come when it is set."""

    def __init__(self) -> None:
        self.come = threading.Event()
        self.query = self.come.is_set

    def synchronize(self) -> None:
        assert self.come.wait(SOON)


def limit_transfers(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    monkeypatch.setattr("disagg.handoff.credits.MOST_BYTES", pages * make_pool(0.0)[:, 0].nbytes)


@pytest.mark.parametrize("side", ("prefill", "decode"))
def test_the_next_transfers_start_while_one_is_under_way_and_no_more_than_a_link_may(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    limit_transfers(monkeypatch, 1)
    pair, count = make_pair(), OF_A_LINK + 2
    theirs, mine = list(range(4, 4 + count)), list(range(1, 1 + count))
    pair.open(1, theirs)
    gate = Gate(getattr(pair, side).link)
    for pages in zip(mine, theirs, strict=True):
        pair.prefill.link.put(SendPages(1, *([page] for page in pages)))
    pair.prefill.link.put(SendLast(1, 7, []))
    gate.await_start(OF_A_LINK)
    assert gate.started == [1] * OF_A_LINK and pair.decode.events.empty()
    gate.opened.set()
    assert pair.decode.hear_end(1).token == 7
    assert torch.equal(pair.decode.pool[:, theirs], pair.prefill.pool[:, mine])
    pair.prefill.hear_end(1)
    pair.hush()


def test_what_is_ready_while_the_wire_is_busy_shares_a_transfer_up_to_the_limit(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_transfers(monkeypatch, 3)
    pair, not_computed = make_pair(), threading.Event()
    not_computed.query, not_computed.synchronize = not_computed.is_set, lambda: not_computed.wait(SOON)
    alone = list(range(8, 8 + OF_A_LINK))
    for uid, pages in ((1, alone), (2, [1, 2]), (3, [3, 4, 5, 6, 11]), (4, [7])):
        pair.open(uid, pages)
    gate = Gate(pair.prefill.link)
    put = pair.prefill.link.put
    for i, theirs in enumerate(alone):
        put(SendPages(1, [1 + i], [theirs]))
        gate.await_start(1 + i)
    put(SendPages(2, [9], [1]))
    put(SendLast(1, 100, []))
    put(SendPages(2, [10], [2]))
    put(SendLast(2, 200, []))
    put(SendPages(3, [11, 12, 13, 14, 8], [3, 4, 5, 6, 11]))
    put(SendLast(3, 300, []))
    put(SendPages(4, [15], [7], not_computed))
    put(SendLast(4, 400, []))
    time.sleep(0.2)
    assert gate.started == [1] * OF_A_LINK
    gate.opened.set()
    assert [pair.decode.hear_end(uid).token for uid in (1, 2, 3)] == [100, 200, 300]
    shared = [1] * OF_A_LINK + [3, 3, 1]  # the last has room for room 4, whose page is not computed yet
    assert gate.started == shared and pair.decode.events.empty()
    not_computed.set()
    assert pair.decode.hear_end(4).token == 400 and gate.started == [*shared, 1]
    assert pair.decode.pool[:, 1:8].equal(pair.prefill.pool[:, 9:16])
    assert pair.decode.pool[:, 11].equal(pair.prefill.pool[:, 8])
    assert pair.decode.pool[:, alone].equal(pair.prefill.pool[:, 1 : 1 + OF_A_LINK])
    assert [pair.prefill.hear().uid for _ in range(4)] == [1, 2, 3, 4]
    pair.hush()


def test_a_sender_that_breaks_by_itself_ends_the_rooms_of_its_peer(make_pair: Any) -> None:
    pair = make_pair()
    pair.open(1, [4])
    pair.prefill.link.put(SendPages(1, [NUM_PAGES], [4]))  # no page of its pool
    pair.prefill.hear_end(1, "of a pool of")
    pair.decode.hear_end(1, "link p/d")
    pair.hush()


def test_a_link_that_breaks_by_itself_ends_what_it_has_under_way(make_pair: Any) -> None:
    pair = make_pair()
    pair.open(1, [4, 5])
    link, aborted = pair.decode.link, threading.Event()
    abort = link.transport.abort
    link.transport.abort = lambda: (aborted.set(), abort())

    def broken(*_: Any) -> None:
        raise RuntimeError("no room to unpack")

    link._arrived = broken
    for mine, theirs in ((1, 4), (2, 5)):
        pair.prefill.link.put(SendPages(1, [mine], [theirs]))
    pair.decode.hear_bad_end(1, "no room to unpack")
    pair.prefill.hear_end(1, "link p/d")
    assert aborted.wait(SOON)
    pair.hush()
    others = [page for page in range(NUM_PAGES) if make_pair.library != "nixl" or page not in (4, 5)]
    assert (pair.decode.pool[:, others] == CANARY).all()


def test_rooms_that_share_a_link_do_not_mix(make_pair: Any) -> None:
    pair, rng = make_pair(), random.Random(1)
    places = {uid: list(range(1 + 5 * uid, 6 + 5 * uid)) for uid in range(3)}  # the decode side's
    sources = {uid: rng.sample(range(1, NUM_PAGES), 5) for uid in places}
    for uid, pages in places.items():
        pair.open(uid, pages)
    todo = dict.fromkeys(places, 0)
    while todo:
        uid = rng.choice(sorted(todo))
        chunk = slice(todo[uid], todo[uid] + rng.randint(1, 2))
        if todo[uid] < 5:
            pair.prefill.link.put(SendPages(uid, sources[uid][chunk], places[uid][chunk]))
            todo[uid] = chunk.stop
        else:
            pair.prefill.link.put(SendLast(uid, 100 + uid, []))
            del todo[uid]
    for _ in places:
        ended = pair.decode.hear()
        assert ended.error is None and ended.token == 100 + ended.uid
    for uid, pages in places.items():
        assert bits(pair.decode.pool[:, pages]).equal(bits(pair.prefill.pool[:, sources[uid]])), f"room {uid}"
    assert (pair.decode.pool[:, 0] == CANARY).all()


def test_kv_that_comes_before_this_rank_has_joined_waits_for_it(make_pair: Any) -> None:
    """With attention TP the replica's first rank opens the room; another rank's own loop may be a step behind."""
    pair = make_pair()
    pair.prefill.link.put(Join(1))
    pair.prefill.link.put(SendPages(1, [3], [8]))
    pair.prefill.link.put(SendLast(1, 5, []))
    time.sleep(0.3)
    assert (pair.decode.pool == CANARY).all(), "written before this rank had reserved the page"
    pair.decode.link.put(Join(1, pages=[8]))
    assert pair.decode.hear_end(1).token == 5
    assert pair.decode.pool[:, 8].equal(pair.prefill.pool[:, 3])
    pair.prefill.hear_end(1)
    pair.hush()


def test_a_senders_error_that_comes_before_this_rank_has_joined_waits_for_it(make_pair: Any) -> None:
    """Otherwise its room would never end."""
    pair = make_pair()
    pair.prefill.link.put(Join(1))
    pair.prefill.link.put(Closed(1, "the prompt does not fit"))
    pair.prefill.hear_end(1, "the prompt does not fit")
    time.sleep(0.2)
    pair.decode.link.put(Join(1))
    pair.decode.hear_end(1, "the prompt does not fit")
    pair.hush()


# ---- endings that cross


def test_a_cancelled_room_ends_on_both_sides_and_sends_no_more(make_pair: Any) -> None:
    pair = make_pair()
    pair.open(1, [1, 2])
    pair.prefill.link.put(SendPages(1, [1], [1]))
    pair.decode.link.put(Cancel(1))
    pair.prefill.hear_end(1, "cancelled")
    pair.decode.hear_end(1, "cancelled")
    for late in (SendPages(1, [2], [2]), SendLast(1, 9, []), Closed(1, "too late")):
        pair.prefill.link.put(late)
    pair.sync(2)
    assert (pair.decode.pool[:, 2] == CANARY).all()
    pair.prefill.link.put(Join(2))
    pair.prefill.link.put(SendLast(2, 0, []))
    pair.decode.hear_end(2)
    pair.prefill.hear_end(2)
    pair.hush()


def test_a_cancel_that_comes_before_the_sender_joined_ends_the_room_when_it_joins(make_pair: Any) -> None:
    pair = make_pair()
    pair.decode.link.put(pair.opening(1, [4]))
    pair.decode.link.put(Cancel(1))
    pair.prefill.hear_open(1)
    pair.sync(2)  # the Cancel is there
    assert pair.decode.events.empty(), "it ended before the sender promised to send nothing"
    for command in (Join(1), SendPages(1, [1], [4]), SendLast(1, 9, [])):
        pair.prefill.link.put(command)
    pair.prefill.hear_end(1, "cancelled")
    pair.decode.hear_end(1, "cancelled")
    pair.prefill.link.put(Join(2))
    pair.prefill.link.put(Closed(2, "enough"))
    pair.prefill.hear_end(2, "enough")
    pair.decode.hear_end(2, "enough")
    assert (pair.decode.pool == CANARY).all()
    pair.hush()


def test_a_cancel_that_crosses_the_last_byte_changes_nothing(make_pair: Any) -> None:
    pair = make_pair()
    pair.open(1, [4])
    pair.prefill.link.put(Join(2))
    pair.prefill.link.put(SendLast(2, 22, []))  # holds the decode link up: this rank has not joined room 2 yet
    pair.prefill.link.put(SendLast(1, 11, []))
    pair.prefill.hear_end(2)
    pair.prefill.hear_end(1)
    pair.decode.link.put(Cancel(1))  # on its way while Last(1) lies unread
    pair.decode.link.put(Join(2))
    assert pair.decode.hear_end(2).token == 22
    assert pair.decode.hear_end(1).token == 11
    pair.sync(3)
    pair.prefill.link.put(Join(3))
    pair.prefill.link.put(SendLast(3, 33, []))
    assert pair.decode.hear_end(3).token == 33
    pair.prefill.hear_end(3)
    pair.hush()


def test_a_cancel_after_the_end_reaches_nobody(make_pair: Any) -> None:
    pair = make_pair()
    pair.open(1, [4])
    pair.prefill.link.put(SendLast(1, 11, []))
    pair.decode.hear_end(1)
    pair.prefill.hear_end(1)
    pair.decode.link.put(Cancel(1))
    pair.open(2, [4])
    pair.prefill.link.put(SendLast(2, 22, []))
    pair.decode.hear_end(2)
    pair.prefill.hear_end(2)
    pair.hush()


def test_the_senders_error_reaches_the_receiver(make_pair: Any) -> None:
    pair = make_pair()
    pair.open(1, [4, 5])
    pair.prefill.link.put(SendPages(1, [1], [4]))
    pair.prefill.link.put(Closed(1, "the prompt does not fit"))
    pair.prefill.hear_end(1, "the prompt does not fit")
    pair.decode.hear_end(1, "the prompt does not fit")
    pair.hush()


STOPPED = "computed no further"  # the sender's own ending


class Storm:
    """The two loops of a prefill and a decode rank, in one thread and in a random order; rooms share few pages, so a
    page that one has let go is soon another's. Whoever gets pages that a room let go paints them at once."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair, self.rng = pair, random.Random(seed)
        self.allocator = PageAllocator(NUM_PAGES)
        self.opened = 0
        self.pages: dict[int, list[int]] = {}  # decode's, of rooms on their way
        self.painted: list[tuple[list[int], float]] = []  # pages that no room owns, and their colour
        self.cancelled: set[int] = set()
        self.unjoined: list[Open] = []  # prefill heard of it and its loop has not got to it
        self.work: dict[int, list[tuple[int, int]]] = {}  # prefill's: uid -> what it still has to send
        self.closed: set[int] = set()
        self.sent: dict[int, list[tuple[int, int]]] = {}
        self.endings = {"prefill": Counter(), "decode": Counter()}
        self.outcomes: Counter = Counter()

    def run(self) -> None:
        deadline = time.monotonic() + SOON
        moves = (self.open, self.cancel, self.join, self.send, self.send, self.decode_hears, self.prefill_hears)
        while not self.seen_all or self.pages or self.work or self.unjoined:
            assert time.monotonic() < deadline, f"a room never ended: {self.pages.keys()} {self.work.keys()}"
            self.rng.choice(moves)()
            if self.rng.random() < 0.05:
                time.sleep(0.001)
        self.pair.hush()
        for side in self.endings.values():
            assert side == Counter(range(self.opened)), "a room must end exactly once on each side"
        for pages, colour in self.painted:
            self.check(pages, colour)

    @property
    def seen_all(self) -> bool:
        """Threads decide which endings there are: go on until each kind has been there a few times."""
        return self.opened >= 100 and all(self.outcomes[error] >= 3 for error in (None, "cancelled", STOPPED))

    def open(self) -> None:
        if self.seen_all:
            return
        count = self.rng.randint(1, 5)
        while (pages := self.allocator.alloc(count)) is None and self.painted:
            old, colour = self.painted.pop(0)
            self.check(old, colour)
            self.allocator.free(old)
        if pages is None:
            return
        uid, self.opened = self.opened, self.opened + 1
        self.pages[uid] = pages
        self.pair.decode.link.put(self.pair.opening(uid, pages))
        if self.rng.random() < 0.2:
            self.cancel_room(uid)  # at once: it may overtake the other loop's Join

    def cancel(self) -> None:
        if self.pages and self.rng.random() < 0.4:
            self.cancel_room(self.rng.choice(sorted(self.pages)))

    def cancel_room(self, uid: int) -> None:
        if uid not in self.cancelled:
            self.cancelled.add(uid)
            self.pair.decode.link.put(Cancel(uid))

    def join(self) -> None:
        if self.unjoined and self.rng.random() < 0.7:
            event = self.unjoined.pop(0)
            uid = event.request.uid
            self.work[uid] = [(self.rng.randrange(1, NUM_PAGES), theirs) for theirs in event.pages]
            self.sent[uid] = []
            self.pair.prefill.link.put(Join(uid))

    def send(self) -> None:
        busy = sorted(self.work.keys() - self.closed)
        if not busy:
            return
        uid = self.rng.choice(busy)
        link, left = self.pair.prefill.link, self.work[uid]
        if self.rng.random() < 0.05:
            link.put(Closed(uid, STOPPED))
            self.closed.add(uid)
        elif left:
            chunk = [left.pop(0) for _ in range(min(len(left), self.rng.randint(1, 3)))]
            link.put(SendPages(uid, [mine for mine, _ in chunk], [theirs for _, theirs in chunk]))
            self.sent[uid] += chunk
        else:
            link.put(SendLast(uid, 1000 + uid, []))
            self.closed.add(uid)

    def prefill_hears(self) -> None:
        if not self.pair.prefill.events.empty():
            event = self.pair.prefill.hear()
            if isinstance(event, Open):
                self.unjoined.append(event)
            else:
                self.endings["prefill"][event.uid] += 1
                del self.work[event.uid]

    def decode_hears(self) -> None:
        if self.pair.decode.events.empty():
            return
        ended = self.pair.decode.hear()
        self.endings["decode"][ended.uid] += 1
        pages = self.pages.pop(ended.uid)
        if ended.error is None:
            assert ended.token == 1000 + ended.uid
            mine, theirs = zip(*self.sent[ended.uid], strict=True)
            assert list(theirs) == pages
            assert self.pair.decode.pool[:, list(theirs)].equal(self.pair.prefill.pool[:, list(mine)])
        else:
            assert ended.error == STOPPED or (ended.error == "cancelled" and ended.uid in self.cancelled)
        self.outcomes[ended.error] += 1
        colour = 1e6 + ended.uid  # the next owner's, who computes here
        self.pair.decode.pool[:, pages] = colour
        self.painted.append((pages, colour))

    def check(self, pages: list[int], colour: float) -> None:
        assert (self.pair.decode.pool[:, pages] == colour).all(), "a room that had ended was written to"


@pytest.mark.parametrize("seed", range(6))
def test_nothing_writes_the_pages_of_a_room_that_has_ended_however_aborts_fall(
    make_pair: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_transfers(monkeypatch, 1 + seed)
    Storm(make_pair(), seed).run()


# ---- links that break


@pytest.mark.parametrize("kind", (SendLink, ReceiveLink))
def test_a_link_that_cannot_connect_ends_its_rooms_and_refuses_later_ones(kind: type[Link]) -> None:
    may_connect = threading.Event()

    def connect(key: str) -> Any:
        may_connect.wait(SOON)
        raise RuntimeError("nobody there")

    end = End(pool := make_pool(CANARY), None, events := queue.SimpleQueue())
    end.link = kind("p/d", connect, pool, events, Credits())
    for uid in (1, 2):
        end.link.put(Join(uid))
    end.link.put(Cancel(1))
    may_connect.set()
    end.hear_end(1, "nobody there")
    end.hear_end(2, "nobody there")
    end.link.put(Join(3))
    assert "p/d" in end.hear_end(3, "nobody there").error
    end.hush()


def test_links_come_and_go() -> None:
    """A worker makes a new link whenever a peer was lost; the old one leaves nothing behind that is in its way."""

    def connect(key: str) -> Any:
        raise RuntimeError("nobody there")

    events, pool = queue.SimpleQueue(), make_pool(CANARY)
    for _ in range(200):
        link = ReceiveLink("p/d", connect, pool, events, Credits())
        link.stop()
        link.join(SOON)
        del link


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_links_that_are_over_keep_no_sockets(library: str) -> None:
    """A job that lives long goes through many: one for each time that a peer came and went."""
    door = Door(HOST)
    prefill, decode = Member("p", HOST, door.port, door.store.port), Member("d", HOST)
    links, most = [], None  # the links are kept, as a rank's `Links` keeps them
    here, there = make_rank(library), make_rank(library)
    for generation in range(3):
        ends = [End(rank.pool(None), None, queue.SimpleQueue()) for rank in (there, here)]
        key, (source, sink) = link_key(prefill, decode, generation), ends
        sink.link = ReceiveLink(
            key, dial(prefill, decode, here.endpoint, generation), sink.pool, sink.events, Credits()
        )
        assert door.poll(SOON * 1000)
        source.link = SendLink(
            key, listen(door.store.port, HOST, there.endpoint), source.pool, source.events, Credits()
        )
        pair = Pair(source, sink, decode)
        pair.open(1, [4])
        source.link.put(SendPages(1, [1], [4]))
        source.link.put(SendLast(1, 5, []))
        sink.hear_end(1)
        source.hear_end(1)
        pair.hush()
        for end in ends:
            end.link._mover.join(SOON)
        links += [end.link for end in ends]
        most = most or open_files()
        assert eventually(lambda most=most: open_files() <= most), f"{generation=}: {open_files()}, at first {most}"


def test_a_peer_that_is_stuck_stops_no_other_and_is_heard_when_it_goes(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All transfers that a link may have are on their way to it, and the link's thread waits to start another."""
    limit_transfers(monkeypatch, 1)
    rank = make_pair.rank()
    stuck, other = make_pair(name="d1", rank=rank), make_pair(name="d2", rank=rank)
    pages = list(range(1, 2 + OF_A_LINK))
    stuck.open(1, pages)
    other.open(2, [5])
    stuck.prefill.link.put(Join(9))  # a room of which its thread hears the end before its own loop has joined it
    stuck.prefill.link.put(SendLast(9, 0, []))
    stuck.prefill.hear_end(9)
    for page in pages:
        stuck.prefill.link.put(SendPages(1, [page], [page]))
    time.sleep(0.3)
    other.prefill.link.put(SendPages(2, [3], [5]))
    other.prefill.link.put(SendLast(2, 7, []))
    assert other.decode.hear_end(2).token == 7 and other.prefill.hear_end(2).error is None
    assert stuck.prefill.events.empty() and stuck.decode.events.empty()
    kept = stuck.decode.link.transport  # without it gloo would say that the peer has gone, as NCCL does not
    stuck.decode.link.stop()
    stuck.prefill.hear_end(1, "the other end has gone")
    stuck.decode.hear_end(1, "stopped")
    other.hush()
    del kept


def test_a_prefill_end_that_is_stopped_before_its_peer_came_does_not_greet(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL nothing would end that greeting: no abort does before there is a connection."""
    greeted = threading.Event()
    monkeypatch.setattr(TorchTransport, "greet", lambda self: greeted.set())
    door, decode = Door(HOST), Member("d", HOST)
    key = link_key(Member("p", HOST), decode)
    link = SendLink(key, listen(door.store.port, HOST, TORCH), make_pool(None), queue.SimpleQueue(), Credits())
    store = TCPStore(HOST, door.store.port, is_master=False)
    transport = TorchTransport(PrefixStore(key, store), 1, CPU, "127.0.0.1")
    time.sleep(0.3)  # now it waits at the pipe
    link.stop()
    link.join(SOON)
    assert not link.is_alive() and not greeted.is_set()
    del transport


class Fake:
    """A link, as far as `Links` knows of it."""

    def __init__(self, made: list[int], generation: int) -> None:
        made.append(generation)
        self.stopped, self.is_down, self.in_flight = False, False, 0

    def stop(self) -> None:
        self.stopped = self.is_down = True


def test_a_link_that_was_dropped_stays_so() -> None:
    """An Open of the generation before, or of a peer that has died, may be told after that."""
    made: list[int] = []
    links, peer = Links(lambda _, generation: Fake(made, generation)), Member("d", HOST)
    first, second = links.get(peer, 0), links.get(peer, 1)
    assert links.get(peer, 0) is first and first.stopped and not second.stopped
    links.lose(["d"])
    assert links.get(peer, 1) is second and second.stopped and made == [0, 1]
    assert links.get(peer, 2).stopped and links.get(peer, 2).stopped and made == [0, 1, 2]


def test_there_is_no_link_to_a_peer_from_which_a_read_goes_on_that_was_given_up() -> None:
    """It would get stuck as well, and take more of the process's credits."""
    links = Links(lambda _, generation: Fake([], generation))
    peer, other = Member("p", HOST), Member("q", HOST)
    first = links.get(peer, 0)
    first.in_flight = 1
    assert not links.get(peer, 1).stopped, "the first was not down: its transfer may have been a matter of milliseconds"
    assert links.get(peer, 2).stopped and links.get(peer, 3).stopped and not links.get(other, 0).stopped
    first.in_flight = 0
    assert not links.get(peer, 4).stopped


@pytest.mark.parametrize("side", ("prefill", "decode"))
def test_a_transfer_that_is_stuck_ends_its_link_in_time_and_keeps_its_buffer(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """The peer lives, and its pipe says so. Only its bytes do not come, or are not taken."""
    limit_transfers(monkeypatch, 1)
    pair = make_pair()
    pair.open(1, [6])
    pair.prefill.link.put(SendPages(1, [3], [6]))  # the first one may have to connect
    pair.prefill.link.put(SendLast(1, 7, []))
    pair.decode.hear_end(1)
    pair.prefill.hear_end(1)
    monkeypatch.setattr("disagg.handoff.link.TIMEOUT", timedelta(seconds=0.6))
    time.sleep(0.8)  # a link without a transfer has no limit
    pair.open(2, [4, 5])
    gate, began = Gate(getattr(pair, side).link), time.monotonic()
    for mine, theirs in ((1, 4), (2, 5)):
        pair.prefill.link.put(SendPages(2, [mine], [theirs]))
    gate.await_start(2)
    errors = {end.hear().error.removeprefix("link p/d/0: ") for end in (pair.prefill, pair.decode)}
    assert 0.6 < time.monotonic() - began < 3
    # If decode has not read, prefill waits as long as decode does, and either may be the first to give up.
    late, gone = "TimeoutError: a transfer took over 0.6 s", "ConnectionError: the other end has gone"
    assert late in errors and errors <= {late, gone}
    one_sided = make_pair.library != "torch"
    assert eventually(lambda: getattr(pair, side).link.in_flight == 2 * one_sided)
    gate.opened.set()
    assert eventually(lambda: pair.prefill.link.in_flight == pair.decode.link.in_flight == 0)
    if (make_pair.library, side) == ("nixl", "decode"):  # its room had only failed
        pair.decode.hear_end(2, "link p/d")
    pair.hush()


@pytest.mark.parametrize("side", ("prefill", "decode"))
def test_stop_ends_the_rooms_that_are_open(make_pair: Any, side: str) -> None:
    """There, and on the other side, which sees it go."""
    pair = make_pair()
    pair.open(1, [4])
    end = getattr(pair, side)
    end.link.stop()
    other = pair.decode if side == "prefill" else pair.prefill
    for ended in (end.hear_end(1, "stopped"), other.hear_end(1, "the other end has gone")):
        assert ended.link_down, "the room itself has not failed"
    pair.hush()


@torch_only
def test_a_peer_that_comes_and_leaves_before_this_end_looked_has_gone(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not awaited again: what it said is heard, and its room ends at once."""
    meet, left = SendLink.meet, threading.Event()
    monkeypatch.setattr(SendLink, "meet", lambda link: (left.wait(SOON), meet(link)))
    pair = make_pair()
    pair.decode.link.put(pair.opening(1, [4]))
    assert eventually(lambda: pair.decode.link._pipe is not None and pair.decode.link._pipe._said == 1)
    pair.decode.link.stop()
    pair.decode.hear_end(1, "stopped")
    pair.decode.link.join(SOON)
    left.set()
    pair.prefill.hear_open(1)
    pair.prefill.link.put(Join(1))
    pair.prefill.hear_end(1, "the other end has gone", within=5)
    pair.hush()


@torch_only
def test_a_room_whose_last_word_came_before_the_link_went_down_ends_once(make_pair: Any) -> None:
    """Its bytes are still on their way when the link is stopped, and arrive afterwards."""
    pair = make_pair()
    pair.open(1, [4])
    gate = Gate(pair.decode.link)
    pair.prefill.link.put(SendPages(1, [1], [4]))
    pair.prefill.link.put(SendLast(1, 7, []))
    gate.await_start(1)
    assert eventually(lambda: not pair.decode.link._tasks.empty()), "the room's end waits for its bytes"
    pair.decode.link.stop()
    pair.decode.hear_end(1, "stopped")
    gate.opened.set()
    pair.decode.link._mover.join(SOON)
    pair.decode.hush()


def test_a_transport_that_connects_after_the_link_was_stopped_is_aborted() -> None:
    may_connect, aborted = threading.Event(), threading.Event()

    class Late:
        def greet(self) -> None:
            pass

        def abort(self) -> None:
            aborted.set()

    def connect(key: str) -> Any:
        may_connect.wait(SOON)
        return Pipe.listen(HOST, key, Cancel), Late()

    link = ReceiveLink("p/d", connect, make_pool(CANARY), queue.SimpleQueue(), Credits())
    link.stop()
    may_connect.set()
    link.join(SOON)
    assert aborted.wait(SOON)


def test_a_prefill_end_that_is_stopped_before_decode_came_ends_decodes_rooms(library: str) -> None:
    """Decode then connects to a port that nobody has any more. Most libraries connect without the peer."""
    here, there = make_rank(library), make_rank(library)
    for _ in range(3):
        door, decode = Door(HOST), Member("d", HOST)
        prefill = Member("p", HOST, door.port, door.store.port)
        end, key = End(here.pool(CANARY), None, queue.SimpleQueue()), link_key(prefill, decode)
        end.link = ReceiveLink(key, dial(prefill, decode, here.endpoint), end.pool, end.events, Credits())
        end.link.put(Join(1, Open(Request(1, [1]), [4], [decode]), pages=[4]))
        assert door.poll(SOON * 1000)
        connect = listen(door.store.port, HOST, there.endpoint)
        SendLink(key, connect, there.pool(None), queue.SimpleQueue(), Credits()).stop()
        ended = end.hear_end(1, "link p/d", within=5)
        by_gloo = library == "torch" and "Gloo connectFullMesh failed" in ended.error  # it may notice first
        assert ended.link_down and ("the other end has gone" in ended.error or by_gloo)
        end.hush()
        door.close()


def test_stop_ends_a_link_that_waits_for_this_rank_to_join(make_pair: Any) -> None:
    """The prefill rank announced a room and was lost before the router's word of it came to this decode rank."""
    pair = make_pair()
    pair.prefill.link.put(Join(1))
    pair.prefill.link.put(SendLast(1, 5, []))
    pair.prefill.hear_end(1)
    time.sleep(0.3)  # Last(1) is there
    pair.decode.link.stop()
    pair.decode.link.join(3)
    assert not pair.decode.link.is_alive()


@torch_only
def test_a_transport_that_breaks_ends_every_room_and_refuses_later_ones(make_pair: Any) -> None:
    pair = make_pair()
    for uid in (1, 2):
        pair.open(uid, [uid])
    pair.prefill.say(Sending([1], [1]))  # announced, and then the sender's group goes down
    time.sleep(0.3)
    pair.prefill.link._transport = None
    for _ in range(2):
        ended = pair.decode.hear()
        assert ended.uid in (1, 2) and "link p/d" in ended.error
    pair.decode.link.put(Join(3))
    pair.decode.hear_end(3, "link p/d")
    pair.prefill.link.put(SendPages(1, [1], [1]))
    for _ in range(2):
        ended = pair.prefill.hear()
        assert ended.uid in (1, 2) and "link p/d" in ended.error
    pair.prefill.link.put(Join(4))
    pair.prefill.hear_end(4, "link p/d")
    assert Counter(e.uid for e in pair.decode.endings) == Counter((1, 2, 3))
    assert Counter(e.uid for e in pair.prefill.endings) == Counter((1, 2, 4))
    pair.hush()


@torch_only
@pytest.mark.parametrize("side", ("prefill", "decode"))
def test_stop_ends_a_transfer_in_flight(make_pair: Any, side: str) -> None:
    """The router said that the peer is gone; its machine may have gone without a word, so no socket knows."""
    pair = make_pair()
    pair.open(1, [4])
    if side == "decode":
        pair.prefill.say(Sending([1], [4]))  # and no bytes
    else:
        pair.prefill.link.put(Join(2))
        pair.prefill.link.put(SendLast(2, 0, []))  # the decode link waits here, and takes no bytes
        pair.prefill.hear_end(2)
        pair.prefill.link.put(SendPages(1, [1], [4]))
    time.sleep(0.3)
    end = getattr(pair, side)
    end.link.stop()
    end.hear_end(1, "link p/d", within=3)


@torch_only
def test_bytes_that_come_after_the_link_went_down_touch_no_page(make_pair: Any) -> None:
    """stop() lets the pages go at once, and a slow peer may still finish what it has begun."""
    pair = make_pair()
    pair.open(1, [4, 5])
    pair.prefill.say(Sending([1], [4, 5]))
    time.sleep(0.3)
    transport = pair.prefill.link.transport
    pair.decode.link.stop()
    pair.decode.hear_end(1, "stopped")
    pair.decode.pool[:, [4, 5]] = 8.5  # another room's
    transport.send(pair.prefill.pool[:, [1, 2]])[0].wait()
    pair.decode.hush()
    assert (pair.decode.pool[:, [4, 5]] == 8.5).all()


@pytest.mark.parametrize("library", ["torch", "mooncake"], indirect=True)
def test_a_buffer_that_may_still_be_written_keeps_its_credit_and_touches_no_page(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the library moves bytes: the mover sees a transfer through after the link went down."""
    limit_transfers(monkeypatch, 1)
    rank = make_pair.rank()
    pair = make_pair(decode_rank=rank)
    pair.open(1, [4, 5])
    gate = Gate(pair.decode.link)
    for mine, theirs in ((1, 4), (2, 5)):
        pair.prefill.link.put(SendPages(1, [mine], [theirs]))
    gate.await_start(2)
    pair.decode.link.stop()
    pair.decode.hear_end(1, "stopped")
    pair.decode.pool[:, [4, 5]] = 8.5  # another room's
    one_sided = make_pair.library != "torch"
    assert len(rank.credits.free) == IN_FLIGHT - 2 * one_sided  # torch allocates a buffer for each transfer
    gate.opened.set()
    pair.decode.link._mover.join(SOON)
    pair.decode.hush()
    assert (pair.decode.pool[:, [4, 5]] == 8.5).all() and len(rank.credits.free) == IN_FLIGHT


@pytest.mark.parametrize("library", ["torch", "mooncake"], indirect=True)
def test_a_room_whose_link_goes_down_amid_its_unpacking_ends_behind_that_and_so_does_the_buffers_credit(
    make_pair: Any,
) -> None:
    rank = make_pair.rank()
    pair, begun, let = make_pair(decode_rank=rank), threading.Event(), threading.Event()
    pair.open(1, [4])
    unpack = pair.decode.link._unpack_pages

    def slowly(*args: Tensor) -> None:
        begun.set()
        assert let.wait(SOON)
        unpack(*args)

    pair.decode.link._unpack_pages = slowly
    pair.prefill.link.put(SendPages(1, [1], [4]))
    assert begun.wait(SOON)
    pair.decode.link.stop()
    pair.decode.hear_failure(1, "stopped")
    time.sleep(0.2)
    assert pair.decode.events.empty() and (pair.decode.pool[:, 4] == CANARY).all()
    assert len(rank.credits.free) == IN_FLIGHT - 1, "its buffer is in use"
    let.set()
    assert pair.decode.hear_end(1, "stopped").link_down
    assert pair.decode.pool[:, 4].equal(pair.prefill.pool[:, 1])
    pair.decode.link._mover.join(SOON)
    assert len(rank.credits.free) == IN_FLIGHT
    pair.decode.hush()


@pytest.mark.parametrize("library", ["nixl", "mooncake"], indirect=True)
def test_a_room_is_done_only_when_its_peer_has_read_its_pages(make_pair: Any) -> None:
    """Until then a link that goes down could let another transfer have the buffer, amid the reading."""
    pair, told = make_pair(), []
    pair.open(1, [4])
    tell = pair.decode.link.tell
    pair.decode.link.tell = told.append
    pair.prefill.link.put(SendPages(1, [1], [4]))
    pair.prefill.link.put(SendLast(1, 7, []))
    assert eventually(lambda: told == [Read()])
    assert eventually(lambda: pair.decode.pool[:, 4].equal(pair.prefill.pool[:, 1]))
    time.sleep(0.2)
    assert pair.decode.events.empty() and pair.prefill.events.empty()
    tell(told[0])
    assert pair.decode.hear_end(1).token == 7
    pair.prefill.hear_end(1)
    pair.hush()


@pytest.mark.parametrize("library", ["nixl", "mooncake"], indirect=True)
def test_a_sender_that_goes_down_amid_the_reading_completes_no_room(make_pair: Any) -> None:
    """Its buffer is another transfer's at once. What the peer then reads is not this room's KV."""
    pair = make_pair()
    pair.open(1, [4])
    gate = Gate(pair.decode.link)
    pair.prefill.link.put(SendPages(1, [1], [4]))
    pair.prefill.link.put(SendLast(1, 7, []))
    gate.await_start(1)
    pair.prefill.link.stop()
    pair.prefill.hear_end(1, "stopped")
    pair.prefill.link._mover.join(SOON)
    assert not pair.prefill.link._mover.is_alive() and pair.prefill.link.in_flight == 0
    gate.opened.set()
    pair.decode.hear_bad_end(1, "the other end has gone")
    pair.hush()


@pytest.mark.parametrize("library", ["nixl", "mooncake"], indirect=True)
@pytest.mark.parametrize("side, lie", [("decode", Read()), ("prefill", Sending([1], [4], b"nowhere"))])
def test_a_word_that_means_nothing_ends_the_link(make_pair: Any, side: str, lie: Message) -> None:
    pair = make_pair()
    pair.open(1, [4])
    getattr(pair, side).say(lie)
    ends = (pair.prefill, pair.decode) if side == "decode" else (pair.decode, pair.prefill)
    ends[0].hear_end(1, "nothing was sent" if side == "decode" else "a location of 7 bytes")
    ends[1].hear_end(1, "the other end has gone")
    pair.hush()
    for end in ends:
        end.link._mover.join(SOON)
        assert len(end.link._credits._credits.free) == IN_FLIGHT, "of a transfer that never began"


def test_a_flipped_bit_fails_the_rooms_of_its_transfer_and_no_other(make_pair: Any) -> None:
    """With --kv-checksum, and never with a token. The others' pages have what was sent."""
    pair = make_pair(checksums=True)
    for uid, page in ((1, 4), (2, 5), (3, 6), (4, 7)):
        pair.open(uid, [page])
    link, ready = pair.decode.link, Ready()
    recv = link.transport.recv

    def flipping(x: Tensor, location: bytes, pages: list[int] | None) -> Transfer:
        transfer = recv(x, location, pages)
        wait = transfer.wait

        def wait_and_flip() -> None:
            wait()
            x[-1, pages[-1] if pages else -1].view(torch.uint8).view(-1)[-1] ^= 1

        transfer.wait = wait_and_flip
        return transfer

    put = pair.prefill.link.put
    put(SendPages(1, [1], [4]))
    put(SendLast(1, 10, []))
    assert pair.decode.hear_end(1).token == 10
    link.transport.recv = flipping
    put(SendPages(2, [2], [5], ready))  # room 4 shares its transfer
    put(SendPages(4, [4], [7]))
    put(SendLast(2, 20, []))
    put(SendLast(4, 40, []))
    ready.come.set()
    for uid in (2, 4):
        pair.decode.hear_end(uid, "other bytes than were sent (--kv-checksum)")
    link.transport.recv = recv
    put(SendPages(3, [3], [6]))
    put(SendLast(3, 30, []))
    assert pair.decode.hear_end(3).token == 30
    assert [pair.prefill.hear().uid for _ in range(4)] == [1, 2, 4, 3]
    assert pair.decode.pool[:, [4, 6]].equal(pair.prefill.pool[:, [1, 3]])
    written = {4, 6, *((5, 7) if make_pair.library == "nixl" else ())}
    others = [page for page in range(NUM_PAGES) if page not in written]
    assert (pair.decode.pool[:, others] == CANARY).all()
    assert (link.transfers, link.mismatches) == (3, 1)
    pair.hush()


@pytest.mark.parametrize("library", ["nixl", "mooncake"], indirect=True)
@pytest.mark.parametrize("last_word", [SendLast(1, 7, []), Closed(1, "enough")], ids=lambda word: type(word).__name__)
def test_a_checksum_counts_only_for_what_prefill_kept_until_it_was_read(make_pair: Any, last_word: Command) -> None:
    """Decode is frozen before it reads, so prefill gives the link up, and its memory is another request's at once.

    What decode reads then has another checksum, and no transfer is at fault.
    """
    pair = make_pair(checksums=True)
    pair.open(1, [4])
    link, frozen, goes_on = pair.decode.link, threading.Event(), threading.Event()
    recv = link.transport.recv

    def frozen_first(*args: Any) -> Transfer:
        frozen.set()
        assert goes_on.wait(SOON)
        return recv(*args)

    link.transport.recv = frozen_first
    pair.prefill.link.put(SendPages(1, [1], [4]))
    pair.prefill.link.put(last_word)
    assert frozen.wait(SOON)
    time.sleep(0.2)  # what prefill says without waiting for the reading has come
    pair.prefill.link.stop()
    assert pair.prefill.hear_end(1, "stopped").link_down
    for memory in (pair.prefill.pool, getattr(pair.prefill.link.transport._staging, "memory", None)):
        if memory is not None:
            memory.view(torch.uint8).fill_(3)
    goes_on.set()
    assert pair.decode.hear_bad_end(1, "the other end has gone").link_down
    link._mover.join(SOON)
    assert link.transfers == 1, "nothing was read"
    assert link.mismatches == 0
    pair.hush()


def test_pages_that_were_lost_before_they_are_packed_complete_no_room(make_pair: Any) -> None:
    """The link is stopped while its thread prepares a transfer, and its pages are another request's at once.

    Their checksum would be right, and gloo sends after its abort.
    """
    pair = make_pair(checksums=True)
    pair.open(1, [4])
    link, ready, over = pair.prefill.link, Ready(), threading.Event()
    close, page_ids = link.pipe.close, link.page_ids
    link.pipe.close = lambda: over.wait(SOON) and close()  # decode has time to hear what was said

    def lose(pages: list[int]) -> Tensor:
        link.stop()
        pair.prefill.hear_end(1, "stopped")
        pair.prefill.pool[:, pages] = 8.5
        return page_ids(pages)

    link.page_ids = lose
    link.put(SendPages(1, [1], [4], ready))
    link.put(SendLast(1, 7, []))
    ready.come.set()
    assert eventually(lambda: link.is_down)
    time.sleep(0.5)
    assert pair.decode.events.empty(), pair.decode.events.get()
    over.set()
    pair.decode.hear_bad_end(1, "the other end has gone")
    pair.hush()


def test_a_pipe_that_is_connected_later_than_the_transport_loses_nothing() -> None:
    """With attention TP a prefill rank may have to send on a link on which it has heard nothing yet."""
    door, decode = Door(HOST), Member("d", HOST)
    key = link_key(Member("p", HOST), decode)
    end = End(make_pool(None), None, queue.SimpleQueue())
    end.link = SendLink(key, listen(door.store.port, HOST, TORCH), end.pool, end.events, Credits())
    store = TCPStore(HOST, door.store.port, is_master=False)
    transport = TorchTransport(PrefixStore(key, store), 1, CPU, "127.0.0.1")
    end.link.put(Join(1))
    end.link.put(SendLast(1, 5, [], sampled=time.perf_counter()))
    time.sleep(0.3)
    pipe = Pipe.connect(HOST, int(store.get(f"{key}/pipe")), key, Sending | Last | Closed)
    end.hear_end(1)
    (last,) = pipe.poll(SOON * 1000)
    assert (last.uid, last.token) == (1, 5) and 0 < last.waited < SOON
    end.hush()
    pipe.close()
    del transport


HUGE = (1, 3, PAGE, 100_000)  # 26 MB a page: more than any socket buffers


def prefill_that_dies(prefill: Member, decode: Member, doing: Any) -> None:
    """A peer process: meets the decode rank, announces a page, and has only half a mind to send it."""
    door = Door(HOST)
    doing.put(Member(prefill.id, HOST, door.port, door.store.port))
    assert door.poll(SOON * 1000)
    pipe, transport = listen(door.store.port, HOST, TORCH)(link_key(prefill, decode))
    (opening,) = pipe.poll(SOON * 1000)
    pipe.send(Sending([opening.request.uid], opening.pages))
    doing.put("sending")
    time.sleep(2 * SOON)
    del transport


def decode_that_dies(prefill: Member, decode: Member, takes_some: bool, doing: Any) -> None:
    """A peer process: asks for KV, and never takes it or only its beginning."""
    pipe, transport = dial(prefill, decode, TORCH)(link_key(prefill, decode))
    pipe.send(Open(Request(1, [1]), [1, 2], [decode]))
    for message in pipe.poll(SOON * 1000):
        doing.put(type(message).__name__)
    if takes_some:
        time.sleep(0.2)  # the queue's own thread has said so by now
        work = transport.group.recv([torch.empty(HUGE)[:, :2]], 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)  # with the bytes under way, and the sockets full
        work.wait()
    time.sleep(2 * SOON)
    del transport


def spawn(target: Any, *args: Any) -> tuple[Any, Any]:
    doing = fork_server.Queue()
    process = fork_server.Process(target=target, args=(*args, doing), daemon=True)
    process.start()
    return process, doing


def test_a_prefill_process_that_dies_in_a_transfer_ends_the_decode_sides_rooms() -> None:
    decode = Member("d", HOST)
    process, doing = spawn(prefill_that_dies, Member("p", HOST), decode)
    prefill = doing.get(timeout=60)
    end = End(torch.full(HUGE, CANARY), None, queue.SimpleQueue())
    end.link = ReceiveLink(link_key(prefill, decode), dial(prefill, decode, TORCH), end.pool, end.events, Credits())
    end.link.put(Join(1, Open(Request(1, [1]), [1], [decode]), pages=[1]))
    end.link.put(Join(2))
    assert doing.get(timeout=SOON) == "sending"
    time.sleep(0.2)
    assert end.events.empty()
    process.kill()
    assert {end.hear().uid, end.hear().uid} == {1, 2}
    assert all("link p/d" in ended.error for ended in end.endings)
    end.link.put(Join(3))
    end.hear_end(3, "link p/d")
    assert (end.pool == CANARY).all()
    end.hush()
    process.join(SOON)


@pytest.mark.parametrize("takes_some", (False, True), ids=("before its bytes", "amid its bytes"))
def test_a_decode_process_that_dies_in_a_transfer_ends_the_prefill_sides_rooms(takes_some: bool) -> None:
    door, decode = Door(HOST), Member("d", HOST)
    prefill = Member("p", HOST, door.port, door.store.port)
    process, doing = spawn(decode_that_dies, prefill, decode, takes_some)
    assert door.poll(60_000)
    end = End(torch.randn(HUGE), None, queue.SimpleQueue())
    end.link = SendLink(
        link_key(prefill, decode), listen(door.store.port, HOST, TORCH), end.pool, end.events, Credits()
    )
    end.hear_open(1)
    for uid in (1, 2):
        end.link.put(Join(uid))
    end.link.put(SendPages(1, [1, 2], [1, 2]))
    assert doing.get(timeout=SOON) == "Sending"
    time.sleep(0.6)
    assert end.events.empty()
    process.kill()
    if takes_some:
        end.link.stop()  # as when the router says so; gloo alone notices after its timeout only
    assert {end.hear(5).uid, end.hear(5).uid} == {1, 2}
    assert all("link p/d" in ended.error for ended in end.endings)
    if not takes_some:
        end.link.put(Join(3))
        end.hear_end(3, "link p/d")
        end.hush()
    assert end.events.empty()
    process.join(SOON)


def test_a_link_that_went_down_is_followed_by_a_new_generation() -> None:
    """One transient failure must not end a pair of ranks for good."""
    door, decode = Door(HOST), Member("d", HOST)
    prefill = Member("p", HOST, door.port, door.store.port)
    source, pool = make_pool(None), make_pool(CANARY)
    sending = Links(
        lambda peer, g: SendLink(
            link_key(prefill, peer, g), listen(door.store.port, HOST, TORCH), source, sending.events, sending.credits
        )
    )
    receiving = Links(
        lambda peer, g: ReceiveLink(
            link_key(peer, decode, g), dial(peer, decode, TORCH, g), pool, receiving.events, receiving.credits
        )
    )
    for generation in range(3):
        receiver = receiving.get(prefill, generation)
        receiver.put(Join(generation, Open(Request(generation, [1]), [5], [decode], generation), pages=[5]))
        (knock,) = door.poll(SOON * 1000)
        assert (knock.decode, knock.generation) == (decode, generation)
        sender = sending.get(decode, generation)
        assert sending.events.get(timeout=SOON).generation == generation
        sender.put(Join(generation))
        sender.put(SendPages(generation, [generation + 1], [5]))
        sender.put(SendLast(generation, 7, []))
        ended = receiving.events.get(timeout=SOON)
        assert (ended.uid, ended.error, ended.token) == (generation, None, 7)
        assert torch.equal(pool[:, 5], source[:, generation + 1])
        assert sending.events.get(timeout=SOON) == RoomEnded(generation)
        receiver.stop()
        receiver.put(Join(100 + generation))
        assert receiving.events.get(timeout=SOON).link_down
    assert receiving.get(prefill, 2) is receiver and sending.get(decode, 2) is sender
    page = source[:, 1].nbytes
    assert receiving.stats()["transfer_bytes"] == 3 * page
    receiving.lose(["p"])
    assert receiving.gone == {"p"}
    for links in (sending, receiving):
        links.close()
    assert sending.drain() == [] and receiving.drain() == []


def test_the_doors_ports_are_open_on_its_own_address_alone() -> None:
    """Torch's store would listen on all of the machine's."""
    door = Door(HOST)
    for port in (door.port, door.store.port):
        socket.create_connection((HOST, port), 1).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 1)
    door.close()


def test_a_room_with_too_few_pages_ends_the_link(make_pair: Any) -> None:
    """Its KV would be written to somebody else's, or nowhere."""
    pair = make_pair()
    pair.decode.link.put(Join(1, Open(Request(1, [1] * 65), [4], [pair.me])))
    pair.decode.hear_end(1, "link p/d")
    assert pair.prefill.events.empty() and pair.prefill.link.is_down
    assert "1 pages for 65 tokens" in pair.prefill.link._down


def test_a_room_that_claims_to_have_its_whole_prompt_ends_the_link(make_pair: Any) -> None:
    """A prompt's last token is always computed, for its logits, so the page with it is always sent."""
    pair = make_pair()
    pair.decode.link.put(Join(1, Open(Request(1, [1] * 2 * PAGE), [4, 5], [pair.me], have=2), pages=[]))
    pair.decode.hear_end(1, "link p/d")
    assert pair.prefill.events.empty() and "has 2 pages; it can have 1" in pair.prefill.link._down
    pair.hush()


@pytest.mark.parametrize("page", [4, 9], ids=["that decode has", "of another room"])
def test_a_page_that_is_not_of_its_room_ends_the_link_and_stays_as_it_is(make_pair: Any, page: int) -> None:
    """Requests may read it: those that share a prefix, or those of the other room."""
    pair = make_pair()
    opening = Open(Request(1, [1] * (PAGE + 1)), [4, 5], [pair.me], have=1)
    pair.decode.link.put(Join(1, opening, pages=[5]))
    assert pair.prefill.hear_open(1).have == 1
    pair.prefill.link.put(Join(1))
    pair.open(2, [9])
    pair.prefill.link.put(SendPages(1, [1], [5]))
    pair.prefill.link.put(SendPages(1, [2], [page]))
    pair.prefill.link.put(SendLast(1, 7, []))
    errors = {event.uid: event.error for event in (pair.decode.hear(), pair.decode.hear())}
    assert errors.keys() == {1, 2} and f"sends page {page}, which is none of rooms [1]" in errors[1]
    assert (pair.decode.pool[:, [4, 9]] == CANARY).all()
    assert {pair.prefill.hear().uid, pair.prefill.hear().uid} == {1, 2}
    pair.hush()


def test_a_transfer_for_a_room_that_gets_no_page_of_it_ends_the_link(make_pair: Any) -> None:
    """In place, a room is kept as long as a read for it goes on."""
    pair = make_pair()
    pair.open(1, [4])
    pair.open(2, [5])
    pair.prefill.say(Sending([1, 2], [4]))
    errors = {event.uid: event.error for event in (pair.decode.hear(), pair.decode.hear())}
    assert errors.keys() == {1, 2} and all("for room 2, but none of them is that room's" in e for e in errors.values())
    pair.decode.hush()


def test_a_page_that_comes_behind_the_last_word_on_its_room_ends_the_link_and_stays_as_it_is(make_pair: Any) -> None:
    """The room ends behind what is under way, and then the page is another request's."""
    pair = make_pair()
    pair.open(1, [4])
    pair.open(2, [5])
    gate = Gate(pair.decode.link)
    pair.prefill.link.put(SendPages(2, [2], [5]))
    gate.await_start(1)
    pair.prefill.say(Closed(1, "enough"))
    pair.prefill.say(Sending([1], [4]))
    errors = {event.uid: event.error for event in (pair.decode.hear(), pair.decode.hear())}
    assert errors.keys() == {1, 2} and all("sends page 4, which is none of rooms [1]" in one for one in errors.values())
    gate.opened.set()
    assert eventually(lambda: pair.decode.link.in_flight == 0) and (pair.decode.pool[:, 4] == CANARY).all()


def test_more_pages_at_once_than_a_buffer_has_end_the_link(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A two-sided transport would allocate them, however often a page is named."""
    limit_transfers(monkeypatch, 2)
    pair = make_pair()
    pair.open(1, [4])
    pair.prefill.say(Sending([1], [4, 4, 4]))
    pair.decode.hear_end(1, "3 pages at once; it may send 2")
    pair.prefill.hear_end(1, "the other end has gone")
    pair.hush()


def test_rows_come_before_the_rooms_end_and_are_taken_once(make_pair: Any) -> None:
    pair = make_pair()
    pair.decode.link.put(msgspec.structs.replace(pair.opening(1, [1]), expert_bytes=5, row_bytes=3))
    pair.prefill.hear_open(1)
    pair.prefill.link.put(Join(1))
    first = Chosen(1, b"ab"), Scored(1, b"x"), Chosen(2, b"of no room here"), Scored(2, b"nor this")
    for command in (*first, Chosen(1, b"cde"), Scored(1, b"yz"), SendLast(1, 7, [])):
        pair.prefill.link.put(command)
    pair.decode.hear_end(1)
    for pieces, data in ((pair.decode.link.experts, b"abcde"), (pair.decode.link.prompt_rows, b"xyz")):
        assert pieces.take(1) == data and pieces.take(1) == b""
    pair.prefill.hear_end(1)
    pair.hush()


@pytest.mark.parametrize("expected", [0, 5])
@pytest.mark.parametrize("kind, limit, what", [(Chosen, "expert_bytes", "chosen experts"),
                                               (Scored, "row_bytes", "prompt log probabilities")])  # fmt: skip
def test_more_rows_than_a_prompt_has_end_the_link(
    make_pair: Any, kind: Any, limit: str, what: str, expected: int
) -> None:
    pair = make_pair()
    pair.decode.link.put(msgspec.structs.replace(pair.opening(1, [1]), **{limit: expected}))
    pair.prefill.hear_open(1)
    pair.prefill.link.put(Join(1))
    for piece in (b"x" * expected, b"y"):
        pair.prefill.link.put(kind(1, piece))
    pair.decode.hear_end(1, f"over {expected} bytes of {what} for room 1")
    pair.prefill.hear_end(1, "has gone")


def test_a_knock_that_is_lost_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill rank was frozen, or had too many links."""
    monkeypatch.setattr("disagg.handoff.connect.KNOCK_AGAIN", timedelta(seconds=0.3))
    door = Door(HOST)
    prefill, decode = Member("p", HOST, door.port, door.store.port), Member("d", HOST)
    pool, events = make_pool(CANARY), queue.SimpleQueue()
    link = ReceiveLink(link_key(prefill, decode), dial(prefill, decode, TORCH), pool, events, Credits())
    assert door.poll(SOON * 1000)  # and nothing comes of it
    time.sleep(0.4)
    (knock, *_) = door.poll(SOON * 1000)
    send = SendLink(
        link_key(prefill, knock.decode), listen(door.store.port, HOST, TORCH), make_pool(None), events, Credits()
    )
    link.put(Join(1, Open(Request(1, [1]), [4], [decode])))
    assert isinstance(events.get(timeout=SOON), Open)
    for one in (link, send):
        one.stop()
        one.join(SOON)
    door.close()


def test_a_rank_can_have_as_many_links_as_it_takes() -> None:
    """Each has five sockets, and ZeroMQ's own limit is 1,023 of them. In a process of its own: it takes many files."""
    code = (
        "from disagg.control.ports import new_socket, MOST_SOCKETS; from disagg.prefill import MOST_LINKS; import zmq\n"
        "assert 5 * MOST_LINKS < MOST_SOCKETS; sockets = [new_socket(zmq.PAIR) for _ in range(5 * MOST_LINKS)]\n"
        "print(len(sockets), flush=True); import os; os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1280", done.stderr
