"""The router on its own: what it says while nobody comes. Its pairing and retries: tests/test_cli.py."""

import time

import pytest

from disagg import router as module
from disagg.control import Hello, Member, RouterPort, WorkerPort
from disagg.request import Request, UserRequest
from disagg.router import Router
from disagg.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("joined", "missing"), [((), "prefill and a decode"), (("decode",), "prefill"), (("prefill",), "decode")]
)
def test_it_says_what_it_waits_for(tiny, monkeypatch, capsys, joined, missing) -> None:
    """At 0.2 s, at 0.6 s, and not again before 1.8 s."""
    monkeypatch.setattr(module, "NOTICE_S", 0.2)
    monkeypatch.setattr(module, "FAREWELL_S", 0.1)
    port, end = RouterPort("127.0.0.1", 0), time.monotonic() + 1.2
    workers = [WorkerPort(role, "127.0.0.1", port.port) for role in joined]
    for role, worker in zip(joined, workers, strict=True):
        worker.send(Hello(role, [Member(role, "127.0.0.1")], 4, 640, "kv"))
    router = Router(port, load_tokenizer(tiny).tokenizer, lambda: time.monotonic() > end)
    answers = {}
    router.run([UserRequest(i, Request(i, [5], 2), []) for i in range(3)], answers.__setitem__)
    for one in (*workers, port):
        one.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert lines == [f"router: 3 requests still waiting for a {missing} replica"] * 2
    assert [answer.error for answer in answers.values()] == ["interrupted"] * 3
