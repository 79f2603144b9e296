"""Requests aborted while their KV is on its way: real engines, roles and links in two processes, over each transport.

Rank 0 has the router and a prefill job, rank 1 a decode job. Prompts take several chunks, and a transfer holds one
page. Decode's wire is slow: each transfer takes up to SLOW_S more. The router aborts a request when its room is where
the request's plan says. What counts is where the room was when the Cancel reached prefill's link. Decode's pages are
painted when they become free, so that a late write into them is seen. Idle ones keep their KV for the prefix cache. The
requests that are not aborted must have the tokens of one process.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from msgspec import structs
from tokenizers import Tokenizer
from torch import Tensor

from disagg import loop
from disagg.config import EngineConfig
from disagg.control.messages import RoleName
from disagg.control.ports import RouterPort
from disagg.decode import Decode
from disagg.engine import Engine
from disagg.front.answer import Answer
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.front.tokenizer import load_tokenizer
from disagg.handoff import credits
from disagg.handoff.credits import IN_FLIGHT
from disagg.handoff.endpoints import Handoff
from disagg.handoff.protocol import Cancel, RoomState
from disagg.handoff.send_link import SendLink
from disagg.handoff.transport import Endpoint, Transfer
from disagg.interrupt import Interrupt
from disagg.prefill import Prefill
from disagg.request import Request
from disagg.role import Role
from kernels.ops import Ops
from model.config import ModelConfig
from model.footprint import page_bytes
from model.pages import PageAllocator
from parallel.mesh import Mesh
from tests.conftest import eventually
from tests.test_worlds import one_run
from tests.worlds import run_world, sub_mesh

HOST = "127.0.0.1"
NAMES: tuple[RoleName, ...] = ("prefill", "decode")  # by rank
PAINT = 12345.0
SLOW_S = 0.005
STAYS = 0.15  # the share of requests that are not aborted
ALONE = 0.7  # the share of requests that find nothing in the prefix cache
SETTINGS = EngineConfig(max_batch=8, max_tokens_per_step=96, kv_tokens=4096, max_model_len=1024)
PLANS = ("submitted", "waiting", "decoding", *["transferring"] * 6, *["a transfer is under way"] * 3)
SOON = 30


def prompts(vocab_size: int) -> list[UserRequest]:
    """Prompts of three to nine pages, greedy and sampled."""
    rng = random.Random(3)
    made = []
    for i in range(12):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(150, 560))]
        sampling = {"temperature": 0.9, "seed": i} if i % 2 else {}
        made.append(UserRequest(i, Request(0, prompt, 6, ignore_eos=True, **sampling), []))
    return made


class Painted(PageAllocator):
    """Hands out the pages that have been free for the longest. Counts those that were written while they were free."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__(pool.shape[1])
        self._pool, self.written = pool, 0
        pool.fill_(PAINT)

    def alloc(self, count: int) -> list[int] | None:
        if count > self.num_free:
            return None
        pages, self._free = self._free[:count], self._free[count:]
        self._owned.update(pages)
        self._check(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        super().free(pages)
        self._pool[:, pages] = PAINT

    def _check(self, pages: list[int]) -> None:
        self.written += sum(bool((self._pool[:, page] != PAINT).any()) for page in pages)

    def end(self) -> int:
        """Return how many pages were written while they were free. All must be free."""
        self._check(self._free)
        self._pool[:, self._free] = PAINT
        written, self.written = self.written, 0
        return written


class Aborter:
    """A source of requests, and a client of each, until `count` of them have been aborted."""

    def __init__(
        self, kinds: list[UserRequest], expected: list[tuple], count: int, seed: int, roles: dict[str, Role]
    ) -> None:
        """`expected`: (tokens, finish reason, error) of each kind. `roles`: this process's."""
        self.kinds, self.expected, self.count, self.rng = kinds, expected, count, random.Random(seed)
        self.aborted, self.right, self.wrong = 0, 0, list[str]()
        self.roles = roles
        self.router: Router

    @property
    def exhausted(self) -> bool:
        return self.aborted >= self.count

    def take(self, most: int) -> list[tuple[UserRequest, "Patient"]]:
        if self.exhausted or self.router.num_waiting > 8:
            return []
        kind = self.rng.randrange(len(self.kinds))
        plan = None if self.rng.random() < STAYS else self.rng.choice(PLANS)
        user = self.kinds[kind]
        if self.rng.random() < ALONE:
            request = structs.replace(user.request, cache_salt=str(self.rng.random()))
            user = structs.replace(user, request=request)
        return [(user, Patient(self, kind, plan))]

    def look(self) -> bool:
        """Abort the requests whose time has come. The router's thread calls it in every turn; False: go on."""
        for tracked in list(self.router.tracked):
            patient = tracked.client
            assert isinstance(patient, Patient)
            if patient.plan is not None and not self.exhausted and patient.plan in self._states(tracked.uid, patient):
                self.router.cancel(tracked)
                self.aborted += 1
        return False

    def _states(self, uid: int, patient: "Patient") -> set[str]:
        prefill = self.roles.get("prefill")
        departure = prefill.outgoing.get(uid) if isinstance(prefill, Prefill) else None
        states = {"submitted"}
        if patient.tokens:
            states.add("decoding")
        if departure is not None:
            states.add(departure.room.state.name.lower())
            if departure.room.state == RoomState.TRANSFERRING and any(link.in_flight for link in departure.links):
                states.add("a transfer is under way")
        return states


class Patient:
    """The client of one request, which aborts it when its room is where `plan` says, unless it is over by then."""

    def __init__(self, aborter: Aborter, kind: int, plan: str | None) -> None:
        self.aborter, self.kind, self.plan, self.tokens = aborter, kind, plan, 0

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        self.tokens += len(tokens)

    def deliver(self, answer: Answer) -> None:
        got = answer.token_ids, answer.finish_reason, answer.error
        if got == self.aborter.expected[self.kind]:
            self.aborter.right += 1
        else:
            self.aborter.wrong.append(f"{got}, not {self.aborter.expected[self.kind]}")


def keep_roles(roles: dict[str, Role]) -> None:
    """Have the loop put the role that it makes into `roles`."""
    make = loop.make_role

    def making(name: Any, *args: Any) -> Any:
        role, members = make(name, *args)
        roles[name] = role
        return role, members

    loop.make_role = making


def note_cancels(roles: dict[str, Role], found: Counter[str]) -> None:
    """Have prefill's links count where a room is when a Cancel comes, and whether a transfer is under way."""
    handle = SendLink.handle

    def handling(link: SendLink, item: Any) -> None:
        if isinstance(item, Cancel):
            prefill = roles["prefill"]
            assert isinstance(prefill, Prefill)
            departure = prefill.outgoing.get(item.uid)
            state = "too late" if departure is None else departure.room.state.name.lower()
            found[f"{state}, a transfer under way" if link.in_flight else state] += 1
        handle(link, item)

    SendLink.handle = handling


class Slow:
    """A read that begins up to SLOW_S later, and so writes late."""

    def __init__(self, read: Callable[[], Transfer], seconds: float) -> None:
        self.nbytes, self.began, self._read, self._seconds = 0, time.perf_counter(), read, seconds

    def wait(self) -> None:
        time.sleep(self._seconds)
        transfer = self._read()
        transfer.wait()
        self.nbytes = transfer.nbytes


def slow_down(rng: random.Random) -> None:
    """Let every transfer that decode receives take up to SLOW_S more."""
    make = Handoff.make_endpoint

    def making(handoff: Handoff, *args: Any) -> Endpoint:
        endpoint = make(handoff, *args)
        connect = endpoint.connect

        def connecting(*args: Any) -> Any:
            transport = connect(*args)
            recv = transport.recv

            def receiving(*args: Any) -> Any:
                if transport.in_place:
                    return Slow(lambda: recv(*args), SLOW_S * rng.random())
                transfer = recv(*args)
                wait = transfer.wait
                transfer.wait = lambda: (time.sleep(SLOW_S * rng.random()), wait())[1]
                return transfer

            transport.recv = receiving
            return transport

        endpoint.connect = connecting
        return endpoint

    Handoff.make_endpoint = making


@dataclass
class Side:
    """This rank's part of the deployment, over one transport after another. Everything in it is collective."""

    rank: int
    engine: Engine
    mesh: Mesh
    tokenizer: Tokenizer
    expected: list[tuple]  # of each prompt, on rank 0
    painted: Painted | None  # decode's pages
    roles: dict[str, Role] = field(default_factory=dict)
    cancels: Counter[str] = field(default_factory=Counter)

    def storm(self, library: str, count: int, seed: int) -> dict[str, Any]:
        """Abort so many requests, and return what was counted, on rank 0."""
        began, port = time.monotonic(), [0]
        vocab_size = self.tokenizer.get_vocab_size()
        aborter = Aborter(prompts(vocab_size), self.expected, count, seed, self.roles)
        thread = threading.Thread(target=lambda: aborter.router.run(aborter), daemon=True)
        self.cancels.clear()
        if self.rank == 0:
            where = RouterPort(HOST, 0)
            aborter.router, port = Router(where, self.tokenizer, vocab_size, aborter.look), [where.port]
            thread.start()
        dist.broadcast_object_list(port)
        self._serve(library, port[0])
        corrupt = [0, 0]
        dist.all_gather_object(corrupt, self._corrupt(library))
        if self.rank:
            return {}
        thread.join(SOON)
        assert not thread.is_alive(), f"{library}: the router hangs"
        aborter.router.port.close()
        assert not aborter.wrong, f"{library}: {aborter.wrong[:3]}"
        counted = {"aborted": aborter.aborted, "right": aborter.right, "corrupt": sum(corrupt)}
        return counted | {"rooms": dict(self.cancels), "seconds": round(time.monotonic() - began, 1)}

    def _serve(self, library: str, port: int) -> None:
        handoff = Handoff(library, checksums=True)
        assert loop.serve(NAMES[self.rank], self.engine, self.mesh, (HOST, port), Interrupt(), handoff=handoff) is None
        scheduler = self.engine.scheduler
        free = scheduler.cache.num_free == scheduler.cache.capacity
        assert free and not scheduler.has_work, f"{library}: a page leaked"

    def _corrupt(self, library: str) -> int:
        role = self.roles[NAMES[self.rank]]
        assert isinstance(role, Prefill | Decode)
        links = role.links
        assert eventually(lambda: len(links.credits.free) == IN_FLIGHT, SOON), f"{library}: a credit leaked"
        return int(links.stats()["transfer_mismatches"]) + (self.painted.end() if self.painted is not None else 0)


def _body(rank: int, folder: Path, libraries: list[str], count: int, seed: int, out: Path) -> None:
    config, tokenizer = ModelConfig.from_pretrained(folder), load_tokenizer(folder).tokenizer
    credits.MOST_BYTES = page_bytes(config, 4)
    meshes = [sub_mesh(0, 1), sub_mesh(1, 1)]
    mesh = meshes[rank]
    assert mesh is not None
    engine = Engine.from_pretrained(SETTINGS, config, folder, mesh, Ops())
    alone = [("unified", engine if rank == 0 else None, meshes[0])]
    expected, painted = one_run(alone, folder, Interrupt(), prompts), None
    if NAMES[rank] == "decode":
        painted = engine.scheduler.cache.allocator = Painted(engine.pool)
    side = Side(rank, engine, mesh, tokenizer, expected, painted)
    keep_roles(side.roles)
    note_cancels(side.roles, side.cancels)
    slow_down(random.Random(seed))
    figures = {library: side.storm(library, count, seed) for library in libraries}
    if rank == 0:
        out.write_text(json.dumps(figures))


def abort_storm(
    folder: Path, model: Path, libraries: list[str], count: int, seed: int, limit_s: float = 240
) -> dict[str, dict[str, Any]]:
    """Abort `count` requests over each library. Returns what was counted, by library.

    `corrupt`: transfers that did not have their checksum, and pages that were written while they were free.

    Raises AssertionError if an answer is wrong, a page or a credit is lost, or anything hangs.
    """
    out = folder / "aborts.json"
    run_world(2, _body, model, libraries, count, seed, out, timeout_s=limit_s)
    return json.loads(out.read_text())
