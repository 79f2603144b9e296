"""The router over its real port: what it says while nobody comes, and whom a retry goes to."""

import threading
import time
from collections.abc import Callable

import msgspec
import pytest

from disagg import router as module
from disagg.control import Bye, Finish, Hello, Member, RouterPort, Submit, Tokens, Update, Updates, WorkerPort
from disagg.request import Request, UserRequest
from disagg.router import Answer, Router
from disagg.tokenizer import load_tokenizer
from tests.conftest import ROOT

HOST = "127.0.0.1"
SOON_S = 20


def replica(name: str, role: str, port: int) -> WorkerPort:
    worker = WorkerPort(name, HOST, port)
    worker.send(Hello(role, [Member(name, HOST)], 4, 640, "kv"))
    return worker


def hear(worker: WorkerPort, kind: type) -> msgspec.Struct:
    """The next message of this kind."""
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        for message in worker.poll(100):
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} in {SOON_S} s")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_retry_does_not_go_to_the_prefill_replica_that_has_just_died() -> None:
    """Its links break at once; the router would find out by its next ping, up to a second later."""
    port, answers = RouterPort(HOST, 0), {}
    router = Router(port, load_tokenizer(ROOT / "model/tiny").tokenizer, lambda: False)
    request = UserRequest("x", Request(0, [5, 6, 7], 1), [])

    def serve() -> None:
        router.run([request], lambda position, answer: answers.setdefault(position, answer))

    prefills = {name: replica(name, "prefill", port.port) for name in ("a", "b")}
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    until(lambda: len(router.replicas) == 2)
    decode = replica("d", "decode", port.port)
    first = hear(decode, Submit)
    dead = first.prefill[0].id
    prefills.pop(dead).close()
    decode.send(Updates([Update(first.request.uid, error="link down", retry=True)]))
    second = hear(decode, Submit)
    assert [member.id for member in second.prefill] == list(prefills)
    decode.send(Updates([Update(second.request.uid, [9], finish="length")]))
    for worker in (decode, *prefills.values()):
        hear(worker, Finish)
        worker.send(Bye({}))
        worker.close()
    thread.join(SOON_S)
    assert not thread.is_alive()
    port.close()
    answer: Answer = answers[0]
    assert answer.error is None and answer.token_ids == [9] and router.metrics.retries == 1


@pytest.mark.parametrize(
    ("joined", "missing"), [((), "prefill and a decode"), (("decode",), "prefill"), (("prefill",), "decode")]
)
def test_it_says_what_it_waits_for(tiny, monkeypatch, capsys, joined, missing) -> None:
    """At 0.2 s, at 0.6 s, and not again before 1.8 s."""
    monkeypatch.setattr(module, "NOTICE_S", 0.2)
    monkeypatch.setattr(module, "FAREWELL_S", 0.1)
    port, end = RouterPort(HOST, 0), time.monotonic() + 1.2
    workers = [replica(role, role, port.port) for role in joined]
    router = Router(port, load_tokenizer(tiny).tokenizer, lambda: time.monotonic() > end)
    answers = {}
    router.run([UserRequest(i, Request(i, [5], 2), []) for i in range(3)], answers.__setitem__)
    for one in (*workers, port):
        one.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert lines == [f"router: 3 requests still waiting for a {missing} replica"] * 2
    assert [answer.error for answer in answers.values()] == ["interrupted"] * 3


def test_ctrl_c_that_the_replica_sees_first_is_no_failure(tiny) -> None:
    """Its goodbye comes between a token and the router's own look at the interrupt."""
    port, answers, interrupt = RouterPort(HOST, 0), {}, threading.Event()
    worker = replica("u", "unified", port.port)
    router = Router(port, load_tokenizer(tiny).tokenizer, interrupt.is_set)
    request = UserRequest("x", Request(0, [5, 6, 7], 4), [])

    def show(position: int, piece: str) -> None:
        if shown:
            interrupt.set()
        else:
            time.sleep(0.5)  # until the next token and the goodbye wait to be read together
        shown.append(piece)

    shown: list[str] = []

    def serve() -> None:
        router.run([request], answers.__setitem__, show)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    uid = hear(worker, Submit).request.uid
    token = load_tokenizer(tiny).tokenizer.encode(" the").ids[-1]
    for _ in range(2):
        worker.send(Updates([Tokens({uid: token})]))
    worker.send(Bye({}))
    thread.join(SOON_S)
    assert not thread.is_alive() and answers[0].error == "interrupted" and answers[0].token_ids
    worker.close()
    port.close()
