"""Messages arrive as they were sent, in order; and each end finds out that the other has gone."""

import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from disagg.address import bind
from disagg.control import (
    Abort,
    Bye,
    Finish,
    Gone,
    Hello,
    Member,
    Ping,
    Pipe,
    RouterPort,
    Submit,
    Tokens,
    ToRouter,
    ToWorker,
    Update,
    Updates,
    WorkerPort,
    new_socket,
)
from disagg.handoff import Cancel, Closed, Knock, Last, Open, Sending
from disagg.request import Request
from tests.conftest import eventually

HOST = "127.0.0.1"
SOON_MS = 10_000
MEMBER = Member("é1", HOST, 7000, 65535)
REQUEST = Request(3, [0, 128_000, 7], 99, 0.75, 0.9, 40, 2**63 - 1, True, 20)
BY_DEFAULT = Request(4, [1])
UPDATE = Update(3, [5, 6], [[(5, -0.5), (9, -1.25)], []], "length")

TO_WORKER = (
    Submit(REQUEST, [MEMBER, Member("b", "h")]),
    Submit(BY_DEFAULT, None),
    Abort(2**40),
    Gone(["a", "b"]),
    Gone([]),
    Finish(),
    Finish("refused"),
    Ping(),
)
TO_ROUTER = (
    Hello("decode", [MEMBER, Member("b", "::1")], 64, 2**40, "5 layers", "a"),
    Updates([UPDATE, Tokens({7: 128_000, 2**40: 0}), Update(4, error="boom", retry=True), Update(5)]),
    Updates([]),
    Bye({"decode_steps": 3, "seconds": 0.125}),
    Bye({}),
)
ON_A_LINK = (
    Knock(MEMBER, 3),
    Open(REQUEST, [4, 1], [MEMBER]),
    Cancel(5),
    Sending([5], [9, 8]),
    Last(5, 128_000, [(128_000, -0.5)]),
    Closed(5, "the prompt\ndoes not fit"),
)


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """opened(thing) closes it at the end."""
    things = []

    def keep(thing: Any) -> Any:
        things.append(thing)
        return thing

    yield keep
    for thing in things:
        thing.close()


def hear(router: RouterPort, count: int) -> list[tuple[str, ToRouter]]:
    messages, deadline = [], time.monotonic() + SOON_MS / 1000
    while len(messages) < count and time.monotonic() < deadline:
        messages += router.poll(100)
    return messages


def meet(router: RouterPort, worker: WorkerPort) -> str:
    """The worker's id, once the router knows it."""
    worker.send(Bye({}))
    ((name, _),) = hear(router, 1)
    return name


def test_these_are_all_the_messages_there_are() -> None:
    """The tests below send one of every type at least."""
    for kind, examples in ((ToWorker, TO_WORKER), (ToRouter, TO_ROUTER)):
        assert set(kind.__args__) == {type(message) for message in examples}


def test_every_message_arrives_as_it_was_sent_and_in_order(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort("w", HOST, router.port))
    for message in TO_ROUTER:
        worker.send(message)
    assert hear(router, len(TO_ROUTER)) == [("w", message) for message in TO_ROUTER]
    for message in TO_WORKER:
        assert router.send("w", message)
    got = []
    while len(got) < len(TO_WORKER):
        got += (more := worker.poll(SOON_MS))
        assert more, "lost"
    assert got == list(TO_WORKER)
    assert [type(message) for message in got] == [type(message) for message in TO_WORKER]


def test_numbers_keep_their_type_on_the_way(opened: Any) -> None:
    """An integer given for a float must not stay one on some ranks only; a logprob's token must stay an integer."""
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort("w", HOST, router.port))
    worker.send(Updates([UPDATE]))
    ((_, updates),) = hear(router, 1)
    token, logprob = updates.updates[0].logprobs[0][0]
    assert type(token) is int and type(logprob) is float
    router.send("w", Submit(Request(1, [1], temperature=1, top_p=1), None))
    (submit,) = worker.poll(SOON_MS)
    assert type(submit.request.temperature) is float and type(submit.request.top_p) is float


def test_the_messages_of_a_link_arrive_as_they_were_sent(opened: Any) -> None:
    one = opened(Pipe(new_socket(zmq.DEALER), Knock | Open | Cancel | Sending | Last | Closed))
    other = opened(Pipe(new_socket(zmq.DEALER), Knock | Open | Cancel | Sending | Last | Closed))
    other.sock.connect(f"tcp://{HOST}:{bind(one.sock, HOST)}")
    for message in ON_A_LINK:
        other.send(message)
    got = []
    while len(got) < len(ON_A_LINK):
        got += (more := one.poll(SOON_MS))
        assert more, "lost"
    assert got == list(ON_A_LINK)


def test_a_message_of_the_wrong_kind_is_dropped_alone(opened: Any) -> None:
    one, other = opened(Pipe(new_socket(zmq.DEALER), Cancel)), opened(Pipe(new_socket(zmq.DEALER), Cancel))
    other.sock.connect(f"tcp://{HOST}:{bind(one.sock, HOST)}")
    other.send(Sending([5], [9]))
    other.sock.send(b"junk")
    other.send(Cancel(6))
    got = []
    while not got:
        got = one.poll(20_000)
    assert got == [Cancel(6)]


def test_each_worker_gets_what_was_meant_for_it(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    workers = {name: opened(WorkerPort(name, HOST, router.port)) for name in ("a", "b", "é")}
    for name, worker in workers.items():
        assert meet(router, worker) == name
    meant = {name: [] for name in workers}
    rng = random.Random(0)
    for uid in range(50):
        name = rng.choice(sorted(workers))
        assert router.send(name, Abort(uid))
        meant[name].append(Abort(uid))
    for name, worker in workers.items():
        got = []
        while len(got) < len(meant[name]):
            got += (more := worker.poll(SOON_MS))
            assert more, "lost"
        assert got == meant[name]


def test_a_poll_that_nothing_comes_to_ends_in_time(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort("w", HOST, router.port))
    start = time.monotonic()
    assert router.poll(50) == [] and worker.poll(50) == [] and worker.poll() == []
    worker.wait(50)
    assert 0.14 < time.monotonic() - start < 5


def test_wait_returns_once_a_message_is_there_and_leaves_it(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort("w", HOST, router.port))
    meet(router, worker)
    router.send("w", Ping())
    start = time.monotonic()
    worker.wait(SOON_MS)
    assert time.monotonic() - start < SOON_MS / 2000
    assert worker.poll() == [Ping()]


def test_sending_to_somebody_unknown_says_so(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    assert not router.send("nobody", Ping())


def test_sending_to_a_worker_that_has_left_says_so(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker, other = WorkerPort("w", HOST, router.port), opened(WorkerPort("other", HOST, router.port))
    meet(router, worker)
    meet(router, other)
    assert router.send("w", Ping())
    worker.close()
    assert eventually(lambda: not router.send("w", Ping()))
    assert router.send("other", Ping())


def test_a_worker_knows_when_the_router_has_gone(opened: Any) -> None:
    router = RouterPort(HOST, 0)
    worker = opened(WorkerPort("w", HOST, router.port))
    meet(router, worker)
    assert not worker.gone
    router.close()
    assert eventually(lambda: worker.gone)


def test_a_worker_may_come_before_the_router(opened: Any) -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    worker = opened(WorkerPort("w", HOST, port))
    worker.send(TO_ROUTER[0])
    time.sleep(0.5)  # it tries in vain
    assert not worker.gone, "the router cannot be gone before it came"
    router = opened(RouterPort(HOST, port))
    assert router.port == port
    assert hear(router, 1) == [("w", TO_ROUTER[0])]
    assert router.send("w", Ping()) and worker.poll(SOON_MS) == [Ping()]
    assert not worker.gone
