"""Small typed messages between the router and the ranks. `ports.py` carries them; msgspec encodes and checks them.

router  <-- Port (ROUTER) ... DEALER -->  the first rank of each attention replica
router  <-- Port (ROUTER) ... DEALER ---  the beacon of every rank
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from disagg.request import Request

Name = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class Member(msgspec.Struct, frozen=True):
    """How to reach one rank. A fresh `id` for each process: a restarted one is somebody else."""

    id: Name
    host: Name
    door: Count = 0  # port of a prefill rank's door
    store: Count = 0  # port of the TCPStore where its links meet
    rank: Count = 0  # in its job
    pid: Count = 0


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router: I am here. `members` are its ranks, the sender first."""

    role: Literal["unified", "prefill", "decode"]
    members: Annotated[list[Member], Meta(min_length=1, max_length=4096)]
    max_batch: Annotated[int, Meta(ge=1)]
    step_tokens: Annotated[int, Meta(ge=1)]  # the most that one of its steps computes
    kv_tokens: Annotated[int, Meta(ge=1)]
    kv: Annotated[
        dict[Name, Name], Meta(max_length=16)
    ]  # what is handed over: replicas that differ in it cannot serve together
    job: Name  # the same for all replicas of a job, which cannot outlive one another
    replicas: Annotated[int, Meta(ge=1)] = 1  # of the job


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A rank's beacon to the router, every second: I live, and my loop has come to this turn."""

    id: Name  # the member's
    turn: Count
    waits: bool  # for the other ranks of its job, in a collective


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The router: this is our session. A worker that was in another one drops what it held for that."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """The router to a decode (or unified) replica: serve this, with the prefill done over there."""

    request: Request
    prefill: Annotated[list[Member], Meta(min_length=1)] | None


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """The router: give back those of these requests that have not begun."""

    uids: list[int]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The router: nobody wants this any more."""

    uid: int


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The router: these processes have died, or do not answer."""

    ids: list[Name]


class Back(msgspec.Struct, frozen=True, tag=True):
    """The router: these processes, which were said to be gone, answer again."""

    ids: list[Name]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The router: no more requests will come, or you are not wanted; stop."""

    error: str | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The router: nothing, but sending it finds out whether you are still connected."""


class Forget(msgspec.Struct, frozen=True):
    """A worker's port to its own loop: the session is over, so nobody wants what it held. It never travels."""


class Parts(msgspec.Struct, frozen=True):
    """Where the time to a handed-over request's first token went, in seconds."""

    queue: float  # until its first prefill step: for pages, for that step, and on the way there
    prefill: float  # until its first token
    transfer: float  # from there until its KV had arrived: what was not hidden behind the prefill
    join: float  # until the decode side took it up, between two of its steps


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """News of many requests: one more token each, and that is all."""

    by_uid: dict[int, TokenId]


class Update(msgspec.Struct, frozen=True, tag=True):
    """News of one request."""

    uid: int
    tokens: list[TokenId] = []
    logprobs: list[list[tuple[int, float]]] = []
    finish: Literal["stop", "length"] | None = None
    error: str | None = None
    retry: bool = False  # another prefill rank may do better
    parts: Parts | None = None  # with the first token, where it was handed over


class Updates(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router: all news of one step in one message."""

    updates: list[Update | Tokens] = []
    begun: list[int] = []  # requests that have their pages, and whose prompts were asked for
    returned: list[int] = []  # requests that were withdrawn before they began


def singly(updates: Iterable[Update | Tokens]) -> Iterator[Update]:
    """News of one request at a time, in order."""
    for one in updates:
        if isinstance(one, Tokens):
            yield from (Update(uid, [token]) for uid, token in one.by_uid.items())
        else:
            yield one


class Bye(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router, last of all: what it did."""

    stats: dict[str, float]


ToWorker = Welcome | Submit | Withdraw | Abort | Gone | Back | Finish | Ping
ToRouter = Hello | Beat | Updates | Bye

encode = msgspec.msgpack.encode


class Decoder:
    """Bytes to one of the messages of `kind`. ValueError for anything else, whatever it is."""

    def __init__(self, kind: Any):
        self._decoder = msgspec.msgpack.Decoder(kind)

    def __call__(self, body: bytes) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(f"not a message: {error}") from None
