"""Requests survive processes that are frozen, killed, replaced or probed by port scanners.

Nothing hangs longer than the documented time, and every answer has the tokens that an undisturbed run gives. Real
processes (tests/town.py), with the timeouts made short and checked in proportion.
"""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from model.pages import PAGE
from tests.town import GRADED, LONG, OTHER, POOL, QUICK, SOON, all_right, alone, busy, joined, town, undisturbed


@pytest.fixture(scope="module")
def expected(small: Path) -> dict[str, list[int]]:
    return undisturbed(small)


def test_a_router_with_other_work_takes_the_address_of_one_that_was_killed(
    small: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    """The jobs of the first one serve it, and nothing of the first one's requests is in its answers."""
    with town(tmp_path, small, **QUICK) as place:
        first = place.router(GRADED, "first")
        jobs = [place.worker("prefill"), place.worker("decode")]
        joined(place, first, 2)
        busy(place, "first")
        first.signal(signal.SIGKILL)
        second = place.router(OTHER, "second")
        all_right(place, second, "second", OTHER, expected)
        place.until(lambda: [job.statuses for job in jobs] == [[0], [0]], SOON)


def test_a_decode_job_that_slept_through_a_change_of_routers(
    small: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    with town(tmp_path, small, **QUICK) as place:
        first = place.router(GRADED, "first")
        place.worker("prefill")
        decode = place.worker("decode")
        joined(place, first, 2)
        busy(place, "first")
        decode.signal(signal.SIGSTOP)
        first.signal(signal.SIGKILL)
        second = place.router(OTHER, "second")
        place.until(lambda: "listening" in second.said, SOON)
        decode.signal(signal.SIGCONT)
        all_right(place, second, "second", OTHER, expected)


@pytest.mark.parametrize(
    ("role", "flags", "at_once"), [("decode", (), 1), ("decode", ("--attn-tp", "2"), 2), ("prefill", (), 1)]
)
def test_a_frozen_rank_holds_nobody_up_and_its_job_is_taken_back(
    small: Path, tmp_path: Path, expected: dict[str, list[int]], role: str, flags: tuple[str, ...], at_once: int
) -> None:
    """Not the rank that talks to the router. Another job of its role serves meanwhile, and it serves again itself.

    `at_once`: how many requests a decode replica serves, so that the batch outlasts the time until the loss is noticed.
    """
    wanted = [request | {"max_tokens": 40} for request in LONG[:12]]
    with town(tmp_path, small, **QUICK) as place:
        router = place.fed_router("out")
        other, few = "prefill" if role == "decode" else "decode", ("--max-batch", str(at_once))
        place.worker(other, 1, *(few if other == "decode" else ()))
        frozen = place.worker(role, 2, *flags, *(few if role == "decode" else ()))
        place.worker(role, 1, *(few if role == "decode" else ()))
        joined(place, router, 3 if flags else 4)
        place.feed(wanted[:8], "out")
        busy(place, "out")
        frozen.ranks[1].signal(signal.SIGSTOP)
        stopped = time.monotonic()
        place.until(lambda: re.search(r"is lost: .*rank 1 on 127.0.0.1", router.said) is not None, 10)
        assert time.monotonic() - stopped < 5
        busy(place, "out", min(len(place.answers("out")) + 2, 8))
        frozen.ranks[1].signal(signal.SIGCONT)
        place.until(lambda: f"a {role} replica is back" in router.said, 10)
        place.feed(wanted[8:], "out")
        place.stop_feeding("out")
        all_right(place, router, "out", wanted, expected)
        place.until(lambda: frozen.statuses == [0, 0], SOON)


def test_jobs_that_are_frozen_together_go_on_together(
    small: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    """As when the machine of both is paused. Neither may go on believing that the other is gone."""
    with town(tmp_path, small, **QUICK) as place:
        router = place.router(GRADED, "out")
        jobs = [place.worker("prefill"), place.worker("decode", 1, *POOL)]
        joined(place, router, 2)
        busy(place, "out")
        for job in jobs:
            job.signal(signal.SIGSTOP)
        place.until(lambda: router.said.count("is lost") == 2, 10)
        for job in jobs:
            job.signal(signal.SIGCONT)
        all_right(place, router, "out", GRADED, expected)
        assert router.said.count("is back") == 2


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_a_frozen_one(small: Path, tmp_path: Path) -> None:
    with town(tmp_path, small, **QUICK) as place:
        router = place.router(GRADED, "out")
        place.worker("prefill")
        decode = place.worker("decode", 2)
        joined(place, router, 3)
        decode.ranks[1].signal(signal.SIGSTOP)
        time.sleep(0.5)
        decode.ranks[0].signal(signal.SIGINT)
        time.sleep(0.5)
        assert decode.ranks[0].status is None, "it waits in a collective"
        decode.ranks[0].signal(signal.SIGINT)
        place.until(lambda: decode.ranks[0].status is not None, 5)
        router.signal(signal.SIGINT)
        place.until(lambda: router.statuses == [0], 20)


def test_a_rank_that_waits_too_long_for_another_ends_its_job(small: Path, tmp_path: Path) -> None:
    """The collective's own limit: nobody has to find and kill the rank that still runs."""
    with town(tmp_path, small, **QUICK, disagg__loop__COLLECTIVE_S=3.0) as place:
        router = place.router(GRADED, "out")
        place.worker("prefill")
        decode = place.worker("decode", 2)
        joined(place, router, 3)
        decode.ranks[1].signal(signal.SIGSTOP)
        place.until(lambda: decode.ranks[0].status is not None, 20)
        assert decode.ranks[0].status == 1 and "Timed out waiting 3000ms" in decode.said, place.said
        router.signal(signal.SIGINT)
        place.until(lambda: router.statuses == [0], 20)


def test_a_router_that_is_paused_loses_nothing(small: Path, tmp_path: Path, expected: dict[str, list[int]]) -> None:
    """For three times as long as it takes its jobs to notice."""
    with town(tmp_path, small, **QUICK) as place:
        router = place.router(GRADED, "out")
        jobs = [place.worker("prefill"), place.worker("decode", 1, *POOL)]
        joined(place, router, 2)
        busy(place, "out")
        router.signal(signal.SIGSTOP)
        place.until(lambda: all("waiting 60 s for the router to come back" in job.said for job in jobs), 10)
        time.sleep(3)
        router.signal(signal.SIGCONT)
        all_right(place, router, "out", GRADED, expected)
        assert "is lost" not in router.said, router.said
        place.until(lambda: [job.statuses for job in jobs] == [[0], [0]], SOON)


def test_jobs_leave_when_their_router_stays_away(small: Path, tmp_path: Path) -> None:
    with town(tmp_path, small, **QUICK, disagg__connection__HOLD_S=1.0) as place:
        router = place.router(GRADED, "out")
        jobs = [place.worker("prefill"), place.worker("decode", 2)]
        joined(place, router, 3)
        router.signal(signal.SIGKILL)
        place.until(lambda: [job.statuses for job in jobs] == [[1], [1, 1]], 20)
        assert all("has been gone for 1 s" in job.said and "Traceback" not in job.said for job in jobs), place.said


def test_a_decode_job_that_dies_takes_no_request_with_it(
    small: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    with town(tmp_path, small, **QUICK) as place:
        router = place.router(GRADED, "out")
        place.worker("prefill")
        dying = place.worker("decode", 1, "--max-batch", "4")
        joined(place, router, 2)
        place.worker("decode")
        joined(place, router, 3)
        busy(place, "out")
        dying.signal(signal.SIGKILL)
        all_right(place, router, "out", GRADED, expected)


def test_a_prefill_job_that_is_killed_and_replaced_again_and_again(small: Path, tmp_path: Path) -> None:
    """What waits for pages on the decode side has not begun, and so has not failed.

    76 pages hold a short request and 15 long ones, which fail once. Here no accused request waits for a trial of its
    own, so the next job computes all 16. Then the long ones decode, and the other four wait. Meanwhile two jobs die.
    """
    wanted = [LONG[0] | {"max_tokens": 4}, *(request | {"max_tokens": 300} for request in LONG[1:])]
    expected = alone(small, wanted)
    with town(tmp_path, small, **QUICK, disagg__front__trials__TRIAL_WAIT_S=0.0) as place:
        router = place.router(wanted, "out", "--log-interval", "0.05")
        place.worker("decode", 1, "--kv-tokens", str(76 * PAGE))
        prefill = place.worker("prefill")
        joined(place, router, 2)
        for again in range(3):
            prefill.signal(signal.SIGKILL)
            prefill = place.worker("prefill")
            joined(place, router, 3 + again)
            place.until(lambda: "4 waiting, 0 queued, 0 in prefill, 15 in decode; 1 ended" in router.said, SOON)
        all_right(place, router, "out", wanted, expected)


def listening(pid: int) -> list[int]:
    """The ports that a process listens at."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[3].rsplit(":", 1)[1]) for line in lines if f"pid={pid}," in line]


def test_a_port_scanner_takes_nothing_down(small: Path, tmp_path: Path, expected: dict[str, list[int]]) -> None:
    """It connects to every port of every process, again and again, and says nothing or junk."""
    with town(tmp_path, small, **QUICK) as place:
        router = place.fed_router("out")
        jobs = [router, place.worker("prefill"), place.worker("decode", 1, *POOL)]
        joined(place, router, 2)
        place.feed(LONG, "out")
        touched, deadline = 0, time.monotonic() + SOON
        while touched < 200 and time.monotonic() < deadline:
            for port in {port for job in jobs for rank in job.ranks for port in listening(rank.pid)}:
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as sock:
                        if touched % 3 == 0:
                            sock.sendall(os.urandom(64))
                except OSError:
                    continue
                touched += 1
            time.sleep(0.05)
        assert touched >= 200 and router.statuses == [None]
        place.stop_feeding("out")
        all_right(place, router, "out", LONG, expected)
        assert "retries" not in router.said, router.said


def test_a_job_of_another_dtype_that_came_first_locks_nobody_out(
    small: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    with town(tmp_path, small, **QUICK) as place:
        router = place.router(OTHER, "out")
        wrong = place.worker("decode", 1, "--dtype", "bfloat16")
        joined(place, router, 1)
        late = place.worker("prefill")
        place.until(lambda: late.statuses == [1], SOON)
        assert "dtype is float32, the others have bfloat16" in late.said and "refused" in router.said, place.said
        wrong.signal(signal.SIGINT)
        place.until(lambda: wrong.statuses == [0], SOON)
        place.worker("prefill")
        place.worker("decode")
        all_right(place, router, "out", OTHER, expected)


def test_a_router_that_is_started_again_finds_its_jobs_and_goes_on_in_its_file(
    small: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    """Meanwhile nobody else may write that file, and the jobs say what they wait for."""
    with town(tmp_path, small, **QUICK) as place:
        router = place.router(GRADED, "out")
        jobs = [place.worker("prefill"), place.worker("decode", 1, "--max-batch", "4")]
        joined(place, router, 2)
        busy(place, "out", 3)
        files = ("--input", str(tmp_path / "out.jsonl"), "--output", str(tmp_path / "out.out"), "--existing", "resume")
        second = place.start("router", 1, "--router", "127.0.0.1:0", *files)
        place.until(lambda: second.statuses == [2], SOON)
        assert "out.out: another process writes it" in second.said and "Traceback" not in second.said
        router.signal(signal.SIGKILL)
        place.until(lambda: all("waiting 60 s for the router to come back" in job.said for job in jobs), 10)
        before = place.answers("out")
        assert 3 <= len(before) < len(GRADED)
        again = place.start("router", 1, "--router", f"127.0.0.1:{place.port}", *files)
        all_right(place, again, "out", GRADED, expected)
        assert place.answers("out")[: len(before)] == before
        place.until(lambda: [job.statuses for job in jobs] == [[0], [0]], SOON)
        assert all(job.said.count("joined the router") == 2 for job in jobs)


def test_a_job_with_a_frozen_rank_ends_with_its_router(small: Path, tmp_path: Path) -> None:
    """As soon as the rank goes on. (If it never does, its peers end the job, after COLLECTIVE_S.)"""
    with town(tmp_path, small, **QUICK, disagg__front__fleet__FAREWELL_S=2.0) as place:
        router = place.router(GRADED, "out")
        prefill, decode = place.worker("prefill"), place.worker("decode", 2)
        joined(place, router, 3)
        decode.ranks[1].signal(signal.SIGSTOP)
        router.signal(signal.SIGINT)
        place.until(lambda: router.statuses == [0] and prefill.statuses == [0], 20)
        assert decode.statuses == [None, None]
        decode.ranks[1].signal(signal.SIGCONT)
        place.until(lambda: decode.statuses == [0, 0], 20)


def test_a_job_of_another_model_that_came_first_locks_nobody_out(
    small: Path, tiny: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    with town(tmp_path, small, **QUICK) as place:
        wrong = place.worker("decode", 1, "--model", str(tiny))
        router = place.router(OTHER, "out")
        joined(place, router, 1)
        place.worker("decode")
        place.worker("prefill")
        all_right(place, router, "out", OTHER, expected)
        place.until(lambda: wrong.statuses == [1], SOON)
        assert "its model is not this router's" in wrong.said and "Traceback" not in wrong.said
