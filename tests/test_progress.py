"""The lines about a deployment's jobs: numbers by hand, printed when it is time and only when they are new."""

import time

import pytest

from disagg.control.messages import Hello, Load, Member
from disagg.front import progress as module
from disagg.front.progress import Progress
from disagg.front.replica import Replica


def replica(name: str, role: str, job: str, load: Load | None, reported: float = 0.0, **stats: float) -> Replica:
    made = Replica(name, Hello(role, [Member(name, "h")], 4, 64, 64 * 100, {}, job))
    made.load, made.reported, made.stats = load, reported, stats
    return made


def test_rates_are_those_between_two_reports() -> None:
    progress = Progress(1)
    decode = [
        replica("a", "decode", "d", Load(0, 60, 3, 1), 10.0, decode_step_tokens=1000, balancedness=0.9),
        replica("b", "decode", "d", Load(0, 20, 2, 0), 11.0, decode_step_tokens=500, balancedness=0.9),
    ]
    others = [replica("p", "prefill", "p", None), replica("u", "unified", "u", Load(9, 1, 1, 0), 1.0, prompt_tokens=5)]
    first = progress.lines([*decode, *others], [], 1234)
    assert first == [
        "0 waiting, 0 queued, 0 in prefill, 0 in decode; 1,234 ended",
        "decode job of 2 replicas: 5 running, 1 waiting, KV 40 %, balancedness 0.900",
        "prefill job of 1 replica: 0 running, 0 waiting, KV 0 %",
        "unified job of 1 replica: 1 running, 0 waiting, KV 1 %",
    ]
    decode[0].reported, decode[0].stats = 14.0, {"decode_step_tokens": 9000}
    decode[1].reported, decode[1].stats = 13.0, {"decode_step_tokens": 501}
    others[1].reported, others[1].stats = 2.0, {"prompt_tokens": 105, "decode_step_tokens": 30}
    second = progress.lines([*decode, *others], [], 1234)
    assert second[1] == "decode job of 2 replicas: 5 running, 1 waiting, decode 2,000 tok/s, KV 40 %"
    assert second[3] == "unified job of 1 replica: 1 running, 0 waiting, prefill 100 tok/s, decode 30 tok/s, KV 1 %"
    assert progress.lines([*decode, *others], [], 1234) == second, "no report has come since"
    assert "tok/s" not in progress.lines(decode[:0], [], 0)[0] and "tok/s" not in progress.lines(decode, [], 0)[1]


def test_lines_come_when_it_is_time_and_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    progress, never = Progress(10), Progress(0)
    one = replica("a", "decode", "d", Load(0, 1, 1, 0))
    for later, said in ((0, 0), (9.9, 0), (10, 2), (15, 0), (20, 0), (30, 1), (1000, 0)):
        monkeypatch.setattr(module.time, "monotonic", lambda at=now + later: at)
        one.load = Load(0, 1, 2 if later >= 30 else 1, 0)
        for each in (progress, never):
            each.tick([one], [], 0)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == said and all(line.startswith("router: ") for line in lines), later
