"""A link's pipe carries its messages in order between its two ends, and to no other process."""

import gc
import socket
import time
from collections.abc import Iterator

import pytest
import zmq
from torch.distributed import Store

from disagg.control.messages import Member, encode
from disagg.handoff.connect import Door, dial, listen
from disagg.handoff.pipe import DOUBT_S, Pipe
from disagg.handoff.protocol import Cancel, Sending
from disagg.handoff.transport import Transport
from scripts.tools.demo import free_port
from tests.conftest import eventually
from tests.worlds import run_world

HOST = "127.0.0.1"
SOON_MS = 10_000


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, Pipe]]:
    """The end that listens and the one that connected, which have met."""
    listening = Pipe.listen(HOST, "link", Cancel)
    connecting = Pipe.connect(HOST, listening.port, "link", Cancel | Sending)
    assert eventually(lambda: listening.is_met)
    yield listening, connecting
    for end in (listening, connecting):
        end.close()


def hear(pipe: Pipe, count: int) -> list:
    messages = []
    while len(messages) < count:
        messages += (more := pipe.poll(SOON_MS))
        if not more and not pipe.sock.poll(0):
            break
    return messages


def stranger(port: int, name: bytes) -> zmq.Socket:
    sock = zmq.Context.instance().socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.IDENTITY, name)
    sock.connect(f"tcp://{HOST}:{port}")
    return sock


def test_messages_arrive_in_order_both_ways(ends: tuple[Pipe, Pipe]) -> None:
    for one, other in (ends, ends[::-1]):
        for uid in range(20):
            one.send(Cancel(uid))
        got = []
        deadline = time.monotonic() + SOON_MS / 1000
        while len(got) < 20 and time.monotonic() < deadline:
            got += other.poll(100)
        assert got == [Cancel(uid) for uid in range(20)]


def test_a_stranger_gets_nothing_and_is_not_heard(ends: tuple[Pipe, Pipe]) -> None:
    """Merely being connected to a socket that deals its messages out would be enough to take some."""
    listening, connecting = ends
    strangers = [stranger(listening.port, name) for name in (b"a", b"b", b"link")]
    for sock in strangers:
        sock.send_multipart([(1).to_bytes(8, "little"), encode(Cancel(99))])
        sock.send(b"junk")
    time.sleep(0.3)
    assert listening.poll() == []
    for uid in range(30):
        listening.send(Cancel(uid))
        connecting.send(Cancel(uid))
    for end in ends:
        got, deadline = [], time.monotonic() + SOON_MS / 1000
        while len(got) < 30 and time.monotonic() < deadline:
            got += end.poll(100)
        assert got == [Cancel(uid) for uid in range(30)]
    for sock in strangers:
        assert not sock.poll(0)
        sock.close()


def test_who_connects_and_leaves_takes_nothing_down(ends: tuple[Pipe, Pipe]) -> None:
    """A port scanner, a health check, a peer that speaks ZeroMQ."""
    listening, connecting = ends
    for _ in range(3):
        socket.create_connection((HOST, listening.port)).close()
    stranger(listening.port, b"x").close()
    assert eventually(lambda: listening.monitor.poll(0) != 0)
    end = time.monotonic() + DOUBT_S + 0.3
    while time.monotonic() < end:
        assert not listening.has_gone
        time.sleep(0.01)
    assert listening.patience_ms is None and not connecting.has_gone
    connecting.send(Cancel(1))
    assert listening.poll(SOON_MS) == [Cancel(1)]


@pytest.mark.parametrize("which", (0, 1), ids=("listens", "connected"))
def test_the_end_that_stays_finds_out(which: int) -> None:
    listening = Pipe.listen(HOST, "link", Cancel)
    ends = listening, Pipe.connect(HOST, listening.port, "link", Cancel)
    assert eventually(lambda: listening.is_met) and not any(end.has_gone for end in ends)
    listening.send(Cancel(1))
    assert ends[1].poll(SOON_MS) == [Cancel(1)]
    ends[1 - which].close()
    assert eventually(lambda: ends[which].monitor.poll(0) != 0)
    assert eventually(lambda: ends[which].has_gone, DOUBT_S)
    ends[which].close()


def test_what_was_said_before_leaving_is_heard(ends: tuple[Pipe, Pipe]) -> None:
    listening = Pipe.listen(HOST, "link", Cancel)
    connecting = Pipe.connect(HOST, listening.port, "link", Cancel)
    connecting.send(Cancel(5))
    connecting.close()
    assert eventually(lambda: listening.monitor.poll(0) != 0)
    assert listening.poll(SOON_MS) == [Cancel(5)] or listening.poll(SOON_MS) == [Cancel(5)]
    listening.close()


def test_a_gap_ends_it(ends: tuple[Pipe, Pipe]) -> None:
    listening, connecting = ends
    connecting.send(Cancel(1))
    connecting._said += 1  # one is lost
    connecting.send(Cancel(3))
    with pytest.raises(ConnectionError, match="message 2 of the other end is missing"):
        hear(listening, 2)


@pytest.mark.parametrize("body", (b"junk", encode(Sending([5], [9])), b"\x91" * 200_000))
def test_what_is_no_message_ends_it(ends: tuple[Pipe, Pipe], body: bytes) -> None:
    listening, connecting = ends
    connecting._send((1).to_bytes(8, "little"), body)
    with pytest.raises(ConnectionError, match="message 1 of the other end: not a message"):
        listening.poll(SOON_MS)


def test_sending_to_nobody_is_an_error() -> None:
    pipe = Pipe.listen(HOST, "link", Cancel)
    with pytest.raises(ConnectionError, match="has gone"):
        pipe.send(Cancel(1))
    assert not pipe.is_met
    pipe.close()


class NoTransport:
    about = "none"

    def connect(self, store: Store, me: int) -> Transport:
        raise RuntimeError(f"member {me} finds nobody")


def connect_in_vain(rank: int) -> None:
    door, key = Door(HOST), "link"
    door.store.set(f"{key}/pipe", str(free_port()))  # that of a prefill rank that has died meanwhile
    prefill, me = Member("prefill", HOST, door.port, door.store.port), Member("decode", HOST)
    for connect in (listen(door.store.port, HOST, NoTransport()), dial(prefill, me, NoTransport())):
        with pytest.raises(RuntimeError, match="finds nobody"):
            connect(key)
    gc.collect()
    listening = Pipe.listen(HOST, "other", Cancel)
    connecting = Pipe.connect(HOST, listening.port, "other", Cancel)
    assert eventually(lambda: listening.is_met), "ZeroMQ's thread stands still"
    for end in (listening, connecting, door):
        end.close()


def test_a_link_that_finds_no_peer_stops_no_other_connection() -> None:
    run_world(1, connect_in_vain, timeout_s=60)
