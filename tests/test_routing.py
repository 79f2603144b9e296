"""A request goes to the least loaded replicas, or to those that served its session or prefix, if they are close."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from disagg.control.messages import Hello, Kept, Load, Member
from disagg.front.apart import APART_S
from disagg.front.recent import Recent
from disagg.front.replica import Replica
from disagg.front.routing import KV_SKEW, LEAST_AHEAD, MOST_PAGES, Choice, Routing
from disagg.front.spread import Spread, Spreads, spread
from disagg.page_digest import page_digests
from disagg.request import Request
from model.pages import PAGE
from scripts.bench.lib.measurements import load
from scripts.tools import routing_sim
from tests.processes import run_module

CAPACITY = 1000  # pages
STEP_TOKENS = 10 * PAGE


def replica(name: str, role: str, pages: int = 0, queued: int = 0, **more: Any) -> Replica:
    """A replica with one request of so many pages, and one prompt with so many tokens."""
    fields = {"max_batch": 8, "step_tokens": STEP_TOKENS, "kv_tokens": CAPACITY * PAGE, "kv": {}, "job": name}
    fields |= {"caches": True} | more
    made = Replica(name, Hello(members=[Member(name, "")], **{"role": role} | fields))
    if pages:
        made.add_request(-1, pages)
    if queued:
        made.add_prompt(-1, queued)
    return made


def choose(
    routing: Routing, decodes: list[Replica], prefills: list[Replica], prompt: list[int], session: str | None = None
) -> tuple[str, str] | None:
    choice = chosen(routing, Request(0, prompt, 1), decodes, prefills, session)
    return choice and (choice.decode.id, choice.prefill.id)


def chosen(
    routing: Routing, request: Request, decodes: list[Replica], prefills: list[Replica], session: str | None = None
) -> Choice | None:
    """The choice. Its pages are on their way from now on, but no load is booked."""
    choice = routing.choose(request, session, decodes, prefills)
    if choice is not None:
        for one in {choice.decode, choice.prefill}:
            one.kept.bring(choice.prefix)
    return choice


# ---- the least loaded


def test_decode_goes_by_the_share_of_kv_and_prefill_by_queued_tokens() -> None:
    """The larger replica has more pages in use, but a smaller share."""
    decodes = [replica("a", "decode", 400), replica("b", "decode", 600, kv_tokens=2 * CAPACITY * PAGE)]
    prefills = [replica("p", "prefill", queued=30), replica("q", "prefill", queued=20)]
    assert choose(Routing(), decodes, prefills, [5]) == ("b", "q")


def test_a_prompt_counts_by_its_tokens_left_and_a_late_report_takes_nothing_back() -> None:
    prefills = [replica("p", "prefill"), replica("q", "prefill", queued=50)]
    prefills[0].add_prompt(7, 1000)
    decodes = [replica("d", "decode")]
    assert choose(Routing(), decodes, prefills, [5]) == ("d", "q")
    for left in (40, 900):
        prefills[0].hear(Load(0, 0, 0, 0, {7: left, 8: 1}))
        assert prefills[0].queued_tokens == 40
    assert choose(Routing(), decodes, prefills, [5]) == ("d", "p")


def test_a_prefill_replica_whose_prompts_are_nearly_done_has_time_for_more() -> None:
    prefill = replica("p", "prefill")
    for uid in range(LEAST_AHEAD):
        prefill.add_prompt(uid, STEP_TOKENS)
    assert choose(Routing(), [replica("d", "decode")], [prefill], [5]) is None
    prefill.hear(Load(0, 0, 0, 0, {0: 0, 1: 0, 2: 1}))
    assert choose(Routing(), [replica("d", "decode")], [prefill], [5]) == ("d", "p")


def test_pages_that_aborted_requests_still_hold_are_not_free() -> None:
    """A report may name more of them than there are pages. The replica is tried again when it has no requests."""
    decode, prefill = replica("d", "decode", CAPACITY // 2), replica("p", "prefill")
    assert choose(Routing(), [decode], [prefill], [5] * 400 * PAGE) == ("d", "p")
    for unwanted in (200, 2**50):
        decode.hear(Load(0, 0, 0, 0, {}, unwanted))
        assert choose(Routing(), [decode], [prefill], [5] * 400 * PAGE) is None
        assert decode.kv_pages == CAPACITY // 2 + min(unwanted, CAPACITY)
    decode.end_request(-1)
    assert choose(Routing(), [decode], [prefill], [5] * 400 * PAGE) == ("d", "p")


def test_jobs_whose_link_failed_are_kept_apart_while_others_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the others have no time now: then the request waits. The replicas of a job share its network."""
    routing, now = Routing(), [100.0]
    monkeypatch.setattr("disagg.front.apart.time.monotonic", lambda: now[0])
    decodes = [replica("a", "decode", 1, job="d"), replica("b", "decode", 900, job="e")]
    prefills = [replica("p", "prefill", job="p"), replica("q", "prefill", queued=30, job="q")]
    assert choose(routing, decodes, prefills, [5]) == ("a", "p")
    routing.apart.add(decodes[0], replica("r", "prefill", job="p"))
    assert choose(routing, decodes, prefills, [5]) == ("a", "q")
    prefills[1].add_prompt(1, 2 * STEP_TOKENS)
    for uid in range(2, 1 + LEAST_AHEAD):
        prefills[1].add_prompt(uid, 1)
    assert choose(routing, decodes[:1], prefills, [5]) is None, "q has no time"
    assert choose(routing, decodes, prefills, [5]) == ("b", "p")
    assert choose(routing, decodes[:1], prefills[:1], [5]) == ("a", "p"), "nobody else is there"
    routing.apart.add(decodes[0], prefills[1])
    assert choose(routing, decodes[:1], prefills, [5]) == ("a", "p"), "all pairs have failed"
    now[0] += APART_S + 1
    assert choose(routing, decodes, prefills, [5]) == ("a", "p")


def test_a_unified_replica_serves_both_sides() -> None:
    both = [replica("a", "unified", 30), replica("b", "unified", 20)]
    assert choose(Routing(), both, [], [5]) == ("b", "b")


# ---- the same replica again


def test_a_session_stays_on_its_decode_replica_within_the_skew_limit() -> None:
    """The limit is the pages of its prompt, at most a small share of the KV."""
    for pages, limit in ((1, 1), (15, 15), (60, KV_SKEW * CAPACITY)):
        routing, prompt = Routing(), [5] * (pages * PAGE)
        decodes, prefills = [replica("a", "decode", 300), replica("b", "decode", 300)], [replica("p", "prefill")]
        assert choose(routing, decodes, prefills, prompt, "mine") == ("a", "p")
        decodes[0].add_request(1, int(limit))
        assert choose(routing, decodes, prefills, [6] * len(prompt), "other") == ("b", "p")
        assert choose(routing, decodes, prefills, prompt, "mine") == ("a", "p")
        decodes[0].add_request(2, 1)
        assert choose(routing, decodes, prefills, prompt, "mine") == ("b", "p")
        assert choose(routing, [decodes[0]], prefills, prompt, "mine") == ("a", "p"), "there is no other"


def test_a_prefix_stays_on_its_prefill_replica_within_the_skew_limit() -> None:
    """The limit is the tokens in common, at most a step's."""
    for pages, limit in ((0, 0), (1, PAGE), (7, 7 * PAGE), (15, STEP_TOKENS)):
        routing, decodes = Routing(), [replica("d", "decode")]
        prefills = [replica("p", "prefill", queued=1), replica("q", "prefill", queued=1)]
        common = [5] * (pages * PAGE)
        assert choose(routing, decodes, prefills, [*common, 1, 2]) == ("d", "p")
        prefills[0].add_prompt(1, limit or 1)
        follow_up = [*common, 3, 4, 5]
        assert choose(routing, decodes, prefills, follow_up) == ("d", "p" if pages else "q")
        prefills[0].add_prompt(2, 1)
        assert choose(routing, decodes, prefills, follow_up) == ("d", "q")


def test_the_longest_prefix_decides_and_a_replica_that_left_does_not() -> None:
    routing, decodes = Routing(), [replica("d", "decode")]
    p, q = replica("p", "prefill"), replica("q", "prefill")
    system, one, other = [1] * PAGE, [2] * PAGE, [3] * PAGE
    assert choose(routing, decodes, [p, q], system + one) == ("d", "p")
    p.add_prompt(1, 2 * PAGE)
    assert choose(routing, decodes, [p, q], system + other) == ("d", "q")
    q.add_prompt(2, PAGE)
    assert choose(routing, decodes, [p, q], system + one + [7]) == ("d", "p")
    assert choose(routing, decodes, [q], system + one + [7]) == ("d", "q")
    assert choose(routing, decodes, [p, q], system + [9] * PAGE) == ("d", "q"), "both have the first page"


def test_a_prefix_stays_on_its_decode_replica_within_the_skew_limit() -> None:
    """The limit is the pages in common, at most a small share of the KV. A session counts for more than a prefix."""
    for pages, limit in ((0, 0), (1, 1), (15, 15), (60, KV_SKEW * CAPACITY)):
        routing, prefills = Routing(), [replica("p", "prefill")]
        decodes = [replica("a", "decode", 300), replica("b", "decode", 300)]
        common = [5] * (pages * PAGE)
        assert choose(routing, decodes, prefills, [*common, 1, 2]) == ("a", "p")
        decodes[0].add_request(1, int(limit) or 1)
        assert choose(routing, decodes, prefills, [*common, 3, 4]) == ("a" if pages else "b", "p")
        decodes[0].add_request(2, 1)
        assert choose(routing, decodes, prefills, [*common, 3, 4]) == ("b", "p")
    assert choose(routing, [*decodes, replica("c", "decode")], prefills, [9] * PAGE, "mine") == ("c", "p")
    near = [replica("b", "decode"), replica("c", "decode")]
    assert choose(routing, near, prefills, [*common, 7], "mine") == ("c", "p")


def test_a_cache_that_gave_up_a_prefix_is_no_reason_any_more() -> None:
    """In prefill and in decode. What is on its way counts meanwhile."""
    routing, prompt = Routing(), [5] * (3 * PAGE + 1)
    decodes = [replica(name, "decode", 2 * (name == "a")) for name in "ab"]
    prefills = [replica(name, "prefill", queued=PAGE * (name == "p")) for name in "pq"]
    assert routing.choose(Request(0, prompt, 1), None, decodes, prefills)[:2] == (decodes[1], prefills[1])
    pages = page_digests(prompt, "", MOST_PAGES)
    for one in (decodes[0], prefills[0]):
        one.kept.hear(Kept(pages.tobytes()))
    choice = routing.choose(Request(0, prompt, 1), None, decodes, prefills)
    assert (choice.decode.id, choice.prefill.id, choice.tokens) == ("a", "p", 1)
    choice.book(Request(0, prompt, 1))
    for one in (decodes[0], prefills[0]):
        one.kept.hear(Kept(lost=pages.tobytes()))
        one.kept.hear(Kept())
        one.kept.hear(Kept())
        assert one.kept.count(pages) == 3, "the request is in the book"
    decodes[0].end_request(0)
    prefills[0].end_prompt(0)
    for report in range(2):
        choice = routing.choose(Request(1, prompt, 1), None, decodes, prefills)
        assert choice[:2] == (decodes[0], prefills[0]), f"{report} reports came since"
        for one in (decodes[0], prefills[0]):
            one.kept.hear(Kept())
    choice = routing.choose(Request(1, prompt, 1), None, decodes, prefills)
    assert (choice.decode.id, choice.prefill.id, choice.tokens) == ("b", "q", len(prompt))


def test_of_those_that_have_a_prefix_the_least_loaded_gets_it_and_only_what_others_lack_is_saved() -> None:
    routing, decodes = Routing(), [replica("d", "decode")]
    system, talk = [1] * (4 * PAGE), [2] * PAGE
    prefills = [replica(name, "prefill", queued=load) for name, load in (("p", 3 * PAGE), ("q", 9), ("r", 8))]
    for one in prefills[:2]:
        one.kept.hear(Kept(page_digests(system, "", MOST_PAGES).tobytes()))
    assert choose(routing, decodes, prefills, [*system, 9]) == ("d", "q")
    prefills[0].kept.hear(Kept(page_digests(system + talk, "", MOST_PAGES).tobytes()))
    for queued, where in ((9 + PAGE, "p"), (10 + PAGE, "q")):  # one page more than q, which is the least loaded with r
        prefills[0].queued_tokens, prefills[2].queued_tokens = queued, 9
        prefills[2].kept.hear(Kept(page_digests(system, "", MOST_PAGES).tobytes()))
        assert routing.choose(Request(0, [*system, *talk, 9], 1), None, decodes, prefills).prefill.id == where


def test_without_a_cache_a_prefix_is_no_reason_to_prefer_a_decode_replica() -> None:
    prompt, prefills = [5] * (3 * PAGE), [replica("p", "prefill")]
    for caches, fields, where in ((True, {}, "a"), (False, {}, "b"), (True, {"return_experts": True}, "b")):
        routing, decodes = Routing(), [replica(name, "decode", caches=caches) for name in "ab"]
        assert chosen(routing, Request(0, prompt, 1), decodes, prefills).decode.id == "a"
        decodes[0].add_request(0, 1)
        choice = chosen(routing, Request(1, prompt, 1, **fields), decodes, prefills)
        assert choice.decode.id == where, (caches, fields)


def test_another_salt_is_another_prefix() -> None:
    routing, decodes, prompt = Routing(), [replica("d", "decode")], [5] * (3 * PAGE)
    prefills = [replica("p", "prefill"), replica("q", "prefill")]
    assert chosen(routing, Request(0, prompt, 1), decodes, prefills).prefill.id == "p"
    prefills[0].add_prompt(1, PAGE)
    for salt, where in (("", "p"), ("mine", "q"), ("mine", "q")):
        choice = chosen(routing, Request(0, prompt, 1, cache_salt=salt), decodes, prefills)
        assert choice.prefill.id == where, salt
        prefills[1].queued_tokens = 0


@pytest.mark.parametrize("caches", [False, True])
def test_what_prefill_presumably_has_is_not_counted_as_queued(caches: bool) -> None:
    """At least one token is computed. A prompt whose rows are wanted is computed whole."""
    routing, decodes = Routing(), [replica("d", "decode")]
    prefills = [replica("p", "prefill", caches=caches), replica("q", "prefill", caches=caches, queued=9 * PAGE)]

    def tokens(length: int, **fields: Any) -> int:
        return chosen(routing, Request(0, [5] * length, 1, **fields), decodes, prefills).tokens

    assert tokens(2 * PAGE + 7) == 2 * PAGE + 7
    assert tokens(2 * PAGE + 9) == (9 if caches else 2 * PAGE + 9)
    assert tokens(2 * PAGE) == (PAGE if caches else 2 * PAGE)
    assert tokens(2 * PAGE, return_experts=True) == 2 * PAGE
    assert tokens(2 * PAGE + 9, cache_salt="mine") == 2 * PAGE + 9
    del prefills[0]
    assert tokens(2 * PAGE + 9) == 2 * PAGE + 9, "the other one has none of it"


def test_a_unified_replica_keeps_a_session_and_a_prefix() -> None:
    routing, prompt = Routing(), [5] * (2 * PAGE)
    both = [replica("a", "unified", 100), replica("b", "unified", 100)]
    assert choose(routing, both, [], prompt, "mine") == ("a", "a")
    both[0].add_request(1, 2)
    assert choose(routing, both, [], prompt) == ("a", "a")
    assert choose(routing, both, [], [6] * (2 * PAGE), "mine") == ("a", "a")
    assert choose(routing, both, [], [7] * (2 * PAGE), "other") == ("b", "b")


def test_the_sessions_that_are_remembered_are_bounded_and_the_oldest_goes_first() -> None:
    recent = Recent(3)
    for name in "abcad":
        recent.put(name, name)
    assert [recent.get(name) for name in "abcd"] == ["a", None, "c", "d"]


# ---- spread


def test_the_spread_is_that_of_the_replicas_that_have_the_load() -> None:
    some = [replica("p", "prefill", queued=10), replica("q", "prefill", queued=40), replica("d", "decode", 250)]
    assert spread(some) == {"queued": Spread(2, 10, 25, 40), "KV": Spread(1, 0.25, 0.25, 0.25)}
    assert spread([replica("u", "unified", 500, 8)]) == {"queued": Spread(1, 8, 8, 8), "KV": Spread(1, 0.5, 0.5, 0.5)}
    assert spread([]) == {}


def test_the_summary_has_the_means_over_the_run_while_there_was_load() -> None:
    spreads, idle = Spreads(), [replica(name, role) for name, role in (("p", "prefill"), ("q", "prefill"))]
    spreads.add(idle)
    assert spreads.rows() == []
    spreads.add([replica("p", "prefill", queued=1000), replica("q", "prefill", queued=3000)])
    spreads.add([replica("p", "prefill", queued=0), replica("q", "prefill", queued=1000), replica("d", "decode", 250)])
    spreads.add(idle)
    rows = [("queued", "500 to 2,000 prompt tokens on the least and the most loaded replica, on average")]
    assert spreads.rows() == rows, "one decode replica alone has no spread"
    spreads.add([replica("d", "decode", 250), replica("e", "decode", 125)])
    assert spreads.rows() == [*rows, ("KV", "12.5% to 25.0% on the least and the most loaded replica, on average")]


# ---- the book and the reports


class Life(RuleBasedStateMachine):
    """One prefill and one decode replica, and the router's view of them, with messages that arrive late.

    Beats come in order among themselves. Between beats, news of requests and the router's messages, any order is
    possible.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefill, self.decode = replica("p", "prefill"), replica("d", "decode")
        self.uids = 0
        self.served: dict[int, tuple[int, int]] = {}  # that the router knows: uid -> (tokens, pages)
        self.sent: deque[tuple[str, int]] = deque()  # the router's messages to the decode replica
        self.news: deque[tuple[str, int]] = deque()  # to the router
        self.beats: dict[str, deque[Load]] = {"p": deque(), "d": deque()}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.left: dict[int, int] = {}  # at the prefill replica, until it has sent the first token
        self.rooms: set[int] = set()  # uids with pages, whose first token has not come
        self.unwanted: set[int] = set()  # rooms of aborted requests
        self.running: set[int] = set()  # uids in the decode replica's batch

    def pages(self, uids: Any) -> int:
        return sum(self.sizes[uid][1] for uid in uids)

    @rule(tokens=st.integers(1, 300), pages=st.integers(1, 5))
    def send(self, tokens: int, pages: int) -> None:
        uid, self.uids = self.uids, self.uids + 1
        self.sizes[uid] = self.served[uid] = (tokens, pages)
        self.prefill.add_prompt(uid, tokens)
        self.decode.add_request(uid, pages)
        self.sent.append(("submit", uid))

    def forget(self, uid: int) -> None:
        del self.served[uid]
        self.prefill.end_prompt(uid)
        self.decode.end_request(uid)

    @precondition(lambda self: self.served)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        uid = data.draw(st.sampled_from(sorted(self.served)))
        self.forget(uid)
        self.sent.append(("abort", uid))

    @precondition(lambda self: self.sent)
    @rule()
    def arrive(self) -> None:
        kind, uid = self.sent.popleft()
        if kind == "submit":
            self.rooms.add(uid)
            self.left[uid] = self.sizes[uid][0]
        elif uid in self.rooms:
            self.unwanted.add(uid)
        else:
            self.running.discard(uid)

    @precondition(lambda self: any(self.left.values()))
    @rule(tokens=st.integers(1, 200))
    def compute(self, tokens: int) -> None:
        for uid in self.left:
            count = min(tokens, self.left[uid])
            self.left[uid] -= count
            tokens -= count

    @precondition(lambda self: 0 in self.left.values())
    @rule()
    def hand_over(self) -> None:
        uid = next(uid for uid, tokens in self.left.items() if not tokens)
        del self.left[uid]
        self.rooms.remove(uid)
        if uid in self.unwanted:
            self.unwanted.remove(uid)
        else:
            self.running.add(uid)
            self.news.append(("first", uid))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        uid = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(uid)
        self.news.append(("last", uid))

    @precondition(lambda self: self.news)
    @rule()
    def hear_news(self) -> None:
        kind, uid = self.news.popleft()
        if uid in self.served and kind == "first":
            self.prefill.end_prompt(uid)
        elif uid in self.served:
            self.forget(uid)

    @rule()
    def beat(self) -> None:
        begun = {uid: left for uid, left in self.left.items() if left < self.sizes[uid][0]}
        self.beats["p"].append(Load(sum(self.left.values()), 0, len(begun), len(self.left) - len(begun), begun))
        held = self.pages(self.rooms | self.running)
        self.beats["d"].append(Load(0, held, len(self.running), len(self.rooms), {}, self.pages(self.unwanted)))

    def hear(self, one: Replica) -> None:
        one.hear(self.beats[one.id].popleft())

    @precondition(lambda self: self.beats["p"])
    @rule()
    def hear_prefill(self) -> None:
        self.hear(self.prefill)

    @precondition(lambda self: self.beats["d"])
    @rule()
    def hear_decode(self) -> None:
        self.hear(self.decode)

    @invariant()
    def nothing_that_is_certain_is_missing(self) -> None:
        unseen = {uid for kind, uid in self.sent if kind == "submit"}
        queued = sum(self.sizes[u][0] if u in unseen else self.left.get(u, 0) for u in self.served)
        assert 0 <= queued <= self.prefill.queued_tokens <= sum(tokens for tokens, _ in self.served.values())
        assert 0 <= self.pages(self.served) <= self.decode.kv_pages

    @rule()
    def after_all_messages_the_load_is_exact(self) -> None:
        while self.sent:
            self.arrive()
        while self.news:
            self.hear_news()
        self.beat()
        for one in (self.prefill, self.decode):
            while self.beats[one.id]:
                self.hear(one)
        assert self.prefill.queued_tokens == sum(self.left[uid] for uid in self.left.keys() & self.served.keys())
        assert self.decode.kv_pages == self.pages(self.rooms | self.running)

    def teardown(self) -> None:
        while self.left or self.running or self.sent:
            while self.sent:
                self.arrive()
            self.left = dict.fromkeys(self.left, 0)
            while self.left:
                self.hand_over()
            self.news.extend(("last", uid) for uid in self.running)
            self.running.clear()
        self.after_all_messages_the_load_is_exact()
        assert (self.prefill.queued_tokens, self.decode.kv_pages) == (0, 0)
        assert not self.prefill.prompts and not self.decode.requests


def test_no_order_of_messages_makes_a_load_wrong() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


# ---- simulated


def test_the_command_writes_figures_that_say_that_they_are_simulated(tmp_path: Path) -> None:
    done = run_module("scripts.tools.routing_sim", "--requests", "40", "--out", str(tmp_path / "o.json"), timeout=60)
    assert done.returncode == 0, done.stderr
    records = load(tmp_path / "o.json")
    assert {record.kind for record in records} == {"simulated"} and len({record.name for record in records}) == 16
    assert "simulated" in done.stdout and "chance, with room" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "--rate must be over 0"),
        (["--sigma", "6"], "--sigma at most 5"),
        (["--kv-tokens", "1000"], "--kv-tokens (1000) must hold a prompt and an output of --limit (32768) in pages"),
        (["--requests", "0"], "argument --requests: '0' is not"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        routing_sim.parse(words)
    assert message in capsys.readouterr().err


def test_loads_are_far_more_even_than_by_chance_and_sessions_do_not_undo_that() -> None:
    """Simulated. An even load is 1, so the excess over that is what can be less.

    Sessions find much in caches. With less to compute, single prompts are more of it, so the floor is higher.
    """
    args = routing_sim.parse(["--requests", "500", "--output", "50"])
    found = routing_sim.compare(args)
    chance, ours, sticky = found["chance"], found["routing"], found["routing, sessions"]
    assert ours.queued - 1 < 0.7 * (chance.queued - 1)
    assert sticky.queued - sticky.queued_floor < 0.7 * (chance.queued - chance.queued_floor)
    assert sticky.most_queued < ours.most_queued < 0.7 * chance.most_queued
    for one in (ours, sticky):
        assert one.kv - 1 < 0.5 * (chance.kv - 1)
        assert one.ttft_s < chance.ttft_s
    assert sticky.same_prefill > 2 * ours.same_prefill and sticky.same_decode > 2 * ours.same_decode
