"""SIGTERM: what runs is finished, nothing new is begun, and the process leaves with status 0, in bounded time."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg.control import pulse
from disagg.control.messages import Bye, Finish, Member, Submit, Tokens, Update, Updates, Withdraw
from disagg.control.pulse import Beacon
from disagg.front import fleet
from disagg.front.router import Router
from disagg.request import Request
from tests.conftest import eventually
from tests.http_door import HOST, error_of, first_token, open_door
from tests.town import GRADED, POOL, QUICK, SOON, all_right, busy, joined, town, undisturbed
from tests.workers import Worker, finish, joining, serving, waits

COMPLETION = {"prompt": "x", "max_tokens": 4}


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, list[int]]:
    return undisturbed(tiny)


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Router], Beacon]:
    """Starts the beacon of a rank that drains."""
    monkeypatch.setattr(pulse, "BEAT_S", 0.05)
    beacons = []

    def start(id: str, router: Router) -> Beacon:
        beacons.append(Beacon(id, HOST, router.port.port))
        beacons[-1].draining = True
        return beacons[-1]

    yield start
    for beacon in beacons:
        beacon.close()


def leave(*workers: Worker) -> None:
    for worker in workers:
        assert worker.hear(Finish).error is None
        worker.send(Bye({}))
        worker.close()


# ---- the router's part


def test_a_decode_job_that_drains_ends_what_has_begun_and_gives_the_rest_back(
    beats: Callable, capsys: pytest.CaptureFixture
) -> None:
    with serving(Request(0, [5], 8), Request(0, [6], 8)) as (router, answers):
        prefill, draining = joining("p", "prefill", router), joining("d", "decode", router)
        begun, queued = [draining.hear(Submit).request.uid for _ in range(2)]
        draining.send(Updates([Tokens({begun: 9})], [begun]))
        assert eventually(lambda: any(tracked.begun for tracked in list(router.tracked)))
        beats("d", router)
        assert draining.hear(Withdraw).uids == [queued]
        other = joining("e", "decode", router)
        draining.send(Updates(returned=[queued]))
        moved = other.hear(Submit)
        assert moved.request.prompt == [6] and waits(draining, Finish)
        draining.send(Updates([Update(begun, [9], finish="length")]))
        leave(draining)
        finish(other, moved, prefill)
    assert answers[0].token_ids == [9, 9] and answers[1].error is None and router.metrics.retries == 0
    said = capsys.readouterr().err
    assert "a decode job drains: it gets no new requests" in said and "a decode replica has drained; 0 requests" in said


def test_a_prefill_job_drains_once_its_prompts_have_their_first_tokens(beats: Callable) -> None:
    with serving(Request(0, [5], 8), Request(0, [6], 8)) as (router, answers):
        draining, decode = joining("p", "prefill", router), joining("d", "decode", router)
        uids = [decode.hear(Submit).request.uid for _ in range(2)]
        decode.send(Updates(begun=uids))
        assert eventually(lambda: all(tracked.begun for tracked in list(router.tracked)))
        beats("p", router)
        assert eventually(lambda: not router.fleet.in_role("prefill")) and waits(draining, Finish)
        decode.send(Updates([Tokens(dict.fromkeys(uids, 9))]))
        leave(draining)
        decode.send(Updates([Update(uid, [9], finish="length") for uid in uids]))
        leave(decode)
    assert [answers[i].token_ids for i in range(2)] == [[9, 9]] * 2


def test_all_replicas_of_a_job_drain_if_one_rank_says_so_and_leave_together(beats: Callable) -> None:
    """Also one that joins after the beat."""
    with serving(Request(0, [5], 8)) as (router, answers):
        prefill, first = joining("p", "prefill", router), joining("a", "decode", router, "ab", replicas=2)
        second = joining("b", "decode", router, "ab", replicas=2, members=[Member("b", HOST), Member("b1", HOST)])
        served, idle = (
            (first, second) if eventually(lambda: first.joined() and first.has(Submit), 1) else (second, first)
        )
        uid = served.hear(Submit).request.uid
        served.send(Updates(begun=[uid]))
        assert eventually(lambda: any(tracked.begun for tracked in list(router.tracked)))
        beats("b1", router)
        assert eventually(lambda: not router.fleet.in_role("decode")) and waits(idle, Finish)
        served.send(Updates([Update(uid, [9], finish="length")]))
        leave(served, idle, prefill)
    assert answers[0].error is None


def test_a_job_that_is_taken_back_still_drains(beats: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "SILENT_S", 0.5)
    monkeypatch.setattr(fleet, "PING_S", 0.05)
    with serving(Request(0, [5], 8)) as (router, answers):
        decode = joining("d", "decode", router)
        beacon = beats("d", router)
        assert decode.hear(Finish)
        beacon.turn = 1
        decode.port.close()  # the message is lost with its connection
        decode = joining("d", "decode", router)
        turning = threading.Event()
        threading.Thread(target=lambda: [turning.wait(0.05) or setattr(beacon, "turn", n) for n in range(99)]).start()
        assert decode.hear(Finish)
        decode.send(Bye({}))
        turning.set()
        assert eventually(lambda: not router.fleet.replicas)
        prefill, decode = joining("p", "prefill", router), joining("e", "decode", router)
        finish(decode, decode.hear(Submit), prefill)
    assert answers[0].error is None


# ---- HTTP


def test_a_door_that_drains_refuses_what_is_new_and_finishes_what_it_has(tiny: Path) -> None:
    with open_door(tiny, first_token) as door:
        running = []
        thread = threading.Thread(target=lambda: running.append(door.post("/v1/completions", COMPLETION)))
        thread.start()
        assert eventually(lambda: door.actor.submits)
        door.front.router._drains = lambda: True
        assert eventually(lambda: door.front.router.draining)
        status, headers, body = door.post("/v1/completions", COMPLETION)
        assert status == 503 and headers["retry-after"] == "1" and "is ending" in error_of(body)["message"]
        assert door.get("/health")[0] == 503 and door.thread.is_alive() and not running
        uid = door.actor.submits[0].request.uid
        door.actor.worker.send(Updates([Update(uid, [45], finish="length")]))
        thread.join(10)
        assert running[0][0] == 200 and json.loads(running[0][2])["usage"]["completion_tokens"] == 2
        door.thread.join(10)
        assert not door.thread.is_alive() and door.error is None


# ---- processes


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_job_that_is_replaced_while_it_serves(
    tiny: Path, tmp_path: Path, expected: dict[str, list[int]], role: str
) -> None:
    """SIGTERM to one of its ranks only. No request begins a second time."""
    with town(tmp_path, tiny, **QUICK) as place:
        router = place.router(GRADED, "out")
        place.worker("prefill" if role == "decode" else "decode", 1, *(POOL if role == "prefill" else ()))
        leaving = place.worker(role, 2, *(POOL if role == "decode" else ()))
        joined(place, router, 3)
        busy(place, "out")
        leaving.ranks[1].signal(signal.SIGTERM)
        place.worker(role, 1, *(POOL if role == "decode" else ()))
        all_right(place, router, "out", GRADED, expected)
        place.until(lambda: leaving.statuses == [0, 0], SOON)
        assert f"a {role} job drains" in router.said and "retries" not in router.said, router.said


@pytest.mark.parametrize("drafts", ["0", "2"])
def test_a_drain_that_takes_too_long_ends_and_its_requests_go_on_elsewhere(
    tiny: Path, tmp_path: Path, expected: dict[str, list[int]], drafts: str
) -> None:
    """With the tokens that they would have had; `expected` is of jobs that do not draft."""
    with town(tmp_path, tiny, **QUICK, disagg__interrupt__DRAIN_S=0.05) as place:
        router = place.router(GRADED, "out")
        place.worker("prefill", 1, "--speculate", drafts)
        leaving = place.worker("decode", 1, "--speculate", drafts)
        joined(place, router, 2)
        busy(place, "out")  # the others have most of their tokens still to come
        leaving.signal(signal.SIGTERM)
        place.worker("decode", 1, "--speculate", drafts)
        place.until(lambda: leaving.statuses == [0], 20)
        all_right(place, router, "out", GRADED, expected)
        assert "retries" in router.said and "a decode replica was stopped" in router.said, router.said
        assert "decode: draining: it finishes what it has" in leaving.said


def test_jobs_without_a_router_and_a_drain_beside_a_frozen_rank_end_in_bounded_time(tiny: Path, tmp_path: Path) -> None:
    """As torchrun sends SIGTERM to the ranks that one of them has left alone."""
    with town(tmp_path, tiny, **QUICK, disagg__loop__COLLECTIVE_S=3.0) as place:
        alone, beside = place.worker("decode", 1), place.worker("decode", 2)
        place.until(lambda: all("waiting for the router" in job.said for job in (alone, beside)), SOON)
        alone.signal(signal.SIGTERM)
        place.until(lambda: alone.statuses == [0], 5)
        beside.ranks[1].signal(signal.SIGSTOP)
        time.sleep(0.3)
        beside.ranks[0].signal(signal.SIGTERM)
        place.until(lambda: beside.ranks[0].status == 1, 10)
        assert "Timed out waiting 3000ms" in beside.said
        left = place.worker("decode", 2)
        place.until(lambda: "waiting for the router" in left.said, SOON)
        left.ranks[1].signal(signal.SIGKILL)
        left.ranks[0].signal(signal.SIGTERM)
        place.until(lambda: left.ranks[0].status is not None, 10)


@pytest.mark.parametrize("role", ["unified", "router"])
def test_a_batch_that_drains_answers_what_it_has_read_and_goes_on_later(
    tiny: Path, tmp_path: Path, expected: dict[str, list[int]], role: str
) -> None:
    """At most four lines are read ahead here."""
    with town(tmp_path, tiny, **QUICK, disagg__front__router__MOST_WAITING=4) as place:
        source, out = tmp_path / "in.jsonl", tmp_path / "out.out"
        source.write_text("".join(json.dumps(request) + "\n" for request in GRADED))
        flags = ("--input", str(source), "--output", str(out), "--existing", "resume")
        where = ("--router", f"127.0.0.1:{place.port}") if role == "router" else ()
        small = ("--max-batch", "2", "--kv-tokens", "1024")

        def begin() -> tuple:
            first = place.start(role, 1, *where, *flags, *(() if where else small))
            return first, [place.worker("prefill"), place.worker("decode", 1, *small)] if where else []

        first, jobs = begin()
        busy(place, "out")
        first.signal(signal.SIGTERM)
        place.until(lambda: first.statuses == [0], SOON)
        answers = place.answers("out")
        assert 0 < len(answers) < len(GRADED), "it was nearly over: the test shows nothing"
        assert all(answer["token_ids"] == expected[answer["id"]][: len(answer["token_ids"])] for answer in answers)
        assert not any(answer.get("error") for answer in answers) and "takes no more requests" in first.said
        place.until(lambda: all(job.statuses == [0] for job in jobs), SOON)
        second, _ = begin()
        all_right(place, second, "out", GRADED, expected)
