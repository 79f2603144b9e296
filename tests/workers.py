"""Replicas whose part a test plays, and a router that they join over its real port."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from disagg.control.messages import Bye, Finish, Hello, Member, Submit, ToRouter, Update, Updates
from disagg.control.ports import RouterPort, WorkerPort
from disagg.control.pulse import Beacon
from disagg.front.answer import Answer
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.front.tokenizer import load_tokenizer
from disagg.request import Request
from tests.clients import listed
from tests.conftest import ROOT, eventually

HOST = "127.0.0.1"
SOON_S = 20
VOCAB_SIZE = 4096


class Worker:
    """A replica whose part the test plays, without a beacon: it must be done before its silence counts."""

    def __init__(self, hello: Hello, port: int) -> None:
        self.port = WorkerPort(hello, HOST, port)
        self._heard = self.port.poll(1000 * SOON_S)  # now it is connected, and Hello is on its way

    def joined(self) -> bool:
        self._heard += self.port.poll(10)
        return self.port.welcomed

    def hear(self, kind: type) -> msgspec.Struct:
        """The next message of this kind; those before it are forgotten."""
        deadline = time.monotonic() + SOON_S
        while time.monotonic() < deadline:
            self._heard += self.port.poll(0 if self._heard else 100)
            while self._heard:
                if isinstance(message := self._heard.pop(0), kind):
                    return message
        raise AssertionError(f"no {kind.__name__} in {SOON_S} s")

    def has(self, kind: type) -> bool:
        """Has one come that was not heard yet?"""
        return any(isinstance(message, kind) for message in self._heard)

    def send(self, message: ToRouter) -> None:
        self.port.send(message)

    def close(self) -> None:
        self.port.close()


def replica(name: str, role: str, port: int, job: str | None = None, kv_tokens: int = 640, **more: Any) -> Worker:
    """`job`: one of its own, unless said otherwise."""
    hello = Hello(role, [Member(name, HOST)], 4, 64, kv_tokens, {"layers": "5"}, job or name)
    return Worker(msgspec.structs.replace(hello, **more), port)


def joining(name: str, role: str, router: Router, *more: Any, **others: Any) -> Worker:
    """A replica of a router that runs, which has welcomed it."""
    worker = replica(name, role, router.port.port, *more, **others)
    assert eventually(worker.joined)
    return worker


def hear(worker: Worker, kind: type) -> msgspec.Struct:
    return worker.hear(kind)


def make_router(port: RouterPort, stopped: Callable[[], bool] = lambda: False, config: str = "") -> Router:
    return Router(port, load_tokenizer(ROOT / "model/tiny").tokenizer, VOCAB_SIZE, stopped, config=config)


@contextmanager
def serving(*requests: Request | UserRequest, config: str = "") -> Iterator[tuple[Router, dict[int, Answer]]]:
    """A router with these requests, in a thread; its answers. It must have ended after the block."""
    port, answers = RouterPort(HOST, 0), {}
    router = make_router(port, config=config)
    users = [one if isinstance(one, UserRequest) else UserRequest("x", one, []) for one in requests]
    work = listed(users, answers.__setitem__)
    thread = threading.Thread(target=lambda: router.run(work), daemon=True)
    thread.start()
    yield router, answers
    thread.join(SOON_S)
    assert not thread.is_alive()
    port.close()


def fail(decode: Worker, submit: Submit) -> Submit:
    """The link to its prefill replica breaks; where it is tried next."""
    decode.send(Updates([Update(submit.request.uid, error="link down", retry=True)]))
    return hear(decode, Submit)


def finish(decode: Worker, submit: Submit, *others: Worker) -> None:
    decode.send(Updates([Update(submit.request.uid, [9], finish="length")]))
    for worker in (decode, *others):
        hear(worker, Finish)
        worker.send(Bye({}))
        worker.close()


class Beating(Worker):
    """With a beacon whose turn the test counts up."""

    def __init__(self, hello: Hello, port: int) -> None:
        super().__init__(hello, port)
        self.beacon = Beacon(hello.members[0].id, HOST, port)
        self.ended = threading.Event()
        threading.Thread(target=self._turn, daemon=True).start()

    def _turn(self) -> None:
        while not self.ended.wait(0.05):
            self.beacon.turn += self.turns

    turns = 1

    def close(self) -> None:
        self.ended.set()
        self.beacon.close()
        super().close()


def waits(worker: Worker, kind: type) -> bool:
    """Nothing of that kind comes for a while."""
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        worker.joined()
    return not worker.has(kind)
