"""The router over its real port: what it says while nobody comes, and whom a retry goes to."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from disagg import router as module
from disagg.control import Bye, Finish, Hello, Member, RouterPort, Submit, Tokens, Update, Updates, WorkerPort
from disagg.metrics import percentile
from disagg.request import Request, UserRequest
from disagg.router import Answer, Router
from disagg.source import Listed
from disagg.tokenizer import load_tokenizer
from tests.conftest import ROOT, eventually

HOST = "127.0.0.1"
SOON_S = 20


def replica(name: str, role: str, port: int, job: str | None = None, kv_tokens: int = 640) -> WorkerPort:
    """`job`: one of its own, unless said otherwise."""
    worker = WorkerPort(name, HOST, port)
    worker.send(Hello(role, [Member(name, HOST)], 4, kv_tokens, "kv", job or name))
    return worker


def hear(worker: WorkerPort, kind: type) -> msgspec.Struct:
    """The next message of this kind."""
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        for message in worker.poll(100):
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} in {SOON_S} s")


@contextmanager
def serving(request: Request) -> Iterator[tuple[Router, dict[int, Answer]]]:
    """A router with one request, in a thread; its answers. It must have ended after the block."""
    port, answers = RouterPort(HOST, 0), {}
    router = Router(port, load_tokenizer(ROOT / "model/tiny").tokenizer, lambda: False)
    work = [UserRequest("x", request, [])]
    thread = threading.Thread(target=lambda: router.run(Listed(work), answers.__setitem__), daemon=True)
    thread.start()
    yield router, answers
    thread.join(SOON_S)
    assert not thread.is_alive()
    port.close()


def fail(decode: WorkerPort, submit: Submit) -> Submit:
    """The link to its prefill replica breaks; where it is tried next."""
    decode.send(Updates([Update(submit.request.uid, error="link down", retry=True)]))
    return hear(decode, Submit)


def finish(decode: WorkerPort, submit: Submit, *others: WorkerPort) -> None:
    decode.send(Updates([Update(submit.request.uid, [9], finish="length")]))
    for worker in (decode, *others):
        hear(worker, Finish)
        worker.send(Bye({}))
        worker.close()


def test_a_retry_does_not_go_to_the_prefill_replica_that_has_just_died() -> None:
    """Its links break at once; the router would find out by its next ping, up to a second later."""
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        prefills = {name: replica(name, "prefill", router.port.port) for name in ("a", "b")}
        assert eventually(lambda: len(router.replicas) == 2)
        decode = replica("d", "decode", router.port.port)
        first = hear(decode, Submit)
        prefills.pop(first.prefill[0].id).close()
        second = fail(decode, first)
        assert [member.id for member in second.prefill] == list(prefills)
        finish(decode, second, *prefills.values())
    assert answers[0].error is None and answers[0].token_ids == [9] and router.metrics.retries == 1


def test_a_retry_goes_to_another_job() -> None:
    """Of a job that loses a rank, the other replicas are still there for a while, and idle."""
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        prefills = [replica(name, "prefill", router.port.port, "ab") for name in ("a", "b")]
        assert eventually(lambda: len(router.replicas) == 2)
        decode = replica("d", "decode", router.port.port)
        first = hear(decode, Submit)
        prefills.append(replica("c", "prefill", router.port.port))
        assert eventually(lambda: len(router.replicas) == 4)
        second = fail(decode, first)
        assert [member.id for member in second.prefill] == ["c"]
        finish(decode, second, *prefills)
    assert answers[0].error is None


def test_a_retry_waits_before_it_goes_where_it_failed(monkeypatch) -> None:
    """There is nobody else: a link may have broken between two replicas that live."""
    monkeypatch.setattr(module, "SUSPECT_S", 0.5)
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        decode, prefill = (replica(role, role, router.port.port) for role in ("decode", "prefill"))
        first, start = hear(decode, Submit), time.monotonic()
        second = fail(decode, first)
        assert time.monotonic() - start >= 0.5 and [member.id for member in second.prefill] == ["prefill"]
        finish(decode, second, prefill)
    assert answers[0].error is None


def test_a_job_that_has_lost_a_replica_gets_nothing_more(capsys) -> None:
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        dying = {name: replica(name, "decode", router.port.port, "ab") for name in ("a", "b")}
        assert eventually(lambda: len(router.replicas) == 2)
        prefill = replica("p", "prefill", router.port.port)
        assert eventually(lambda: any(one.requests for one in router.replicas.values()))
        dying.pop(next(name for name, one in router.replicas.items() if one.requests)).close()
        other = replica("c", "decode", router.port.port)
        submit = hear(other, Submit)
        (left,) = dying.values()
        finish(other, submit, prefill, left)
    assert answers[0].error is None
    assert "a decode replica died; 1 requests were on it" in capsys.readouterr().err


def test_the_requests_on_a_prefill_replica_are_counted(capsys) -> None:
    with serving(Request(0, [5, 6, 7], 1)) as (router, _):
        decode, prefill = (replica(role, role, router.port.port) for role in ("decode", "prefill"))
        submit = hear(decode, Submit)
        prefill.close()
        assert eventually(lambda: len(router.replicas) == 1)
        finish(decode, submit)
    assert "a prefill replica died; 1 requests were on it" in capsys.readouterr().err


@pytest.mark.parametrize("small_role", ["decode", "prefill"])
@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_a_request_goes_where_it_fits(small_role: str, order: tuple[str, str]) -> None:
    """150 + 60 tokens do not fit into 128 of KV, and 640 are there; nor does the prompt alone."""
    other = "prefill" if small_role == "decode" else "decode"
    with serving(Request(0, [5] * 150, 60)) as (router, answers):
        sized = {n: replica(n, small_role, router.port.port, None, {"small": 128, "large": 640}[n]) for n in order}
        assert eventually(lambda: len(router.replicas) == 2)
        partner = replica("partner", other, router.port.port)
        decode, rest = (partner, sized.values()) if other == "decode" else (sized["large"], [partner, sized["small"]])
        submit = hear(decode, Submit)
        assert other == "prefill" or [member.id for member in submit.prefill] == ["large"]
        finish(decode, submit, *rest)
    assert answers[0].error is None


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
    router.run(Listed(UserRequest(i, Request(i, [5], 2), []) for i in range(3)), answers.__setitem__)
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
        router.run(Listed([request]), answers.__setitem__, show)

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


def test_percentiles_are_the_nearest_ranks() -> None:
    values = [float(x) for x in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0, 0.5, 0.99, 1)] == [1, 50, 99, 100]
    assert percentile([7.0], 0.99) == 7 and math.isnan(percentile([], 0.5))


def test_answers_that_cannot_be_delivered_blame_no_replica() -> None:
    """The first of two fails on its way to the user; the replica goes home meanwhile."""
    port, delivered = RouterPort(HOST, 0), []
    router = Router(port, load_tokenizer(ROOT / "model/tiny").tokenizer, lambda: False)

    def deliver(position: int, answer: Answer) -> None:
        delivered.append(answer)
        raise ValueError("the disk is full")

    def serve() -> None:
        with pytest.raises(ValueError, match="the disk is full"):
            router.run(Listed(UserRequest(i, Request(i, [5], 1), []) for i in range(2)), deliver)
        ended.set()

    ended, worker = threading.Event(), replica("u", "unified", port.port)
    threading.Thread(target=serve, daemon=True).start()
    first = hear(worker, Submit)
    worker.send(Updates([Update(first.request.uid, [9], finish="length")]))
    hear(worker, Finish)
    worker.send(Bye({}))
    assert ended.wait(SOON_S)
    assert [answer.error for answer in delivered] == [None]
    worker.close()
    port.close()
