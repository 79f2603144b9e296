"""Messages between a router and a replica arrive once and in order, whatever happens to their connection.

And each end notices when the other has gone.
"""

import random
import socket
import time
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.control.messages import Abort, Bye, Forget, Hello, Member, Ping, Tokens, ToRouter, ToWorker, Updates, encode
from disagg.control.ports import POLLED_BYTES, RouterPort, WorkerPort
from disagg.control.session import Header, Session
from tests.conftest import eventually
from tests.proxy import Proxy

HOST = "127.0.0.1"
SOON_MS = 10_000


def hello(name: str) -> Hello:
    return Hello("decode", [Member(name, HOST)], 4, 64, 640, {}, name)


def hear(router: RouterPort, count: int) -> list[tuple[str, ToRouter]]:
    messages, deadline = [], time.monotonic() + SOON_MS / 1000
    while len(messages) < count and time.monotonic() < deadline:
        messages += router.poll(100)
    return messages


def hear_worker(worker: WorkerPort, count: int) -> list[ToWorker | Forget]:
    messages, deadline = [], time.monotonic() + SOON_MS / 1000
    while len(messages) < count and time.monotonic() < deadline:
        messages += worker.poll(100)
    return messages


def meet(router: RouterPort, worker: WorkerPort) -> str:
    """The worker's id, once both are in a session."""
    assert not worker.poll(SOON_MS)
    ((name, message),) = hear(router, 1)
    assert isinstance(message, Hello)
    router.admit(name)
    assert eventually(lambda: not worker.poll(10) and worker.welcomed)
    return name


# ---- a session


class Wire:
    """Two ends of a session, and what is on its way between them. A cut loses all of that."""

    def __init__(self) -> None:
        self.ends, self.said = (Session("s"), Session("s")), ([], [])
        self.under_way: tuple[list, list] = ([], [])  # towards each end
        self.heard: tuple[list, list] = ([], [])

    def say(self, end: int) -> None:
        body = b"%d" % len(self.said[end])
        self.said[end].append(body)
        self.under_way[1 - end].append((self.ends[end].number(body), body))

    def deliver(self, end: int) -> None:
        if self.under_way[end]:
            header, body = self.under_way[end].pop(0)
            if self.ends[end].hear(header):
                self.heard[end].append(body)

    def cut(self) -> None:
        for end in (0, 1):
            self.under_way[end].clear()
        for end in (0, 1):  # each greets the other with what it has heard, and says the rest again
            self.ends[1 - end].hear(self.ends[end].unnumbered)
        for end in (0, 1):
            self.under_way[1 - end].extend(self.ends[end].again())


@given(st.lists(st.sampled_from(["say 0", "say 1", "deliver 0", "deliver 1", "deliver 0", "deliver 1", "cut"])))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_session_loses_nothing_and_says_nothing_twice(ops: list[str]) -> None:
    wire = Wire()
    for op in ops:
        name, *end = op.split()
        getattr(wire, name)(*map(int, end))
        for end in (0, 1):
            assert wire.heard[end] == wire.said[1 - end][: len(wire.heard[end])], "out of order, or twice"
    wire.cut()
    for end in (0, 1):
        while wire.under_way[end]:
            wire.deliver(end)
        assert wire.heard[end] == wire.said[1 - end], "lost"
    for end in (0, 1):
        wire.ends[end].hear(wire.ends[1 - end].unnumbered)
        assert not wire.ends[end].again(), "kept, though it was heard"


def test_after_a_gap_nothing_is_taken_until_it_is_filled() -> None:
    session = Session("s")
    assert session.hear(Header("s", 1)) and not session.hear(Header("s", 3)) and not session.hear(Header("s", 1))
    assert session.hear(Header("s", 2)) and session.hear(Header("s", 3))


# ---- ports


def test_each_worker_gets_what_was_meant_for_it_in_order(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    workers = {name: opened(WorkerPort(hello(name), HOST, router.port)) for name in ("a", "b", "é")}
    for name, worker in workers.items():
        assert meet(router, worker) == name
    meant = {name: [] for name in workers}
    rng = random.Random(0)
    for uid in range(50):
        name = rng.choice(sorted(workers))
        assert router.send(name, Abort(uid))
        meant[name].append(Abort(uid))
    for name, worker in workers.items():
        assert hear_worker(worker, len(meant[name])) == meant[name]


def test_cut_connections_lose_nothing_in_either_direction(opened: Any) -> None:
    """Both ends talk all the while. A worker that is away is told when it is back."""
    router = opened(RouterPort(HOST, 0))
    proxy = opened(Proxy(router.port))
    worker = opened(WorkerPort(hello("w"), HOST, proxy.port))
    meet(router, worker)
    said, to_router, to_worker = 0, [], []
    for _ in range(6):
        for _ in range(40):
            worker.send(Updates([Tokens({said: 0})]))
            router.send("w", Abort(said))
            said += 1
            to_router += router.poll(0)
            to_worker += worker.poll()
        proxy.cut()
        deadline = time.monotonic() + SOON_MS / 1000
        while len(to_router) < said // 2 and time.monotonic() < deadline:
            to_router += router.poll(1)
            to_worker += worker.poll(1)
    deadline = time.monotonic() + SOON_MS / 1000
    while (len(to_router) < said or len(to_worker) < said) and time.monotonic() < deadline:
        to_router += router.poll(10)
        to_worker += worker.poll(10)
    assert to_router == [("w", Updates([Tokens({i: 0})])) for i in range(said)]
    assert to_worker == [Abort(i) for i in range(said)]


def test_what_was_said_to_one_router_never_reaches_the_next(opened: Any) -> None:
    """It took the address of the first. The worker hears that it is another one, and is in a new session with it."""
    first = RouterPort(HOST, 0)
    worker = opened(WorkerPort(hello("w"), HOST, first.port))
    meet(first, worker)
    for uid in range(5):
        worker.send(Updates([Tokens({uid: 7})]))
    port = first.port
    first.close()
    assert eventually(lambda: not worker.poll(10) and worker.lost_s > 0)
    worker.send(Updates([Tokens({5: 7})]))
    second = opened(RouterPort(HOST, port))
    came = []

    def greeted() -> bool:
        assert not worker.poll(10)
        came.extend(second.poll(10))
        return bool(came)

    assert eventually(greeted)
    assert [(name, type(message)) for name, message in came] == [("w", Hello)]
    second.admit("w")
    assert hear_worker(worker, 1) == [Forget()] and worker.lost_s == 0
    worker.send(Updates([Tokens({6: 8})]))
    assert hear(second, 1) == [("w", Updates([Tokens({6: 8})]))]


def test_a_worker_that_was_given_up_is_not_believed_until_it_is_admitted_anew(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    meet(router, worker)
    router.dismiss("w")
    worker.send(Updates([Tokens({1: 7})]))
    assert not router.poll(300)
    router.admit("w")
    assert hear_worker(worker, 1) == [Forget()]
    worker.send(Updates([Tokens({2: 7})]))
    assert hear(router, 1) == [("w", Updates([Tokens({2: 7})]))]


def stranger(port: int, name: bytes, opened: Any) -> zmq.Socket:
    sock = opened(zmq.Context.instance().socket(zmq.DEALER))
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.IDENTITY, name)
    sock.connect(f"tcp://{HOST}:{port}")
    return sock


def test_a_stranger_is_not_heard_and_ends_nothing(opened: Any, capsys: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    meet(router, worker)
    sock, header = stranger(router.port, b"s", opened), encode(Header("guessed", 1, 0))
    for frames in ([b""], [b"junk", b"junk"], [header, b"\x91" * 200_000], [header] * 3, [encode(7), encode(Bye({}))]):
        sock.send_multipart(frames)
    stranger(router.port, b"\xff\xfe", opened).send_multipart([header, encode(Bye({}))])
    for message in (Updates([Tokens({1: 7})]), Bye({})):
        sock.send_multipart([header, encode(message)])

    def refused() -> int:
        assert not router.poll(50)
        return router.refusals.count

    assert eventually(lambda: refused() == 6) and not router.poll(200) and router.refusals.count == 6
    assert capsys.readouterr().err.count("router: a message that is not a worker's was refused: ") == 1
    worker.send(Bye({}))
    assert hear(router, 1) == [("w", Bye({}))]


def test_one_poll_takes_in_a_bounded_number_of_bytes(opened: Any) -> None:
    """They are decoded then; the rest waits as it came."""
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    meet(router, worker)
    message = Updates([Tokens(dict.fromkeys(range(10**9, 10**9 + 100_000), 1))])
    size, count = len(encode(message)), 40
    for _ in range(count):
        worker.send(message)
    came, polls = 0, 0
    while came < count:
        got = len(router.poll(SOON_MS))
        assert 0 < got <= POLLED_BYTES // size + 1
        came, polls = came + got, polls + 1
    assert polls >= count * size // POLLED_BYTES


def test_a_poll_that_nothing_comes_to_ends_in_time(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    meet(router, worker)
    start = time.monotonic()
    assert router.poll(50) == [] and worker.poll(50) == [] and worker.poll() == []
    worker.wait(50)
    assert 0.14 < time.monotonic() - start < 5


def test_wait_returns_once_a_message_is_there_and_leaves_it(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    meet(router, worker)
    router.send("w", Abort(5))
    start = time.monotonic()
    worker.wait(SOON_MS)
    assert time.monotonic() - start < SOON_MS / 2000
    assert worker.poll() == [Abort(5)]


def test_somebody_unknown_is_not_connected(opened: Any) -> None:
    assert not opened(RouterPort(HOST, 0)).ping("nobody")


def test_a_worker_that_has_left_is_not_connected(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker, other = (WorkerPort(hello(name), HOST, router.port) for name in ("w", "other"))
    opened(other)
    for one in (worker, other):
        meet(router, one)
    assert router.ping("w")
    worker.close()
    assert eventually(lambda: not router.ping("w"))
    assert not router.send("w", Ping()) and router.ping("other") and router.send("other", Abort(1))


def test_a_worker_knows_when_the_router_has_gone(opened: Any) -> None:
    router = RouterPort(HOST, 0)
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    meet(router, worker)
    assert worker.lost_s == 0
    router.close()
    assert eventually(lambda: not worker.poll(10) and worker.lost_s > 0.2)


def test_a_welcome_that_is_read_late_hides_no_death(opened: Any) -> None:
    """The router welcomed a worker and died, while that was in a step."""
    router = RouterPort(HOST, 0)
    worker = opened(WorkerPort(hello("w"), HOST, router.port))
    assert not worker.poll(SOON_MS) and hear(router, 1)
    router.admit("w")
    router.close()
    time.sleep(0.3)
    assert not worker.poll() and worker.welcomed
    assert eventually(lambda: not worker.poll(10) and worker.lost_s > 0)


def test_a_worker_may_come_before_the_router(opened: Any) -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    worker = opened(WorkerPort(hello("w"), HOST, port))
    assert not worker.poll(500)  # it tries in vain
    assert not worker.welcomed and worker.lost_s == 0, "the router cannot be gone before it came"
    router = opened(RouterPort(HOST, port))
    assert router.port == port
    meet(router, worker)
    assert router.send("w", Abort(1)) and hear_worker(worker, 1) == [Abort(1)]


def test_a_port_in_use_is_refused_with_its_address(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    with pytest.raises(ValueError, match=f"cannot listen on {HOST}:{router.port}: Address already in use"):
        opened(RouterPort(HOST, router.port))


def test_a_host_that_is_not_mine_cannot_be_listened_on() -> None:
    with pytest.raises(ValueError, match="cannot listen on 192.0.2.1:7000"):
        RouterPort("192.0.2.1", 7000)
