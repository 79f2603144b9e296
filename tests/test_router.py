"""The router over its real port: what it reports while it waits, whom it believes, where requests and retries go."""

import threading
import time
from array import array
from pathlib import Path

import pytest

from disagg.control import pulse
from disagg.control.messages import (
    Abort,
    Back,
    Bye,
    Finish,
    Forget,
    Gone,
    Hello,
    Kept,
    Load,
    Member,
    Submit,
    Tokens,
    Update,
    Updates,
    Withdraw,
)
from disagg.control.ports import RouterPort
from disagg.control.pulse import Beacon
from disagg.front import fleet, missing_roles
from disagg.front import router as module
from disagg.front.answer import INTERRUPTED, Answer
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.front.tokenizer import load_tokenizer
from disagg.handoff.endpoints import Handoff
from disagg.page_digest import page_digests
from disagg.request import Request
from model.pages import PAGE
from tests.clients import listed
from tests.conftest import eventually
from tests.workers import (
    HOST,
    SOON_S,
    VOCAB_SIZE,
    Beating,
    Worker,
    fail,
    finish,
    hear,
    joining,
    make_router,
    replica,
    serving,
    waits,
)


def test_a_retry_does_not_go_to_the_prefill_replica_that_has_just_died() -> None:
    """Its links break at once; the router would find out by its next ping, up to a second later."""
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        prefills = {name: joining(name, "prefill", router) for name in ("a", "b")}
        assert eventually(lambda: len(router.fleet.replicas) == 2)
        decode = joining("d", "decode", router)
        first = hear(decode, Submit)
        prefills.pop(first.prefill[0].id).close()
        second = fail(decode, first)
        assert [member.id for member in second.prefill] == list(prefills)
        finish(decode, second, *prefills.values())
    assert answers[0].error is None and answers[0].token_ids == [9] and router.metrics.retries == 1


def test_a_retry_goes_to_another_job() -> None:
    """Of a job that loses a rank, the other replicas are still there for a while, and idle."""
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        prefills = [joining(name, "prefill", router, "ab") for name in ("a", "b")]
        assert eventually(lambda: len(router.fleet.replicas) == 2)
        decode = joining("d", "decode", router)
        first = hear(decode, Submit)
        prefills.append(joining("c", "prefill", router))
        assert eventually(lambda: len(router.fleet.replicas) == 4)
        second = fail(decode, first)
        assert [member.id for member in second.prefill] == ["c"]
        finish(decode, second, *prefills)
    assert answers[0].error is None


def test_a_retry_waits_before_it_goes_where_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody else: a link may have broken between two replicas that live."""
    monkeypatch.setattr(module, "SUSPECT_S", 0.5)
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
        first, start = hear(decode, Submit), time.monotonic()
        second = fail(decode, first)
        assert time.monotonic() - start >= 0.5 and [member.id for member in second.prefill] == ["prefill"]
        finish(decode, second, prefill)
    assert answers[0].error is None


def test_a_job_that_has_lost_a_replica_gets_nothing_more(capsys: pytest.CaptureFixture) -> None:
    with serving(Request(0, [5, 6, 7], 1)) as (router, answers):
        dying = {name: joining(name, "decode", router, "ab") for name in ("a", "b")}
        assert eventually(lambda: len(router.fleet.replicas) == 2)
        prefill = joining("p", "prefill", router)
        assert eventually(lambda: any(one.requests for one in router.fleet.replicas.values()))
        dying.pop(next(name for name, one in router.fleet.replicas.items() if one.requests)).close()
        other = joining("c", "decode", router)
        submit = hear(other, Submit)
        (left,) = dying.values()
        finish(other, submit, prefill, left)
    assert answers[0].error is None
    assert (
        "a decode replica is lost: rank 0 on 127.0.0.1 (process 0) died or is frozen; 1 requests were on it"
        in capsys.readouterr().err
    )


def test_the_requests_on_a_prefill_replica_are_counted(capsys: pytest.CaptureFixture) -> None:
    with serving(Request(0, [5, 6, 7], 1)) as (router, _):
        decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
        submit = hear(decode, Submit)
        prefill.close()
        assert eventually(lambda: len(router.fleet.replicas) == 1)
        finish(decode, submit)
    assert (
        "a prefill replica is lost: rank 0 on 127.0.0.1 (process 0) died or is frozen; 1 requests were on it"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("limited", [True, False])
def test_only_a_limit_that_nobody_asked_for_is_cut_to_the_kv(limited: bool) -> None:
    """Else a model with a long context would refuse every request without max_tokens. So is the rest after a loss."""
    with serving(UserRequest("x", Request(0, [5] * 10, 5000), [], limited=limited)) as (router, answers):
        first = joining("first", "unified", router, kv_tokens=128)
        submit = hear(first, Submit)
        assert submit.request.max_tokens == (5000 if limited else 118)
        first.send(Updates([Tokens({submit.request.uid: 7})]))
        assert eventually(lambda: any(tracked.stream.token_ids for tracked in router.tracked))
        first.close()
        second = joining("second", "unified", router, kv_tokens=640)
        again = hear(second, Submit)
        assert again.request.max_tokens == (4999 if limited else 640 - 11)
        finish(second, again)
    assert answers[0].error is None and answers[0].token_ids == [7, 9]


@pytest.mark.parametrize("small_role", ["decode", "prefill"])
@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_a_request_goes_where_it_fits(small_role: str, order: tuple[str, str]) -> None:
    """150 + 60 tokens do not fit into 128 of KV, and 640 are there; nor does the prompt alone."""
    other = "prefill" if small_role == "decode" else "decode"
    with serving(Request(0, [5] * 150, 60)) as (router, answers):
        sized = {n: joining(n, small_role, router, None, {"small": 128, "large": 640}[n]) for n in order}
        assert eventually(lambda: len(router.fleet.replicas) == 2)
        partner = joining("partner", other, router)
        decode, rest = (partner, sized.values()) if other == "decode" else (sized["large"], [partner, sized["small"]])
        submit = hear(decode, Submit)
        assert other == "prefill" or [member.id for member in submit.prefill] == ["large"]
        finish(decode, submit, *rest)
    assert answers[0].error is None


@pytest.mark.parametrize(
    ("joined", "missing"), [((), "prefill and a decode"), (("decode",), "prefill"), (("prefill",), "decode")]
)
def test_it_says_what_it_waits_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, joined: tuple[str, ...], missing: str
) -> None:
    """At 0.2 s, at 0.6 s, and not again before 1.8 s. The clock starts behind the first turn."""
    ends: list[float] = []

    def over() -> bool:
        ends.append(ends[1] if len(ends) > 1 else time.monotonic() + 1.2)
        return time.monotonic() > ends[-1]

    monkeypatch.setattr(missing_roles, "NOTICE_S", 0.2)
    monkeypatch.setattr(fleet, "FAREWELL_S", 0.1)
    port = RouterPort(HOST, 0)
    workers = [replica(role, role, port.port) for role in joined]
    router = make_router(port, over)
    answers = {}
    router.run(listed([UserRequest(i, Request(i, [5], 2), []) for i in range(3)], answers.__setitem__))
    for one in (*workers, port):
        one.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert lines == [f"router: 3 requests still waiting for a {missing} replica"] * 2
    assert [answer.error for answer in answers.values()] == ["interrupted"] * 3


def test_ctrl_c_that_the_replica_sees_first_is_no_failure(tiny: Path) -> None:
    """Its goodbye comes between a token and the router's own look at the interrupt."""
    port, answers, interrupt = RouterPort(HOST, 0), {}, threading.Event()
    worker = replica("u", "unified", port.port)
    router = make_router(port, interrupt.is_set)
    request = UserRequest("x", Request(0, [5, 6, 7], 4), [])

    def show(position: int, piece: str) -> None:
        if shown:
            interrupt.set()
        else:
            time.sleep(0.5)  # until the next token and the goodbye wait to be read together
        shown.append(piece)

    shown: list[str] = []

    def serve() -> None:
        router.run(listed([request], answers.__setitem__, show))

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


def test_answers_that_cannot_be_delivered_blame_no_replica() -> None:
    """The first of two fails on its way to the user; the replica goes home meanwhile."""
    port, delivered = RouterPort(HOST, 0), []
    router = make_router(port)

    def deliver(position: int, answer: Answer) -> None:
        delivered.append(answer)
        raise ValueError("the disk is full")

    def serve() -> None:
        with pytest.raises(ValueError, match="the disk is full"):
            router.run(listed([UserRequest(i, Request(i, [5], 1), []) for i in range(2)], deliver))
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


# ---- whose word counts


def test_only_the_replica_that_serves_a_request_is_believed() -> None:
    """Another one in good standing names it; and one that was given up does."""
    with serving(Request(0, [5, 6, 7], 2)) as (router, answers):
        prefill, decode, other = (
            joining(name, role, router) for name, role in (("p", "prefill"), ("d", "decode"), ("e", "decode"))
        )
        (first,) = [
            worker for worker in (decode, other) if eventually(lambda w=worker: w.joined() and w.has(Submit), 1)
        ]
        uid = first.hear(Submit).request.uid
        second = other if first is decode else decode
        second.send(Updates([Update(uid, [1, 2], finish="length")], [uid], [uid]))
        second.send(Updates([Tokens({uid: 3})]))
        first.send(Updates([Tokens({uid: 8})]))
        first.send(Updates([Update(uid, [9], finish="length")]))
        for worker in (prefill, decode, other):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    assert answers[0].token_ids == [8, 9]


def test_requests_are_numbered_from_anywhere() -> None:
    """So that one router's numbers say nothing to another."""
    seen = set()
    for _ in range(2):
        with serving(Request(0, [5], 1)) as (router, _):
            decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
            submit = decode.hear(Submit)
            seen.add(submit.request.uid)
            finish(decode, submit, prefill)
    assert len(seen) == 2 and min(seen) > 1000


def test_a_token_that_the_model_does_not_have_ends_its_request_alone() -> None:
    with serving(Request(0, [5], 3), Request(0, [6], 1)) as (router, answers):
        decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
        first, second = decode.hear(Submit), decode.hear(Submit)
        decode.send(Updates([Tokens({first.request.uid: VOCAB_SIZE})]))
        assert decode.hear(Abort).uid == first.request.uid
        finish(decode, second, prefill)
    assert (
        answers[0].error == f"the replica serving it made token {VOCAB_SIZE}; the model's vocabulary has {VOCAB_SIZE}"
    )
    assert answers[1].error is None


# ---- handing out


def test_a_replica_gets_what_its_kv_can_hold_and_the_rest_waits() -> None:
    """640 tokens are ten pages; each request may come to four."""
    with serving(*[Request(0, [5] * 200, 56)] * 3) as (router, answers):
        decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
        first, second = decode.hear(Submit), decode.hear(Submit)
        assert waits(decode, Submit)
        decode.send(Updates([Update(first.request.uid, [9], finish="stop")]))
        third = decode.hear(Submit)
        decode.send(Updates([Update(second.request.uid, [9], finish="stop")]))
        finish(decode, third, prefill)
    assert [answers[i].error for i in range(3)] == [None] * 3


def test_a_prefill_replica_gets_prompts_for_two_steps_and_no_less_than_four() -> None:
    """Its steps have 64 tokens."""
    for length, most in ((16, 8), (60, 4)):
        with serving(*[Request(0, [5] * length, 1)] * 10) as (router, answers):
            decode, prefill = (
                joining(role, role, router, None, 64_000, max_batch=64) for role in ("decode", "prefill")
            )
            submits = [decode.hear(Submit) for _ in range(most)]
            assert waits(decode, Submit)
            for submit in submits:
                decode.send(Updates([Update(submit.request.uid, [9], finish="length")]))
            while len(submits) < 10:
                submits.append(decode.hear(Submit))
                decode.send(Updates([Update(submits[-1].request.uid, [9], finish="length")]))
            for worker in (decode, prefill):
                worker.hear(Finish)
                worker.send(Bye({}))
                worker.close()
        assert len(answers) == 10


def test_a_beat_says_that_a_prefill_replica_has_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its four prompts of 60 tokens are over two steps of 64. With three of them done, there is time for the fifth."""
    monkeypatch.setattr(pulse, "BEAT_S", 0.05)
    with serving(*[Request(0, [5] * 60, 1)] * 5) as (router, answers):
        decode, prefill = (joining(role, role, router, None, 64_000) for role in ("decode", "prefill"))
        submits = [decode.hear(Submit) for _ in range(4)]
        assert waits(decode, Submit)
        beacon, stranger = (Beacon(name, HOST, router.port.port) for name in ("prefill", "stranger"))
        stranger.load = Load(1, 1, 1, 1)
        beacon.load = Load(60, 4, 4, 0, {submit.request.uid: 0 for submit in submits[:3]})
        submits.append(decode.hear(Submit))
        assert router.fleet.replicas["prefill"].load == beacon.load
        for submit in submits[1:]:
            decode.send(Updates([Update(submit.request.uid, [9], finish="length")]))
        finish(decode, submits[0], prefill)
        for one in (beacon, stranger):
            one.close()
    assert len(answers) == 5


def test_a_session_goes_on_where_it_was() -> None:
    """After one request each, both replicas are equally loaded, and the third request would go to the first of them."""
    port, answers = RouterPort(HOST, 0), {}
    router = make_router(port)
    users = [
        UserRequest(i, Request(i, [5], 1), [], session_id=session) for i, session in enumerate(("a", "b", "b", "a"))
    ]
    work = listed(users, answers.__setitem__)
    thread = threading.Thread(target=lambda: router.run(work), daemon=True)
    thread.start()
    prefill = joining("p", "prefill", router)
    decodes = {name: joining(name, "decode", router, "ab", replicas=2) for name in ("a", "b")}
    got = {name: [worker.hear(Submit).request.uid for _ in range(2)] for name, worker in decodes.items()}
    first = min(uid for uids in got.values() for uid in uids)
    assert sorted(sorted(uid - first for uid in uids) for uids in got.values()) == [[0, 3], [1, 2]]
    for name, worker in decodes.items():
        worker.send(Updates([Update(uid, [9], finish="length") for uid in got[name]]))
    for worker in (prefill, *decodes.values()):
        worker.hear(Finish)
        worker.send(Bye({}))
        worker.close()
    thread.join(SOON_S)
    assert not thread.is_alive() and len(answers) == 4
    port.close()


def test_what_has_not_begun_is_taken_back_when_another_replica_joins() -> None:
    with serving(Request(0, [5], 1), Request(0, [6], 1)) as (router, answers):
        decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
        begun, not_begun = (decode.hear(Submit).request.uid for _ in range(2))
        decode.send(Updates(begun=[begun]))
        assert eventually(lambda: router._tracked[begun].begun)
        other = joining("other", "decode", router)
        assert decode.hear(Withdraw).uids == [not_begun]
        decode.send(Updates(returned=[not_begun]))
        submit = other.hear(Submit)
        assert submit.request.prompt == [6]
        decode.send(Updates([Update(begun, [9], finish="length")]))
        finish(other, submit, decode, prefill)
    assert answers[0].error is None and answers[1].error is None


def test_what_another_rooms_failure_sends_back_counts_as_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may begin more than ATTEMPTS times, and at once where it was."""
    monkeypatch.setattr(module, "SUSPECT_S", 0.0)
    with serving(Request(0, [5], 1)) as (router, answers):
        decode, prefill = (joining(role, role, router) for role in ("decode", "prefill"))
        submit = decode.hear(Submit)
        for _ in range(module.ATTEMPTS + 1):
            decode.send(Updates(begun=[submit.request.uid], returned=[submit.request.uid]))
            submit = decode.hear(Submit)
        decode.send(Updates(begun=[submit.request.uid]))
        submit = fail(decode, submit)
        finish(decode, submit, prefill)
    assert answers[0].error is None


def test_a_replicas_report_of_its_cache_counts_only_if_it_can_be_true(capsys: pytest.CaptureFixture) -> None:
    """Not one of a replica that said that it has none, or of more pages than it has. It is served on."""
    pages = page_digests([5] * (2 * PAGE), "", 2).tobytes()
    with serving(Request(0, [5] * (2 * PAGE + 1), 1)) as (router, answers):
        keeping, other = (joining(name, "decode", router, kv_tokens=256, caches=True) for name in ("keeping", "other"))
        none = joining("none", "decode", router, kv_tokens=256)
        for worker in (keeping, none):
            worker.send(Kept(pages))
        other.send(Kept(bytes(range(5 * 8))))
        other.send(Kept(pages[1:]))
        assert eventually(lambda: router.port.refusals.count == 3)

        def known() -> dict[str, int]:
            return {id: one.kept.count(array("Q", pages)) for id, one in router.fleet.replicas.items()}

        assert eventually(lambda: known() == {"keeping": 2, "other": 0, "none": 0}), known()
        prefill = joining("prefill", "prefill", router)
        finish(keeping, keeping.hear(Submit), other, none, prefill)
    assert answers[0].error is None
    assert "a report of a cache was refused: " in capsys.readouterr().err


def test_what_moves_goes_before_what_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it has failed, or was taken back before it began."""
    monkeypatch.setattr(module, "SUSPECT_S", 0.0)
    with serving(*(Request(0, [5 + i], 1) for i in range(9))) as (router, answers):
        decode, prefill = joining("decode", "decode", router, max_batch=2), joining("prefill", "prefill", router)
        given = [decode.hear(Submit) for _ in range(4)]
        assert [submit.request.prompt for submit in given] == [[5], [6], [7], [8]] and router.num_waiting == 5
        given[0] = fail(decode, given[0])
        assert given[0].request.prompt == [5]
        decode.send(Updates(returned=[submit.request.uid for submit in reversed(given[1:])]))
        given[1:] = (decode.hear(Submit) for _ in range(3))
        assert [submit.request.prompt for submit in given[1:]] == [[6], [7], [8]]
        for _ in range(5):
            decode.send(Updates([Update(given.pop(0).request.uid, [9], finish="length")]))
            given.append(decode.hear(Submit))
        assert [submit.request.prompt for submit in given] == [[10], [11], [12], [13]]
        for submit in given[:-1]:
            decode.send(Updates([Update(submit.request.uid, [9], finish="length")]))
        finish(decode, given[-1], prefill)
    assert len(answers) == 9 and all(answer.error is None for answer in answers.values())


def test_an_attempt_counts_once_it_has_begun_or_was_refused_for_nothing() -> None:
    """What waits for pages while one prefill replica after another dies has not begun. But a decode replica that keeps
    refusing, though the prefill replica is here, must not be asked for ever."""
    with serving(Request(0, [5], 1), Request(0, [6], 1)) as (router, answers):
        decode = joining("decode", "decode", router)
        for number in range(module.ATTEMPTS + 1):
            prefill = joining(f"p{number}", "prefill", router)
            submits = [decode.hear(Submit) for _ in range(2)]
            prefill.close()
            assert eventually(lambda: list(router.fleet.replicas) == ["decode"])
            for submit in submits:
                error = "its prefill replica has died"
                decode.send(Updates([Update(submit.request.uid, error=error, retry=True)]))
        prefill = joining("last", "prefill", router)
        for attempt in range(module.ATTEMPTS):
            for submit in [decode.hear(Submit) for _ in range(2)]:
                router._tracked[submit.request.uid].suspects = Nowhere()
                begun = [submit.request.uid] if submit.request.prompt == [5] else []
                decode.send(Updates([Update(submit.request.uid, error="cut", retry=True)], begun))
            assert eventually(lambda attempt=attempt: len(answers) == (2 if attempt == module.ATTEMPTS - 1 else 0))
        for worker in (decode, prefill):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    assert [answers[i].error for i in range(2)] == ["cut"] * 2


def test_a_request_whose_replicas_keep_dying_begins_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has gone on each time. One that kills them as it begins is found earlier (test_trials.py)."""
    assert module.ATTEMPTS == 5
    monkeypatch.setattr(fleet, "PING_S", 0.05)
    with serving(Request(0, [5], 40)) as (router, answers):
        prefill = joining("p", "prefill", router)
        for number in range(module.ATTEMPTS):
            assert not answers
            decode = joining(f"d{number}", "decode", router)
            uid = decode.hear(Submit).request.uid
            decode.send(Updates([Tokens({uid: 9}), Tokens({uid: 9})], begun=[uid]))
            assert eventually(lambda n=number: [len(t.stream.token_ids) for t in list(router.tracked)] == [2 * n + 2])
            decode.close()
            assert eventually(lambda: list(router.fleet.replicas) == ["p"])
        assert prefill.hear(Finish)
        prefill.send(Bye({}))
        prefill.close()
    assert "the decode replica serving it is lost" in answers[0].error


class Nowhere(dict):
    """No job is kept away from."""

    def __setitem__(self, job: str, until: float) -> None:
        pass


def test_each_time_between_two_updates_is_counted_once() -> None:
    with serving(Request(0, [5], 4), Request(0, [6], 4)) as (router, answers):
        worker = joining("u", "unified", router)
        uids = [worker.hear(Submit).request.uid for _ in range(2)]
        for step in range(3):
            worker.send(Updates([Tokens(dict.fromkeys(uids, 9))]))
            assert eventually(
                lambda step=step: [len(one.stream.token_ids) for one in list(router.tracked)] == [step + 1] * 2
            )
        worker.send(Updates([Update(uids[0], [9, 9], finish="length")]))
        finish(worker, Submit(Request(uids[1], [6], 1), None))
    assert [len(answers[i].token_ids) for i in range(2)] == [5, 4]
    assert router.metrics.ttft.count == 2 and router.metrics.inter_token.count == 2 * 3
    spans = [answers[i].latency_s - answers[i].ttft_s for i in range(2)]
    assert router.metrics.inter_token.sum == pytest.approx(sum(spans), abs=0.05)


def test_the_next_token_of_a_request_that_has_moved_says_that_its_prompt_is_done() -> None:
    with serving(Request(0, [5], 3)) as (router, answers):
        prefill, decode = (joining(role, role, router) for role in ("prefill", "decode"))
        first = decode.hear(Submit)
        decode.send(Updates([Update(first.request.uid, [9])], begun=[first.request.uid]))
        assert eventually(lambda: not router.fleet.replicas["prefill"].prompts)
        other = joining("other", "decode", router)
        decode.send(Bye({}))
        second = other.hear(Submit)
        assert second.request.prompt == [5, 9] and router.fleet.replicas["prefill"].prompts
        other.send(Updates([Tokens({second.request.uid: 9})]))
        assert eventually(lambda: not router.fleet.replicas["prefill"].prompts)
        finish(other, second, prefill)
        decode.close()
    assert answers[0].token_ids == [9, 9, 9]


def test_a_job_takes_part_once_it_is_whole() -> None:
    """Its replicas say Hello one after the other; the first must not get everything."""
    with serving(Request(0, [5], 1), Request(0, [6], 1)) as (router, answers):
        prefill = joining("p", "prefill", router)
        first = joining("a", "decode", router, "ab", replicas=2)
        assert waits(first, Submit)
        second = joining("b", "decode", router, "ab", replicas=2)
        submits = [worker.hear(Submit) for worker in (first, second)]
        first.send(Updates([Update(submits[0].request.uid, [9], finish="length")]))
        finish(second, submits[1], first, prefill)
    assert answers[0].error is None and answers[1].error is None


@pytest.mark.parametrize("drafts", [0, 2])
def test_an_answer_has_its_tokens_beyond_one_per_step_if_the_replica_drafts(drafts: int) -> None:
    """Those behind a stop string are not its own; those of a replica that was lost are."""
    text = "a state in the Irish Interior"
    with serving(UserRequest("x", Request(0, [5, 6], 40), ["in the Irish"])) as (router, answers):
        tokens = router.tokenizer.encode(text, add_special_tokens=False).ids
        prefill, dying = joining("p", "prefill", router), joining("d", "decode", router, drafts=drafts)
        uid = dying.hear(Submit).request.uid
        first = [Update(uid, tokens[:1]), Update(uid, tokens[1:3], accepted=int(drafts > 0), verified=drafts)]
        dying.send(Updates(first, [uid]))
        assert eventually(lambda: len(router._tracked[uid].stream.token_ids) == 3)
        dying.close()
        other = joining("e", "decode", router, drafts=drafts)
        uid = other.hear(Submit).request.uid
        rest = tokens[3:] + tokens[:9]
        other.send(Updates([Update(uid, rest, accepted=len(rest) - 1 if drafts else 0, verified=9 * drafts)], [uid]))
        for worker in (other, prefill):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    answer, steps = answers[0], 3  # one of them was prefill's
    assert answer.finish_reason == "stop" and 3 < len(answer.token_ids) < len(tokens)
    assert answer.accepted_tokens == (len(answer.token_ids) - steps if drafts else None)
    assert answer.verified_tokens == (10 * drafts if drafts else None)
    assert ("accepted_tokens" in answer.as_dict()) == ("verified_tokens" in answer.as_dict()) == bool(drafts)


# ---- moving on


def test_a_request_goes_on_elsewhere_with_the_tokens_that_it_has(capsys: pytest.CaptureFixture) -> None:
    """Its stop string is found across the move; an answer's log probabilities are those of all its tokens."""
    with serving(Request(0, [5, 6], 5, seed=7, logprobs=1, min_tokens=4)) as (router, answers):
        prefill, dying = joining("p", "prefill", router), joining("d", "decode", router)
        uid = dying.hear(Submit).request.uid
        dying.send(Updates([Update(uid, [10], [[(10, -1.0)]]), Update(uid, [11], [[(11, -2.0)]])], [uid]))
        assert eventually(lambda: len(router._tracked[uid].stream.token_ids) == 2)
        dying.close()
        other = joining("e", "decode", router)
        submit = other.hear(Submit)
        assert (
            submit.request
            == Request(submit.request.uid, [5, 6, 10, 11], 3, seed=7, logprobs=1, min_tokens=4, resumed=2)
            and submit.request.uid != uid
        )
        assert [member.id for member in submit.prefill] == ["p"]
        other.send(Updates([Update(submit.request.uid, [12], [[(12, -3.0)]], finish="stop")], [submit.request.uid]))
        for worker in (other, prefill):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    answer = answers[0]
    assert answer.token_ids == [10, 11, 12] and answer.finish_reason == "stop" and answer.prompt_tokens == 2
    assert answer.logprobs == [[(10, -1.0)], [(11, -2.0)], [(12, -3.0)]]
    assert (
        "a decode replica is lost: rank 0 on 127.0.0.1 (process 0) died or is frozen; 1 requests were on it"
        in capsys.readouterr().err
    )


def test_what_waits_for_a_lost_role_ends_if_none_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a first request was given to a replica there is no such limit, because jobs may start slowly."""
    monkeypatch.setattr(missing_roles, "REPLACEMENT_S", 0.5)
    monkeypatch.setattr(fleet, "PING_S", 0.05)
    with serving(Request(0, [5], 1), Request(0, [6], 1)) as (router, answers):
        prefill = joining("p", "prefill", router)
        time.sleep(0.7)
        decode = joining("d", "decode", router)
        assert [decode.hear(Submit).request.prompt for _ in range(2)] == [[5], [6]] and not answers
        decode.close()
        prefill.hear(Finish)
        prefill.send(Bye({}))
        prefill.close()
    assert len(answers) == 2
    for answer in answers.values():
        assert answer.error.startswith("no decode replica left to serve it, and none came in")


def test_a_latency_does_not_include_the_start_of_the_jobs() -> None:
    with serving(Request(0, [5], 1)) as (router, answers):
        prefill = joining("p", "prefill", router)
        time.sleep(0.7)
        start = time.monotonic()
        decode = joining("d", "decode", router)
        decode.send(Updates([Update(decode.hear(Submit).request.uid, [9], finish="length")]))
        assert eventually(lambda: 0 in answers)
        most = time.monotonic() - start + 1e-3  # an answer's times are rounded
        for worker in (decode, prefill):
            worker.hear(Finish)
            worker.send(Bye({}))
            worker.close()
    assert 0 < answers[0].ttft_s <= answers[0].latency_s <= most


# ---- who is frozen, and who is back


@pytest.mark.parametrize("how", ["silent", "stuck"])
def test_a_replica_that_stands_still_is_given_up_and_taken_back_when_it_goes_on(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for where, name, value in (
        (pulse, "BEAT_S", 0.05),
        (fleet, "SILENT_S", 0.5),
        (fleet, "STUCK_S", 0.5),
        (fleet, "PING_S", 0.1),
    ):
        monkeypatch.setattr(where, name, value)

    def beating(name: str, role: str, router: Router, job: str | None = None) -> Beating:
        hello = Hello(role, [Member(name, HOST, rank=3, pid=4711)], 4, 64, 640, {"layers": "5"}, job or name)
        worker = Beating(hello, router.port.port)
        assert eventually(worker.joined)
        return worker

    with serving(Request(0, [5], 1), Request(0, [6], 2)) as (router, answers):
        prefill, decode = beating("p", "prefill", router), beating("d", "decode", router)
        submits = [decode.hear(Submit) for _ in range(2)]
        decode.send(Updates([Tokens({submits[1].request.uid: 8})]))
        if how == "stuck":
            decode.turns = 0
        else:
            decode.beacon.close()
        assert prefill.hear(Gone).ids == ["d"]
        assert eventually(lambda: not router.fleet.replicas.keys() & {"d"})
        assert waits(prefill, Back), "it beats or not, and stands still"
        decode.send(Updates([Tokens({submits[1].request.uid: 99})]))  # too late: nobody believes it any more
        if how == "stuck":
            decode.turns = 1
        else:
            decode.beacon = Beacon("d", HOST, router.port.port)
            decode.beacon.turn = 10**6
        assert decode.hear(Forget) and prefill.hear(Back).ids == ["d"]
        again = [decode.hear(Submit) for _ in range(2)]
        assert [submit.request.prompt for submit in again] == [[5], [6, 8]]
        decode.send(Updates([Update(again[1].request.uid, [9], finish="length")]))
        finish(decode, again[0], prefill)
    assert answers[0].token_ids == [9] and answers[1].token_ids == [8, 9]
    said = capsys.readouterr().err
    rank = "rank 3 on 127.0.0.1 (process 4711)"
    why = {"silent": f"nothing heard of {rank} for 0.5 s", "stuck": f"{rank} did not end a step in 0.5 s"}[how]
    assert f"router: a decode replica is lost: {why}; 2 requests were on it" in said
    assert "router: a decode replica is back, ranks: 1" in said


def test_who_comes_later_hears_who_is_gone_still() -> None:
    """It may have been away when the others heard of that."""
    with serving(Request(0, [5], 1)) as (router, answers):
        first = joining("first", "prefill", router)
        assert eventually(lambda: "first" in router.fleet.replicas)  # the welcome was sent before
        first.close()
        assert eventually(lambda: not router.fleet.replicas)
        decode = joining("decode", "decode", router)
        assert decode.hear(Gone).ids == ["first"]
        prefill = joining("second", "prefill", router)
        finish(decode, decode.hear(Submit), prefill)
    assert answers[0].error is None


def test_a_router_that_was_stopped_itself_gives_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop stood still: whoever it has not heard meanwhile is forgiven."""
    for name, value in (("SILENT_S", 0.5), ("PAUSE_S", 0.3), ("PING_S", 0.05)):
        monkeypatch.setattr(fleet, name, value)
    monkeypatch.setattr(pulse, "BEAT_S", 0.05)
    port = RouterPort(HOST, 0)
    router = make_router(port)
    hello = Hello("unified", [Member("u", HOST)], 4, 64, 640, {}, "u")
    worker = Beating(hello, port.port)
    assert eventually(lambda: bool([router._listen(10), worker.joined()][1]))
    router.fleet.check(lambda: None)
    for _ in range(3):
        time.sleep(0.8)
        router.fleet.check(lambda: None)
        assert list(router.fleet.replicas) == ["u"]
    monkeypatch.setattr(fleet, "PAUSE_S", 60)
    time.sleep(0.8)
    router.fleet.check(lambda: None)
    assert not router.fleet.replicas, "nothing was heard, and it was not the router that slept"
    worker.close()
    port.close()


def test_a_router_that_was_stopped_itself_waits_for_those_who_have_to_connect_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("PAUSE_S", 0.3), ("PING_S", 0.05), ("GRACE_S", 0.5)):
        monkeypatch.setattr(fleet, name, value)
    router = make_router(RouterPort(HOST, 0))
    worker = replica("u", "unified", router.port.port)
    assert eventually(lambda: bool([router.turn(None, 10), worker.joined()][1]))
    worker.close()
    time.sleep(0.5)
    router.fleet.check(lambda: None)
    assert list(router.fleet.replicas) == ["u"]
    assert eventually(lambda: bool([router.fleet.check(lambda: None), not router.fleet.replicas][1]))
    router.port.close()


def test_the_end_is_told_to_who_was_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go on later, and would wait for ever."""
    monkeypatch.setattr(fleet, "SILENT_S", 0.2)
    monkeypatch.setattr(fleet, "PING_S", 0.05)
    router = make_router(RouterPort(HOST, 0))
    worker = replica("u", "unified", router.port.port)
    assert eventually(lambda: bool([router.turn(None, 10), worker.joined()][1]))
    assert eventually(lambda: bool([router.turn(None, 10), not router.fleet.replicas][1]))
    router.close()
    assert worker.hear(Finish)
    worker.close()
    router.port.close()


def test_a_router_that_nobody_joined_ends_at_once() -> None:
    router, start = make_router(RouterPort(HOST, 0)), time.monotonic()
    router.close()
    assert time.monotonic() - start < fleet.FAREWELL_S / 3
    router.port.close()


# ---- what a deployment hands over


def test_a_layout_is_forgotten_with_the_last_replica_that_had_it(capsys: pytest.CaptureFixture) -> None:
    with serving(Request(0, [5], 1)) as (router, answers):
        wrong = joining("w", "decode", router, kv={"layers": "5", "dtype": "bfloat16"})
        right = joining("r", "prefill", router, kv={"layers": "5", "dtype": "float32"})
        error = "refused: its KV is not the others': dtype is float32, the others have bfloat16 (--model, --dtype)"
        assert right.hear(Finish).error == error
        assert f"router: a prefill replica was {error}" in capsys.readouterr().err
        wrong.send(Bye({}))
        assert eventually(lambda: not router.fleet.replicas)
        decode, prefill = (
            joining(role, role, router, kv={"layers": "5", "dtype": "float32"}) for role in ("decode", "prefill")
        )
        finish(decode, decode.hear(Submit), prefill)
        for worker in (wrong, right):
            worker.close()
    assert answers[0].error is None


def test_jobs_of_the_routers_model_send_away_others_that_came_first(capsys: pytest.CaptureFixture) -> None:
    """Their requests move. What differs otherwise than in its model is refused as ever."""
    mine, other = {"layers": "5", "config": "mine"}, {"layers": "6", "config": "other"}
    with serving(Request(0, [5], 1), config="mine") as (router, answers):
        wrong = [joining(role, role, router, kv=other) for role in ("prefill", "decode")]
        assert wrong[1].hear(Submit).request.prompt == [5]
        decode = joining("d", "decode", router, kv=mine)
        for worker in wrong:
            assert "refused: its model is not this router's" in worker.hear(Finish).error
        late = joining("late", "prefill", router, kv=mine | {"layers": "7"})
        assert "layers is 7, the others have 5" in late.hear(Finish).error and not waits(decode, Gone)
        prefill = joining("p", "prefill", router, kv=mine)
        finish(decode, decode.hear(Submit), prefill)
        for worker in (*wrong, late):
            worker.close()
    assert answers[0].error is None
    assert "a prefill replica has not this router's --model" in capsys.readouterr().err


def test_a_replica_with_another_transport_is_refused() -> None:
    """Before a prompt is computed for it. The other flags of the hint would not help."""
    kv = {"layers": "5", **Handoff("torch").as_layout()}
    with serving(Request(0, [5], 1)) as (router, answers):
        prefill = joining("p", "prefill", router, kv=kv)
        for name, handoff, said in (
            ("w", Handoff("nixl"), "--transport is nixl, the others have torch"),
            ("x", Handoff(checksums=True), "--kv-checksum is on, the others have off"),
        ):
            wrong = joining(name, "decode", router, kv=kv | handoff.as_layout())
            assert wrong.hear(Finish).error == f"refused: its KV is not the others': {said}"
            wrong.send(Bye({}))
            wrong.close()
        decode = joining("d", "decode", router, kv=kv)
        finish(decode, decode.hear(Submit), prefill)
    assert answers[0].error is None


def test_nobody_joins_in_anothers_name(capsys: pytest.CaptureFixture) -> None:
    with serving(Request(0, [5], 1)) as (router, answers):
        prefill = joining("p", "prefill", router, members=[Member(name, HOST) for name in "pq"])
        forged = Hello("decode", [Member("x", HOST), Member("p", HOST)], 4, 64, 640, {"layers": "5"}, "x")
        stranger = Worker(forged, router.port.port)
        assert stranger.hear(Finish).error == "refused: its ranks are not its own"
        stranger.close()
        decode = joining("d", "decode", router)
        finish(decode, decode.hear(Submit), prefill)
    assert answers[0].error is None and "lost" not in capsys.readouterr().err


# ---- what a door does: submit, cancel, turn


class Heard:
    """A client that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.answers: list[Answer] = []

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        self.pieces.append(piece)
        self.tokens += tokens

    def deliver(self, answer: Answer) -> None:
        self.answers.append(answer)


def test_a_cancelled_request_is_stopped_where_it_is_and_forgotten(tiny: Path) -> None:
    """One that waits, one that runs, and one that has its answer."""
    router = make_router(RouterPort(HOST, 0))
    users = [UserRequest(i, Request(0, [5, 6], 4), []) for i in range(3)]
    clients = [Heard() for _ in users]
    waiting = router.submit(users[0], clients[0])
    router.turn(None, 0)
    router.cancel(waiting)
    assert not router._tracked and not router._waiting
    worker = replica("u", "unified", router.port.port)
    assert eventually(lambda: bool([router.turn(None, 10), worker.joined()][1]))
    running, done = (router.submit(user, client) for user, client in zip(users[1:], clients[1:], strict=True))
    router.turn(None, 0)
    first, second = worker.hear(Submit), worker.hear(Submit)
    worker.send(Updates([Tokens({first.request.uid: 45}), Update(second.request.uid, [45], finish="length")]))
    assert eventually(lambda: bool([router.turn(None, 10), clients[2].answers][1]))
    for tracked in (running, done, waiting):
        router.cancel(tracked)
        router.cancel(tracked)
    assert worker.hear(Abort).uid == first.request.uid
    only = router.fleet.replicas["u"]
    assert (only.requests, only.pages, only.prompts, router._tracked) == (set(), 0, set(), {})
    worker.send(Updates([Tokens({first.request.uid: 46})]))  # was under way
    for _ in range(3):
        router.turn(None, 10)
    assert [client.tokens for client in clients] == [[], [45], [45]]
    assert [len(client.answers) for client in clients] == [0, 0, 1] and not worker.has(Abort)
    assert clients[2].answers[0].text == "".join(clients[2].pieces)
    assert dict(router.metrics.finished) == {"cancelled": 2, "length": 1}
    worker.send(Bye({}))
    router.close()
    worker.close()
    router.port.close()


def test_a_unified_replica_that_leaves_was_interrupted_even_if_the_router_has_not_heard_so(tiny: Path) -> None:
    router, client = make_router(RouterPort(HOST, 0)), Heard()
    worker = replica("u", "unified", router.port.port)
    assert eventually(lambda: bool([router.turn(None, 10), worker.joined()][1]))
    router.submit(UserRequest(0, Request(0, [5, 6], 4), []), client)
    router.turn(None, 0)
    worker.hear(Submit)
    worker.send(Bye({}))
    assert eventually(lambda: bool([router.turn(None, 10), client.answers][1]))
    assert client.answers[0].error == INTERRUPTED
    router.close()
    worker.close()
    router.port.close()


def test_no_client_sees_the_beginning_of_its_stop_string(tiny: Path) -> None:
    """One answer ends with it. In the other it never comes, and a failure ends that answer: the text is shown then."""
    router = make_router(RouterPort(HOST, 0))
    text = "a state in the Irish Interior"
    tokens = router.tokenizer.encode(text, add_special_tokens=False).ids
    users = [UserRequest(i, Request(0, [5, 6], 40), [stop]) for i, stop in enumerate(("in the Irish", "riorities"))]
    clients = [Heard() for _ in users]
    worker = replica("u", "unified", router.port.port)
    assert eventually(lambda: bool([router.turn(None, 10), worker.joined()][1]))
    for user, client in zip(users, clients, strict=True):
        router.submit(user, client)
    router.turn(None, 0)
    uids = [worker.hear(Submit).request.uid for _ in users]
    worker.send(Updates([Tokens(dict.fromkeys(uids, token)) for token in tokens], uids))
    assert eventually(lambda: bool([router.turn(None, 10), clients[0].answers][1]))
    assert "".join(clients[1].pieces) == text.removesuffix("rior")
    worker.send(Updates([Update(uids[1], [], error="it broke")]))
    assert eventually(lambda: bool([router.turn(None, 10), clients[1].answers][1]))
    shown = ["".join(client.pieces) for client in clients]
    assert shown == ["a state ", text] == [client.answers[0].text for client in clients]
    assert [client.answers[0].finish_reason for client in clients] == ["stop", "error"]
    worker.send(Bye({}))
    router.close()
    worker.close()
    router.port.close()
