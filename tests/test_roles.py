"""The prefill and decode roles handle messages in any order: repeated, late or senseless ones too."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from disagg import connection
from disagg import prefill as prefill_module
from disagg.config import EngineConfig
from disagg.control import pulse
from disagg.control.messages import Abort, Back, Forget, Gone, Load, Member, Submit, Update, Withdraw, encode
from disagg.control.ports import RouterPort
from disagg.decode import Decode
from disagg.engine import Engine
from disagg.front.parse import UserRequest
from disagg.front.replica import Replica
from disagg.front.router import Router
from disagg.handoff.connect import Door
from disagg.handoff.protocol import Cancel, Closed, Join, Knock, Open, RoomEnded, SendPages
from disagg.handoff.receive_link import Pieces
from disagg.handoff.transports.torch_dist import TorchEndpoint
from disagg.interrupt import Interrupt
from disagg.loop import serve
from disagg.pipeline import Pipeline, Turn
from disagg.prefill import Prefill
from disagg.request import Request
from disagg.role import NOT_FINITE
from disagg.unified import Unified
from kernels.ops import Ops
from model.config import ModelConfig
from model.pages import PAGE
from parallel.mesh import Mesh
from tests.clients import listed
from tests.conftest import eventually
from tests.news import singly

HOST = "127.0.0.1"
ME, PEER, OTHER = Member("me", HOST), Member("peer", HOST), Member("other", HOST)


class FakeLink:
    """Keeps what it is told. The test says what becomes of it."""

    def __init__(self, peer: Member, generation: int) -> None:
        self.peer, self.generation, self.told, self.is_down = peer, generation, [], False
        self.bytes_moved = self.seconds_moving = self.in_flight = 0
        self.experts, self.prompt_rows = Pieces("chosen experts"), Pieces("prompt log probabilities")

    def put(self, command: Any) -> None:
        self.told.append(command)

    def stop(self) -> None:
        self.is_down = True

    def is_alive(self) -> bool:
        return not self.is_down

    def join(self, timeout: float) -> None:
        pass


@pytest.fixture
def engine(tiny: Path) -> Engine:
    settings = EngineConfig(max_batch=4, max_tokens_per_step=64, kv_tokens=256, max_model_len=256)
    return Engine.from_pretrained(settings, ModelConfig.from_pretrained(tiny), tiny, Mesh(), Ops())


@pytest.fixture
def decode(engine: Engine) -> Decode:
    role = Decode(engine, [ME], TorchEndpoint(engine.pool.device, HOST))
    role.links._make = FakeLink
    return role


def submit(role: Decode, uid: int, tokens: int = 100, prefill: Member = PEER) -> None:
    """Its prompt begins like no other one."""
    role.handle(Submit(Request(uid, [uid + 5] * tokens, 20), [prefill]))


def links(role: Decode | Prefill) -> list[FakeLink]:
    return [*role.links._dropped.values(), *role.links._links.values()]


def test_a_request_begins_when_it_has_its_pages(decode: Decode) -> None:
    """Two of 120 tokens fit into four pages."""
    for uid in range(3):
        submit(decode, uid)
    decode.admit()
    assert decode.news().begun == [0, 1] and decode.news() is None
    assert [type(command) for command in links(decode)[0].told] == [Join, Join]


def opened(decode: Decode, uid: int, **fields: Any) -> tuple[int, list[int]]:
    """Begin a request of three pages; its output needs a fourth. How many pages it has, and where its KV may come."""
    decode.handle(Submit(Request(uid, [7] * (3 * PAGE), 5, **fields), [PEER]))
    decode.admit()
    (join,) = (one for one in links(decode)[-1].told if isinstance(one, Join) and one.uid == uid)
    assert join.opening.pages == decode.incoming[uid].sequence.pages
    assert join.pages == join.opening.pages[join.opening.have : 3]
    return join.opening.have, join.opening.pages


@pytest.fixture
def roomy(tiny: Path) -> Decode:
    settings = EngineConfig(max_batch=4, max_tokens_per_step=64, kv_tokens=1024, max_model_len=256)
    engine = Engine.from_pretrained(settings, ModelConfig.from_pretrained(tiny), tiny, Mesh(), Ops())
    role = Decode(engine, [ME], TorchEndpoint(engine.pool.device, HOST))
    role.links._make = FakeLink
    return role


def test_a_prompts_pages_are_others_once_its_room_is_done_and_never_before(roomy: Decode) -> None:
    """Those that came over a link that failed, or for nobody, are no one's."""
    allocated = roomy.scheduler.cache
    assert opened(roomy, 0)[0] == 0
    roomy.handle(RoomEnded(0, "cut"))
    assert opened(roomy, 1)[0] == 0
    roomy.handle(Abort(1))
    roomy.handle(RoomEnded(1, None, 9))
    assert allocated.num_free == allocated.capacity
    have, pages = opened(roomy, 2)
    assert have == 0
    roomy.handle(RoomEnded(2, None, 9))
    assert opened(roomy, 3, cache_salt="mine")[0] == 0
    have, others = opened(roomy, 4)
    assert have == 2 and others[:2] == pages[:2] and not set(others[2:]) & set(pages), "its last page is sent"
    roomy.handle(Abort(2))
    assert roomy.load().kv_pages == 4 + 4, "what 2 and 4 shared is held by 4"
    roomy.handle(RoomEnded(4, "cut"))
    assert opened(roomy, 5)[0] == 2, "they were not of the link that failed"


@pytest.mark.parametrize(
    "token, drafts, error",
    [
        (4096, [], "prefill sent token 4096; the model's vocabulary has 4096"),
        (9, [2**31 - 1], "prefill sent token 2147483647; the model's vocabulary has 4096"),
        (9, [1], "prefill sent 1 drafts; --speculate is 0"),
    ],
)
def test_a_token_that_no_step_could_take_fails_its_room_and_not_the_job(
    roomy: Decode, token: int, drafts: list[int], error: str
) -> None:
    pipeline = Pipeline(roomy, roomy.engine, roomy.engine.mesh)
    for uid in (0, 1):
        opened(roomy, uid)
    roomy.handle(RoomEnded(0, None, 9))
    roomy.handle(RoomEnded(1, None, token, drafts=drafts))
    while pipeline.turn() == Turn.WORKED:
        pass
    news = list(singly(roomy.news().updates))
    assert [update for update in news if update.uid == 1] == [Update(1, error=error, retry=True)]
    assert [update.finish for update in news if update.uid == 0][-1] == "length", "the other one is served"
    assert roomy.scheduler.cache.num_free == roomy.scheduler.cache.capacity


def test_what_has_not_begun_is_given_back(decode: Decode) -> None:
    for uid in range(4):
        submit(decode, uid)
    decode.admit()
    decode.news()
    decode.handle(Withdraw([0, 2, 99]))
    assert decode.news().returned == [2]
    for uid in (0, 1):
        decode.handle(RoomEnded(uid, "cut"))
    decode.admit()
    assert decode.news().begun == [3], "the one that was given back must not begin"
    assert decode.failures == 2


def test_a_request_that_is_here_is_not_taken_twice(decode: Decode) -> None:
    for _ in range(2):
        for uid in range(3):
            submit(decode, uid)
        decode.admit()
    assert len(decode.queue) == 1 and [one.uid for one in decode.incoming] == [0, 1]
    assert decode.news().begun == [0, 1]


def test_a_request_without_a_prefill_replica_is_an_error(decode: Decode) -> None:
    decode.handle(Submit(Request(7, [5], 1), None))
    assert decode.news().updates == [Update(7, error="a decode replica needs a prefill replica")]


def test_a_worker_that_forgets_asks_for_its_pages_back_and_keeps_them_until_it_has_them(decode: Decode) -> None:
    """A transfer may still write to them."""
    allocator = decode.scheduler.cache
    for uid in range(3):
        submit(decode, uid)
    decode.admit()
    decode.news()
    decode.handle(Forget())
    (link,) = links(decode)
    assert [command.uid for command in link.told if isinstance(command, Cancel)] == [0, 1]
    assert not decode.queue and allocator.num_free == allocator.capacity - 4
    for uid in (0, 1):
        decode.handle(RoomEnded(uid, "cancelled"))
    assert allocator.num_free == allocator.capacity and decode.news() is None, "nobody wants to hear of them"
    assert decode.failures == 0, "what was cancelled has not failed"
    submit(decode, 0)
    decode.admit()
    assert decode.news().begun == [0], "the same number may come again, of another router"


def test_a_peer_that_was_gone_and_is_back_gets_new_links(decode: Decode) -> None:
    submit(decode, 0)
    decode.admit()
    decode.news()
    decode.handle(Gone(["peer"]))
    (old,) = links(decode)
    assert old.is_down
    decode.handle(RoomEnded(0, "link down", link_down=True))
    submit(decode, 1)
    decode.admit()
    news = decode.news()
    assert [update.retry for update in news.updates] == [True, True] and not news.begun
    decode.handle(Back(["peer"]))
    submit(decode, 2)
    decode.admit()
    assert decode.news().begun == [2]
    new = links(decode)[-1]
    assert new is not old and new.generation > old.generation and not new.is_down


def test_a_new_session_knows_nobody_who_is_gone(decode: Decode, prefill: Prefill) -> None:
    """A Back may have been told while this job was away."""
    for role in (decode, prefill):
        role.handle(Gone(["peer"]))
        role.handle(Forget())
        assert not role.links.gone
    submit(decode, 0)
    decode.admit()
    assert decode.news().begun == [0]


def test_an_abort_reaches_a_request_wherever_it_is(decode: Decode) -> None:
    for uid in range(3):
        submit(decode, uid)
    decode.admit()
    for uid in (0, 2, 5):
        decode.handle(Abort(uid))
    assert not decode.queue and not decode.incoming[0].wanted and decode.incoming[1].wanted


def test_a_decode_replica_reports_its_pages_and_those_that_nobody_wants(decode: Decode) -> None:
    """Two of three requests fit; one of these is aborted while its KV may be on its way, and one is in the batch."""
    assert decode.load() == Load(0, 0, 0, 0)
    for uid in range(3):
        submit(decode, uid)
    decode.admit()
    assert decode.load() == Load(0, 4, 0, 3)
    decode.handle(Abort(0))
    assert decode.load() == Load(0, 4, 0, 3, {}, 2)
    decode.handle(RoomEnded(1, None, 7, []))
    decode.schedule()
    assert decode.load() == Load(0, 4, 1, 2, {}, 2)
    decode.handle(RoomEnded(0, "cancelled"))
    assert decode.load() == Load(0, 2, 1, 1)


def test_a_unified_replica_reports_the_prompt_that_it_computes(engine: Engine) -> None:
    role = Unified(engine)
    for uid in range(2):
        role.handle(Submit(Request(uid, [5 + uid] * 100, 20), None))
    role.schedule().advance()
    assert role.load() == Load(136, 2, 1, 1, {0: 36})
    role.schedule().advance()
    assert role.load() == Load(72, 4, 2, 0, {1: 72})


# ---- prefill


@pytest.fixture
def prefill(engine: Engine) -> Any:
    role = Prefill(engine, [ME], Door(HOST), TorchEndpoint(engine.pool.device, HOST))
    role.links._make = FakeLink
    yield role
    role.door.close()


def test_a_second_open_of_a_room_changes_nothing(prefill: Prefill) -> None:
    for _ in range(2):
        prefill.handle(Open(Request(3, [5, 6], 1), [1], [PEER]))
    (link,) = links(prefill)
    assert [type(command) for command in link.told] == [Join] and len(prefill.scheduler.waiting) == 1


def test_a_token_that_the_model_does_not_have_closes_the_room(prefill: Prefill) -> None:
    prefill.handle(Open(Request(3, [5, 10**6], 1), [1], [PEER]))
    (link,) = links(prefill)
    assert link.told[1] == Closed(
        3, "prefill: token 1000000 is not in the vocabulary of 4096 of the model that serves it"
    )
    assert not prefill.scheduler.has_work
    prefill.handle(RoomEnded(3, "closed"))
    assert not prefill.outgoing


def test_a_prompt_whose_logits_are_not_finite_closes_its_room(prefill: Prefill) -> None:
    engine = prefill.engine
    engine.model.head.norm.weight.data.fill_(float("nan"))
    prefill.handle(Open(Request(3, [5] * (PAGE - 1) + [6], 1), [1], [PEER]))
    step = engine.launch(prefill.schedule(), None, PAGE)
    prefill.launched(step)
    prefill.take_up(step)
    (link,) = links(prefill)
    assert link.told[-1] == Closed(3, f"prefill: {NOT_FINITE}")
    prefill.handle(RoomEnded(3, "closed"))
    assert not prefill.outgoing and engine.scheduler.cache.num_free == engine.scheduler.cache.capacity
    assert engine.scheduler.cache.stats()["cache_idle_pages"] == 0, "its page may be damaged"


def test_a_page_is_sent_once_when_it_is_full_and_the_last_one_with_the_prompt(prefill: Prefill) -> None:
    """Two prompts share steps of 64 tokens, so that chunks end within pages."""
    engine, length = prefill.engine, 100
    for uid in (3, 4):
        prefill.handle(Open(Request(uid, [5] * length, 1), [10 * uid, 10 * uid + 1], [PEER]))
    (link,) = links(prefill)
    sent: dict[int, list[int]] = {3: [], 4: []}
    for _ in range(4):  # 64 of the first, its last 36 and 28 of the second, 64, 8
        step = engine.launch(prefill.schedule(), None, 64)
        link.told.clear()
        prefill.launched(step)
        for command in link.told:
            if isinstance(command, SendPages):
                sent[command.uid] += command.theirs
        for uid, pages in sent.items():
            computed = prefill.outgoing[uid].sequence.computed
            full = computed // PAGE if computed < length else 2
            assert pages == [10 * uid, 10 * uid + 1][:full], (uid, computed)
        left = {uid: length - outgoing.sequence.computed for uid, outgoing in prefill.outgoing.items()}
        begun = {uid: tokens for uid, tokens in left.items() if tokens < length}
        load = prefill.load()
        assert (load.queued_tokens, load.tokens_left) == (sum(left.values()), begun)
    assert not prefill.scheduler.has_work and load.tokens_left == {3: 0, 4: 0}


def test_pages_from_the_cache_leave_with_the_first_chunk_and_what_decode_has_does_not(prefill: Prefill) -> None:
    """They wait for the step before, or for this one if it is the one that fills them."""
    engine, prompt = prefill.engine, [5] * (2 * PAGE)
    prefill.scheduler.max_tokens_per_step = 256

    def sent() -> list[tuple[int, list[int], Any]]:
        step = replace(engine.launch(prefill.schedule(), None, 64), done=object())
        links(prefill)[0].told.clear()
        prefill.launched(step)
        told = [one for one in links(prefill)[0].told if isinstance(one, SendPages)]
        names = {id(step.done): "this step", id(before): "the step before"}
        return [(one.uid, one.theirs, names[id(one.ready)]) for one in told]

    before = prefill.before
    prefill.handle(Open(Request(1, prompt, 1), [10, 11], [PEER]))
    prefill.handle(Open(Request(2, [*prompt, 6], 1), [20, 21, 22], [PEER]))
    assert sent() == [(1, [10, 11], "this step"), (2, [20, 21, 22], "this step")]
    before = prefill.before
    for uid in (1, 2):
        prefill.handle(RoomEnded(uid))
    prefill.handle(Open(Request(3, [*prompt, 7], 1), [30, 31, 32], [PEER]))
    prefill.handle(Open(Request(4, [*prompt, 8], 1), [40, 41, 42], [PEER], have=1))
    assert sent() == [
        (3, [30, 31], "the step before"),
        (3, [32], "this step"),
        (4, [41], "the step before"),
        (4, [42], "this step"),
    ]
    for uid in (3, 4):
        prefill.handle(RoomEnded(uid))
    before = prefill.before
    prefill.handle(Open(Request(5, [*prompt, 9], 1), [50, 51, 52], [PEER], have=2))
    assert sent() == [(5, [52], "this step")]


def test_no_more_links_are_made_than_a_rank_can_have(prefill: Prefill, monkeypatch: Any, capsys: Any) -> None:
    """Each has two threads and six files. A peer that has one is still heard."""
    monkeypatch.setattr(prefill_module, "MOST_LINKS", 3)
    sock = zmq.Context.instance().socket(zmq.PUSH)
    sock.connect(f"tcp://{HOST}:{prefill.door.port}")
    for number in range(8):
        sock.send(encode(Knock(Member(f"d{number}", HOST), 0)))
    sock.send(b"\x82\xa4type\xa5Knock\xa1z" + b"\x91" * 200_000 + b"\xc0")
    sock.send(encode(Knock(Member("d1", HOST), 0)))

    def heard() -> bool:
        prefill.collect()
        return prefill.stats() == {"refusals": 6}

    assert eventually(heard), prefill.stats()
    said = capsys.readouterr().err
    assert said.count("prefill: at the door: a link was refused: 3 are open\n") == 1
    assert said.count("prefill: at the door: a message that is no knock was refused: ") == 1 == said.count("\n") - 1
    assert sorted(link.peer.id for link in links(prefill)) == ["d0", "d1", "d2"]
    links(prefill)[0].is_down = True
    sock.send(encode(Knock(OTHER, 0)))
    assert eventually(lambda: not prefill.collect() and len(links(prefill)) == 4)
    sock.close()


def test_a_room_for_more_ranks_than_links_can_be_made_to_fails(prefill: Prefill, monkeypatch: Any, capsys: Any) -> None:
    """Its other links hear why, and nothing of it stays. The next room with one of them is served."""
    monkeypatch.setattr(prefill_module, "MOST_LINKS", 3)
    ranks = [Member(f"d{number}", HOST) for number in range(5)]
    prefill.handle(Open(Request(7, [5] * 40, 1), [1], ranks))
    assert [link.peer.id for link in links(prefill)] == ["d0", "d1", "d2"] and prefill.stats() == {"refusals": 2}
    refused = prefill.collect()
    assert refused == [RoomEnded(7, "prefill: no link: 3 are open", link_down=True)] * 2
    assert "prefill: at the door: a link was refused: 3 are open\n" in capsys.readouterr().err
    for event in [*refused, *[RoomEnded(7, "closed")] * 3]:
        assert 7 in prefill.outgoing
        prefill.handle(event)
    assert not prefill.outgoing and not prefill.schedule().prefills
    prefill.handle(Open(Request(8, [5] * 40, 1), [1], ranks[2:3]))
    assert prefill.schedule().prefills and len(links(prefill)) == 3


# ---- the loop


class Never(Interrupt):
    """Leaves the signals of this process alone."""

    def __init__(self) -> None:
        self.seen = self.draining = False


def test_the_router_hears_the_load_with_the_beats(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt of four chunks, while it is computed and afterwards."""
    for where, name, value in ((pulse, "BEAT_S", 0.002), (connection, "LOAD_S", 0.0)):
        monkeypatch.setattr(where, name, value)
    port, answers, heard = RouterPort(HOST, 0), {}, []
    router = Router(port, None, engine.config.vocab_size, lambda: False)
    work = listed([UserRequest("x", Request(0, [5] * 240, 10), [])], answers.__setitem__)
    hear = Replica.hear
    monkeypatch.setattr(Replica, "hear", lambda replica, load: (heard.append(load), hear(replica, load)))
    thread = threading.Thread(target=lambda: router.run(work), daemon=True)
    thread.start()
    assert serve("unified", engine, engine.mesh, (HOST, port.port), Never()) is None
    thread.join(20)
    port.close()
    assert answers[0].error is None
    chunks = [load for load in heard if load.tokens_left]
    assert chunks and {(load.queued_tokens, *load.tokens_left.values()) for load in chunks} <= {
        (176, 176),
        (112, 112),
        (48, 48),
    }
    assert {(load.kv_pages, load.running, load.waiting) for load in chunks} == {(4, 1, 0)}
    assert any((load.queued_tokens, load.kv_pages, load.tokens_left) == (0, 4, {}) for load in heard)
