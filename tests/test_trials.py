"""A request that kills what serves it is given up after two jobs, and those beside it are answered."""

from collections.abc import Iterator

import pytest

from disagg.control.messages import Bye, Finish, Submit, Tokens, Update, Updates
from disagg.front import fleet, trials
from disagg.front import router as module
from disagg.request import Request
from tests.conftest import eventually
from tests.workers import Worker, finish, joining, serving, waits

POISON = [13]
PROMPTS = ([5], POISON, [6], [7])
GIVEN_UP = "given up: 2 jobs died as they began it; the {} replica serving it is lost"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PING_S", 0.05)
    monkeypatch.setattr(module, "SUSPECT_S", 0.5)


def submits(worker: Worker, count: int) -> dict[int, int]:
    """The next requests: their prompts' first tokens, by uid."""
    return {(request := worker.hear(Submit).request).uid: request.prompt[0] for _ in range(count)}


def begin(worker: Worker, uids: Iterator[int]) -> None:
    """With the first token, which prefill has made."""
    worker.send(Updates([Tokens(dict.fromkeys(uids, 9))], list(uids)))


def test_one_that_kills_decode_jobs_is_given_up_and_those_beside_it_go_on() -> None:
    with serving(*(Request(0, prompt, 8) for prompt in PROMPTS)) as (router, answers):
        prefill, first = joining("p", "prefill", router), joining("d0", "decode", router)
        uids = submits(first, 4)
        begin(first, uids)
        assert eventually(lambda: all(tracked.first for tracked in list(router.tracked)))
        first.close()
        second = joining("d1", "decode", router)
        tried = submits(second, 1)
        assert list(tried.values()) == [5] and waits(second, Submit), "accused ones are tried one at a time"
        begin(second, tried)
        assert waits(second, Submit), "its first token is prefill's, and says nothing of the decode job"
        second.send(Updates([Tokens(dict.fromkeys(tried, 9))]))  # it is past the place where it was
        killer = submits(second, 1)
        assert list(killer.values()) == POISON
        begin(second, killer)
        assert eventually(lambda: all(tracked.begun for tracked in list(router.tracked) if tracked.decode))
        second.close()
        assert eventually(lambda: list(answers) == [1])
        third = joining("d2", "decode", router)
        acquitted_and_tried = submits(third, 2)
        assert sorted(acquitted_and_tried.values()) == [5, 6] and waits(third, Submit)
        third.send(Updates([Update(uid, [9], finish="length") for uid in acquitted_and_tried]))
        last = third.hear(Submit)
        assert last.request.prompt[0] == 7
        finish(third, last, prefill)
    assert answers[1].error.startswith(GIVEN_UP.format("decode")) and answers[1].token_ids == [9, 9]
    assert all(answers[i].error is None for i in (0, 2, 3))


def test_one_that_kills_prefill_jobs_is_given_up_and_those_beside_it_go_on() -> None:
    """The broken links are known before the router knows that the job has died."""
    with serving(*(Request(0, prompt, 8) for prompt in PROMPTS[:3])) as (router, answers):
        prefill, decode = joining("p0", "prefill", router), joining("d", "decode", router)
        uids = submits(decode, 3)
        for number in range(1, 3):
            prefill.close()
            decode.send(Updates([Update(uid, error="link down", retry=True) for uid in uids], begun=list(uids)))
            assert eventually(lambda: list(router.fleet.replicas) == ["d"])
            prefill = joining(f"p{number}", "prefill", router)
            uids = submits(decode, 1)
            if number == 1:
                assert list(uids.values()) == [5] and waits(decode, Submit)
                decode.send(Updates([Update(uid, [9], finish="length") for uid in uids], begun=list(uids)))
                uids = submits(decode, 1)
                assert list(uids.values()) == POISON and waits(decode, Submit)
        assert list(uids.values()) == [6], "the poisonous one has its answer"
        decode.send(Updates([Update(uid, [9], finish="length") for uid in uids]))
        for worker in (decode, prefill):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    assert answers[1].error.startswith(GIVEN_UP.format("prefill"))
    assert answers[0].error is None and answers[2].error is None


def test_one_attempt_counts_once_though_both_its_jobs_die() -> None:
    with serving(Request(0, [5], 8)) as (router, answers):
        both = [joining("p0", "prefill", router), joining("d0", "decode", router)]
        both[1].send(Updates(begun=list(submits(both[1], 1))))
        assert eventually(lambda: any(tracked.begun for tracked in list(router.tracked)))
        for worker in both:
            worker.close()
        assert eventually(lambda: not router.fleet.replicas)
        prefill, decode = joining("p1", "prefill", router), joining("d1", "decode", router)
        finish(decode, decode.hear(Submit), prefill)
    assert answers[0].error is None


def test_jobs_that_were_stopped_blame_nobody() -> None:
    with serving(Request(0, [5], 8)) as (router, answers):
        prefill = joining("p", "prefill", router)
        for number in range(2):
            decode = joining(f"d{number}", "decode", router)
            decode.send(Updates(begun=list(submits(decode, 1))))
            decode.send(Bye({}))
            assert eventually(lambda: list(router.fleet.replicas) == ["p"])
            decode.close()
        decode = joining("d", "decode", router)
        finish(decode, decode.hear(Submit), prefill)
    assert answers[0].error is None


def test_a_trial_keeps_the_others_waiting_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIAL_WAIT_S", 0.5)
    with serving(Request(0, [5], 8), Request(0, [6], 8)) as (router, answers):
        prefill, first = joining("p", "prefill", router), joining("d0", "decode", router)
        first.send(Updates(begun=list(submits(first, 2))))
        assert eventually(lambda: all(tracked.begun for tracked in list(router.tracked)))
        first.close()
        second = joining("d1", "decode", router)
        (tried,) = submits(second, 1)
        assert waits(second, Submit)
        other = second.hear(Submit)
        second.send(Updates([Update(tried, [9], finish="length")]))
        finish(second, other, prefill)
    assert answers[0].error is None and answers[1].error is None
