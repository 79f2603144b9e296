"""Reads from prefill's pool straight into decode's, of which a library cannot cancel any.

A room that fails amid such a read says so at once. It ends when the read is over, and until then its pages are nobody
else's. The reads here write when the test says so, and late.
"""

import ctypes
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.distributed import Store

from disagg.handoff.endpoints import Handoff
from disagg.handoff.protocol import Cancel, Closed, Join, RoomEnded, RoomFailed, SendLast, SendPages
from disagg.handoff.transport import Transfer
from disagg.handoff.transports.one_sided import OneSided, Run
from tests.conftest import eventually
from tests.test_handoff import CANARY, NUM_PAGES, SOON, Pair, limit_transfers, make_pair

assert make_pair  # a fixture


class Copied:
    """A read of the double's: it is complete."""

    def __init__(self, x: Tensor, runs: list[Run]) -> None:
        self.x, self.nbytes, self.began = x, sum(size for _, _, size in runs), time.perf_counter()
        for here, there, size in runs:
            ctypes.memmove(here, there, size)

    def wait(self) -> None: ...


class Double(OneSided):
    """Both ends are in this process."""

    in_place = True

    def greet(self) -> None: ...

    def _read(self, x: Tensor, runs: list[Run], device: int) -> Transfer:
        return Copied(x, runs)


class DoubleEndpoint:
    about = "a double"

    def connect(self, store: Store, me: int) -> Double:
        return Double(None)


@pytest.fixture(params=["double", "nixl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    make = Handoff.make_endpoint

    def make_endpoint(self: Handoff, host: str, pool: Tensor) -> Any:
        return DoubleEndpoint() if self.transport == "double" else make(self, host, pool)

    monkeypatch.setattr(Handoff, "make_endpoint", make_endpoint)
    return request.param


class Late:
    """A read that begins when its time has come, and writes then. Its link knows nothing of that."""

    def __init__(self, read: Callable[[], Transfer], hold: Callable[[], None]) -> None:
        self.read, self.hold, self.nbytes, self.began = read, hold, 0, time.perf_counter()

    def wait(self) -> None:
        self.hold()
        transfer = self.read()
        transfer.wait()
        self.nbytes = transfer.nbytes


def make_late(pair: Pair, hold: Callable[[], None]) -> list[int]:
    """Have decode's reads wait for `hold()`. Returns the list to which each adds its runs."""
    assert eventually(lambda: pair.decode.link._transport is not None)
    transport, begun = pair.decode.link.transport, []
    read = transport._read

    def late(x: Tensor, runs: list[Run], device: int) -> Transfer:
        begun.append(len(runs))
        return Late(lambda: read(x, runs, device), hold)

    transport._read = late
    return begun


@pytest.fixture
def held(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, list[int], threading.Semaphore]:
    """A pair, the reads that have begun, and what lets one of them write. A transfer has one page."""
    limit_transfers(monkeypatch, 1)
    pair, let = make_pair(), threading.Semaphore(0)
    return pair, make_late(pair, lambda: assert_soon(let)), let


def assert_soon(let: threading.Semaphore) -> None:
    assert let.acquire(timeout=SOON)


def test_a_room_whose_link_goes_down_amid_a_read_fails_at_once_and_ends_with_the_read(held: Any) -> None:
    """Another room of the link, to which nothing is being read, ends at once."""
    pair, begun, let = held
    pair.open(1, [4, 9])
    pair.open(2, [5])
    for mine, theirs in ((1, 4), (2, 9)):
        pair.prefill.link.put(SendPages(1, [mine], [theirs]))
    assert eventually(lambda: len(begun) == 2)
    pair.decode.link.stop()
    pair.decode.hear_failure(1, "stopped")
    pair.decode.hear_end(2, "stopped")
    pair.decode.pool[:, 5] = 8.5  # another room's
    for expected in (4, 9):
        time.sleep(0.2)
        assert pair.decode.events.empty() and (pair.decode.pool[:, expected] == CANARY).all()
        let.release()
        assert eventually(lambda page=expected: not (pair.decode.pool[:, page] == CANARY).all()), "it was no late write"
    assert pair.decode.hear_end(1, "stopped").link_down
    assert pair.decode.pool[:, [4, 9]].equal(pair.prefill.pool[:, [1, 2]]) and (pair.decode.pool[:, 5] == 8.5).all()
    pair.decode.link.put(Join(3))
    pair.decode.hear_end(3, "stopped")
    pair.decode.hush()


@pytest.mark.parametrize("who", ["decode cancels", "prefill closes"])
def test_a_room_that_is_closed_amid_a_read_ends_behind_it(held: Any, who: str) -> None:
    pair, begun, let = held
    pair.open(1, [4])
    pair.open(2, [5])
    pair.prefill.link.put(SendPages(1, [1], [4]))
    assert eventually(lambda: len(begun) == 1)
    if who == "decode cancels":
        pair.decode.link.put(Cancel(1))
    else:
        pair.prefill.link.put(Closed(1, "cancelled"))
    time.sleep(0.3)
    assert pair.decode.events.empty(), "the library may still write its page"
    let.release()
    pair.decode.hear_end(1, "cancelled")
    assert pair.decode.pool[:, 4].equal(pair.prefill.pool[:, 1])
    pair.decode.pool[:, 4] = 8.5  # another room's
    pair.prefill.link.put(SendPages(2, [2], [5]))
    pair.prefill.link.put(SendLast(2, 7, []))
    let.release()
    assert pair.decode.hear_end(2).token == 7
    assert (pair.decode.pool[:, 4] == 8.5).all()


def test_a_read_that_fails_lets_go_of_its_room(held: Any) -> None:
    pair, begun, let = held
    pair.open(1, [4])
    pair.decode.link.transport._read = lambda *_: Late(lambda: 1 / 0, lambda: assert_soon(let))
    pair.prefill.link.put(SendPages(1, [1], [4]))
    time.sleep(0.2)
    assert pair.decode.events.empty() and not begun
    let.release()
    pair.decode.hear_bad_end(1, "ZeroDivisionError")
    pair.prefill.hear_end(1, "the other end has gone")
    pair.hush()


@pytest.mark.parametrize("seed", range(6))
def test_nothing_writes_the_pages_of_a_room_that_has_ended_whenever_its_link_goes_down(
    make_pair: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next owner paints the pages at once. The reads take their time, and either end may be the one that stops."""
    limit_transfers(monkeypatch, 2)
    rng, late, ranks = random.Random(seed), 0, [make_pair.rank() for _ in range(2)]
    for slow in (True, False, False, False):  # once, a read is under way for certain
        pair, pages = make_pair(rank=ranks[0], decode_rank=ranks[1]), rng.sample(range(1, NUM_PAGES), NUM_PAGES - 1)
        begun = make_late(pair, lambda slow=slow: time.sleep(0.1 if slow else rng.choice([0, 0, 0.02])))
        rooms = {uid: [pages.pop() for _ in range(rng.randint(1, 3))] for uid in range(5)}
        for uid, targets in rooms.items():
            pair.open(uid, targets)
        for uid, targets in rooms.items():
            pair.prefill.link.put(SendPages(uid, rng.sample(range(1, NUM_PAGES), len(targets)), targets))
            if rng.random() < 0.3:
                pair.decode.link.put(Cancel(uid))
            else:
                pair.prefill.link.put(SendLast(uid, uid, []))
        assert not slow or eventually(lambda begun=begun: bool(begun))
        time.sleep(rng.choice([0, 0.005, 0.01, 0.03]))
        rng.choice([pair.prefill, pair.decode]).link.stop()
        open_rooms, failed = set(rooms), set()
        while open_rooms:
            event = pair.decode.hear()
            assert event.uid in open_rooms
            if isinstance(event, RoomFailed):
                assert event.uid not in failed
                failed.add(event.uid)
                continue
            assert isinstance(event, RoomEnded)
            open_rooms.remove(event.uid)
            pair.decode.pool[:, rooms[event.uid]] = 1e6 + event.uid
        late += len(failed)
        pair.decode.hush()
        pair.decode.link._mover.join(SOON)
        assert pair.decode.link.in_flight == 0
        for uid, targets in rooms.items():
            assert (pair.decode.pool[:, targets] == 1e6 + uid).all(), f"room {uid} was written to after its end"
    assert late, "no link went down amid a read"
