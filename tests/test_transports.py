"""Every transport: the same tokens between jobs of any shape, peers that die, libraries that are missing.

`test_handoff.py` tests the links over each of them.
"""

import os
import queue
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from disagg.config import EngineConfig
from disagg.control.messages import Member
from disagg.engine import Engine
from disagg.front.parse import UserRequest
from disagg.handoff import credits
from disagg.handoff.connect import Door, dial, link_key, listen
from disagg.handoff.credits import IN_FLIGHT, Credits
from disagg.handoff.endpoints import TRANSPORTS, Handoff
from disagg.handoff.protocol import Join, Open, RoomEnded, RoomFailed, SendLast, SendPages
from disagg.handoff.receive_link import ReceiveLink
from disagg.handoff.send_link import SendLink
from disagg.handoff.transports.one_sided import PAGES, WHERE
from disagg.interrupt import Interrupt
from disagg.request import Request
from kernels.ops import Ops
from model.config import ModelConfig
from model.footprint import page_bytes
from tests.conftest import eventually
from tests.deployment import Deployment, read
from tests.processes import fork_server
from tests.test_handoff import CANARY, CPU, HOST, HUGE, SOON, obstacle
from tests.test_worlds import one_run
from tests.worlds import run_world, sub_mesh

ONE_SIDED = [name for name in TRANSPORTS if name != "torch"]
SIZES = {"max_batch": 4, "max_tokens_per_step": 96, "kv_tokens": 1024, "max_model_len": 512}
SETTINGS = EngineConfig(**SIZES, redundant_experts=1, prefix_cache="off")  # every page is sent over every library
EVEN = replace(SETTINGS, redundant_experts=0)
# (first rank, ranks, attention TP) of the prefill and of the decode job. Three ranks need a redundant expert.
JOBS = [((0, 1, 1), (1, 1, 1)), ((0, 2, 2), (2, 1, 1)), ((0, 1, 1), (1, 3, 1)), ((0, 2, 1), (2, 2, 2))]


def needs(library: str) -> None:
    """Skip the test where the library cannot be used."""
    if why_not := obstacle(library):
        pytest.skip(why_not)


# ---- tokens


def prompts(vocab_size: int) -> list[UserRequest]:
    """One token, both sides of a page's end, and several chunks."""
    rng = random.Random(1)
    made = []
    for i, length in enumerate((1, 64, 65, 300, 130)):
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        made.append(UserRequest(i, Request(0, prompt, 4, ignore_eos=True), []))
    return made


def body(rank: int, folder: Path, libraries: list[str]) -> None:
    config, interrupt = ModelConfig.from_pretrained(folder), Interrupt()
    credits.MOST_BYTES = 2 * page_bytes(config, 4)  # so that a prompt takes several transfers
    engines: dict[tuple[int, int, int], tuple[Any, Any]] = {}

    def engine(shape: tuple[int, int, int]) -> tuple[Any, Any]:
        if shape not in engines:
            mesh, settings = sub_mesh(*shape), SETTINGS if shape[1] == 3 else EVEN
            engines[shape] = (
                Engine.from_pretrained(settings, config, folder, mesh, Ops()) if mesh is not None else None,
                mesh,
            )
        return engines[shape]

    expected = one_run([("unified", *engine((0, 1, 1)))], folder, interrupt, prompts)
    if rank == 0:
        assert [len(tokens) for tokens, *_ in expected] == [4] * 5
    for library in libraries:
        for prefill, decode in JOBS:
            jobs = [("prefill", *engine(prefill)), ("decode", *engine(decode))]
            got = one_run(jobs, folder, interrupt, prompts, Handoff(library, checksums=True))
            assert got == expected or rank, f"{library}, {prefill} to {decode}: {got} instead of {expected}"


def test_jobs_of_any_shape_give_the_same_tokens_over_every_transport(small: Path) -> None:
    libraries = [name for name in TRANSPORTS if obstacle(name) is None]
    run_world(4, body, small, libraries, timeout_s=120)


def test_run_py_serves_over_the_library_of_its_flags_and_says_so(tiny: Path, tmp_path: Path) -> None:
    needs("nixl")
    source = tmp_path / "one.jsonl"
    source.write_text('{"prompt": "In the beginning", "max_tokens": 3}\n')
    deployment = Deployment(tiny, source, tmp_path / "out.jsonl")
    for role in ("prefill", "decode"):
        deployment.start_job(role, 1, "--transport", "nixl", "--kv-checksum")
    deployment.start_router()
    ended = deployment.finish()
    assert [code for code, *_ in ended.values()] == [0, 0, 0], ended
    line = "decode: a link to prefill rank 0 at 127.0.0.1: NIXL "
    assert ended["decode"][2].count(line) == 1 and ended["decode"][1] == ""
    (answer,) = read(deployment.out)
    assert len(answer["token_ids"]) == 3 and "error" not in answer


# ---- peers that die


def prefill_that_stops(library: str, prefill: Member, decode: Member, doing: Any) -> None:
    """A peer process with a link: it says Sending, and is stopped before it is read from."""
    os.environ["UCX_TLS"] = "tcp,self"  # over shared memory UCX would not need this process any more
    pool = torch.full(HUGE, 5.0)
    door, endpoint = Door(HOST), Handoff(library).make_endpoint(HOST, pool)
    doing.put(Member(prefill.id, HOST, door.port, door.store.port))
    assert door.poll(SOON * 1000)
    events = queue.SimpleQueue()
    link = SendLink(link_key(prefill, decode), listen(door.store.port, HOST, endpoint), pool, events, Credits())
    say = None

    def sending(message: Any) -> None:
        say(message)
        doing.put("sending")
        time.sleep(0.2)  # the queue's own thread has said so by now
        os.kill(os.getpid(), signal.SIGSTOP)

    uid = events.get(timeout=SOON).request.uid
    say, link.pipe.send = link.pipe.send, sending
    link.put(Join(uid))
    link.put(SendPages(uid, [1, 2], [1, 2]))
    time.sleep(2 * SOON)


@pytest.mark.parametrize("dies", (True, False), ids=("killed", "only frozen"))
@pytest.mark.parametrize("library", ONE_SIDED)
def test_rooms_end_in_bounded_time_when_prefill_dies_amid_a_read(
    library: str, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read from a frozen peer has its buffer, or the room's pages, until that goes on. Nobody waits for it."""
    needs(library)
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    decode = Member("d", HOST)
    doing = fork_server.Queue()
    process = fork_server.Process(
        target=prefill_that_stops, args=(library, Member("p", HOST), decode, doing), daemon=True
    )
    process.start()
    prefill = doing.get(timeout=60)
    pool, events, mine = torch.full(HUGE, CANARY), queue.SimpleQueue(), Credits()
    endpoint, stopped = Handoff(library).make_endpoint(HOST, pool), threading.Event()
    connect = endpoint.connect

    def connect_and_hold(store: Any, me: int) -> Any:
        transport = connect(store, me)
        recv = transport.recv
        transport.recv = lambda *what: stopped.wait(SOON) and recv(*what)
        return transport

    endpoint.connect = connect_and_hold
    link = ReceiveLink(link_key(prefill, decode), dial(prefill, decode, endpoint), pool, events, mine)
    link.put(Join(1, Open(Request(1, [1]), [1, 2], [decode]), pages=[1, 2]))
    link.put(Join(2))
    assert doing.get(timeout=SOON) == "sending"
    status = Path(f"/proc/{process.pid}/status")
    assert eventually(lambda: "T (stopped)" in status.read_text())
    stopped.set()
    time.sleep(0.5)
    assert events.empty() and link.in_flight == 1, "the peer is stopped: nothing can have come"
    began = time.monotonic()
    if dies:
        process.kill()
    else:
        link.stop()  # as when the router says that it is gone
    told: list[RoomFailed | RoomEnded] = [events.get(timeout=SOON) for _ in range(2)]
    assert {room.uid for room in told} == {1, 2} and all("link p/d" in (room.error or "") for room in told)
    assert time.monotonic() - began < 5
    in_place = library == "nixl"
    others = [0] if in_place else [0, 1, 2]
    if not dies:
        only_failed = [room.uid for room in told if isinstance(room, RoomFailed)]
        assert only_failed == ([1] if in_place else []) and events.empty()
        assert len(mine.free) == IN_FLIGHT - 1, "the library may still write"
        pool[:, others] = 8.5  # another room's
        os.kill(process.pid, signal.SIGCONT)
    assert eventually(lambda: len(mine.free) == IN_FLIGHT), "the read ended, and its credit did not come back"
    if any(isinstance(room, RoomFailed) for room in told):
        assert isinstance(ended := events.get(timeout=SOON), RoomEnded) and ended.uid == 1
    assert (pool[:, others] == (CANARY if dies else 8.5)).all()
    if in_place and not dies:
        assert (pool[:, [1, 2]] == 5).all(), "it was no late write"
    process.kill()
    process.join(SOON)
    link.join(SOON)
    assert not link.is_alive()


def decode_that_dies(library: str, prefill: Member, decode: Member, doing: Any) -> None:
    """A peer process that asks for KV, hears of it, and never reads it."""
    endpoint = Handoff(library).make_endpoint(HOST, torch.empty(2, 4, 64, 24))
    pipe, _ = dial(prefill, decode, endpoint)(link_key(prefill, decode))
    pipe.send(Open(Request(1, [1]), [1, 2], [decode]))
    doing.put([type(message).__name__ for message in pipe.poll(SOON * 1000)])
    time.sleep(2 * SOON)


@pytest.mark.parametrize("library", ONE_SIDED)
def test_rooms_end_when_decode_dies_before_it_has_read(library: str) -> None:
    needs(library)
    door, decode = Door(HOST), Member("d", HOST)
    prefill, doing = Member("p", HOST, door.port, door.store.port), fork_server.Queue()
    process = fork_server.Process(target=decode_that_dies, args=(library, prefill, decode, doing), daemon=True)
    process.start()
    assert door.poll(60_000)
    pool, events, mine = torch.randn(2, 4, 64, 24), queue.SimpleQueue(), Credits()
    endpoint = Handoff(library).make_endpoint(HOST, pool)
    link = SendLink(link_key(prefill, decode), listen(door.store.port, HOST, endpoint), pool, events, mine)
    assert events.get(timeout=SOON).request.uid == 1
    for command in (Join(1), SendPages(1, [1, 2], [1, 2]), SendLast(1, 7, [])):
        link.put(command)
    assert doing.get(timeout=SOON) == ["Sending"], "the first token must wait until the pages have been read"
    time.sleep(0.3)
    assert events.empty() and len(mine.free) == IN_FLIGHT - 1
    process.kill()
    ended = events.get(timeout=5)
    assert ended.uid == 1 and "the other end has gone" in ended.error
    assert eventually(lambda: len(mine.free) == IN_FLIGHT)
    link.join(SOON)
    process.join(SOON)


def test_nixl_meets_a_peer_anew_after_a_failure_and_not_before() -> None:
    """Both processes live on, so the next link between them must not use the connection that failed."""
    needs("nixl")
    source, target = (torch.empty(2, 4, 64, 24) for _ in range(2))
    prefill, decode = (Handoff("nixl").make_endpoint(HOST, pool) for pool in (source, target))
    agent, met = decode.agent, []
    add = agent.add_remote_agent
    agent.add_remote_agent = lambda metadata: met.append(metadata) or add(metadata)
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)

    def read(generation: int, where: int = 0) -> None:
        ends = [end.connect(PrefixStore(str(generation), store), me) for me, end in enumerate((prefill, decode))]
        source.fill_(generation)
        _, location = ends[0].send(source, [3, 1])
        try:
            ends[1].recv(target, WHERE.pack(where, 0, 0) + PAGES.pack(0, 2) if where else location, [0, 2]).wait()
            assert (target[:, [0, 2]] == generation).all()
        finally:
            for end in ends:
                end.abort()

    read(1)
    read(2)
    assert len(met) == 1, "closing a connection of NIXL's leaves a file open"
    with pytest.raises(RuntimeError, match="NIXL"):
        read(3, where=4096)  # no memory of the peer
    read(4)
    assert len(met) == 2


# ---- libraries that cannot serve


@pytest.mark.parametrize(
    "library, module, said",
    [("nixl", "nixl_cu13", "nixl-cu13"), ("mooncake", "mooncake.engine", "mooncake-transfer-engine-non-cuda")],
)
def test_a_library_that_is_missing_is_one_line_that_names_its_package(
    library: str, module: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as refused:
        Handoff(library).check(CPU)
    text = str(refused.value)
    assert text.startswith(f"--transport {library} needs the package {said} (scripts/setup {library})")
    assert "\n" not in text


def test_mooncake_serves_no_gpu_and_no_ipv6() -> None:
    with pytest.raises(ValueError, match="--transport mooncake is for CPUs"):
        Handoff("mooncake").check(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="needs an IPv4 address, not ::1"):
        Handoff("mooncake").make_endpoint("::1", torch.empty(2, 4, 64, 24))


def test_the_registered_memory_is_what_the_memory_table_counts() -> None:
    """With NIXL, that is so on a GPU. In host memory it registers the pool."""
    needs("mooncake")
    staging = Handoff("mooncake").make_endpoint(HOST, torch.empty(2, 3, 2**23, dtype=torch.uint8)).staging
    assert staging.memory.nbytes == credits.buffer_bytes(2**24)
    buffers = [staging.buffer(credit, (3, 5), torch.float32) for credit in range(IN_FLIGHT)]
    for value, buffer in enumerate(buffers):
        buffer.fill_(value)
    assert [buffer.unique().tolist() for buffer in buffers] == [[value] for value in range(IN_FLIGHT)]
