"""Small typed messages between the router and the ranks. `ports.py` sends them; msgspec encodes and validates them.

router  <-- Port (ROUTER) ... DEALER -->  the first rank of each attention replica
router  <-- Port (ROUTER) ... DEALER ---  the beacon of every rank
"""

from collections.abc import Iterator
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from disagg.page_digest import DIGEST
from disagg.request import FinishReason, Request

T = TypeVar("T")

RoleName = Literal["unified", "prefill", "decode"]
Name = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=0, lt=2**53)]  # exact as a float, too
MOST_STATS = 4096  # per message; one is a layer's balancedness
Statistics = Annotated[dict[Name, float], Meta(max_length=MOST_STATS)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
# Chosen experts and prompts' log probabilities travel in pieces: those of a long prompt are over `ports.MOST_BYTES`.
PIECE = 2**20  # bytes
PIECES = 8  # per message to the router
MOST_LEFT = 256  # prompts that one report names
Piece = Annotated[bytes, Meta(max_length=PIECE)]
MOST_KEPT = 2**18  # cached pages of a replica that the router knows, each about 100 bytes there
MOST_DIGESTS = 2**13  # per message
Digests = Annotated[bytes, Meta(max_length=MOST_DIGESTS * DIGEST)]  # of `page_digest.py`, one after another


class Member(msgspec.Struct, frozen=True):
    """How to reach one rank. Each process has a fresh `id`, so a restarted rank is a new member."""

    id: Name
    host: Name
    door: Count = 0  # port of a prefill rank's door
    store: Count = 0  # port of the TCPStore where its links meet
    rank: Count = 0  # within its job
    pid: Count = 0


Members = Annotated[list[Member], Meta(min_length=1, max_length=4096)]  # the ranks of one replica


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router: I am ready. `members` are its ranks, the sender first."""

    role: RoleName
    members: Members
    max_batch: Annotated[int, Meta(ge=1)]
    step_tokens: Annotated[int, Meta(ge=1)]  # the most tokens that one step computes
    kv_tokens: Annotated[int, Meta(ge=1)]
    kv: Annotated[dict[Name, Name], Meta(max_length=16)]  # the KV layout; replicas that serve together have the same
    job: Name  # the same for all replicas of a job; if one of them dies, the job ends
    replicas: Annotated[int, Meta(ge=1)] = 1  # of the job
    about: Annotated[dict[Name, Name], Meta(max_length=16)] = {}  # how it runs, in words, for the metrics
    caches: bool = False  # does it keep the KV of what it has served?
    drafts: Count = 0  # per step and request (--speculate)


class Load(msgspec.Struct, frozen=True):
    """The load of a replica. The tokens of a launched step count as computed."""

    queued_tokens: Size  # of prompts, not computed yet
    kv_pages: Size  # that requests hold
    running: Size  # requests in the batch
    waiting: Size  # other requests
    tokens_left: Annotated[dict[int, Size], Meta(max_length=MOST_LEFT)] = {}  # by uid, of begun prompts
    unwanted_pages: Size = 0  # part of `kv_pages`: of aborted or failed requests; a transfer may still write them


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A rank's beacon to the router, every second: I am alive, and my loop is in this turn."""

    id: Name  # the member's
    turn: Count
    waits: bool  # in a collective, for other ranks of its job
    load: Load | None = None  # of a replica, from its first rank
    draining: bool = False  # the rank got SIGTERM: its job wants no new requests, and Finish once it is idle


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The router: this is our session. A worker drops everything that belongs to an earlier session."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """The router to a decode or unified replica: serve this request. `prefill`: the replica that computes the prompt.

    `prefill` is None for a unified replica, which computes it itself.
    """

    request: Request
    prefill: Members | None


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """The router: return those of these requests that have not begun."""

    uids: list[int]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The router: stop this request, its answer is no longer needed."""

    uid: int


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The router: these processes have died, or do not answer."""

    ids: list[Name]


class Back(msgspec.Struct, frozen=True, tag=True):
    """The router: these processes, earlier reported as Gone, answer again."""

    ids: list[Name]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The router: stop. No more requests will come or, with an `error`, this replica cannot take part."""

    error: str | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The router: no content. Sending it shows whether the worker is still connected."""


class Forget(msgspec.Struct, frozen=True, tag=True):
    """A worker's port to its own loop: the session has ended, so drop its requests. No router can send it."""


class Parts(msgspec.Struct, frozen=True):
    """The parts of a handed-over request's time to first token, in seconds, in order."""

    queue: float  # until its first prefill step: waiting for pages and for that step, and network time
    prefill: float  # until its first token
    transfer: float  # until all its KV has arrived: the part that the prefill did not hide
    join: float  # until the decode side takes it up, between two steps


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """News of many requests: one more token each, and nothing else."""

    by_uid: dict[int, TokenId]


class Update(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """News of one request."""

    uid: int
    tokens: list[TokenId] = []
    logprobs: list[list[tuple[int, float]]] = []
    finish: FinishReason | None = None
    error: str | None = None
    retry: bool = False  # another prefill rank may succeed
    link_down: bool = False  # a link to its prefill replica has failed
    parts: Parts | None = None  # with the first token of a handed-over request
    experts: Piece = b""  # more of the sequence's chosen experts; those of the tokens before a token come before it
    cached_tokens: Count = 0  # with the first token: of the prompt, those that were not computed
    accepted: Count = 0  # of `tokens`: those beyond the one that every step gives, because drafts were right
    verified: Count = 0  # drafts that steps have verified for it since its last Update
    prompt_rows: Piece = b""  # more rows of the prompt's log probabilities; all of them come before the first token


class Updates(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router: all news of one step in one message."""

    updates: list[Update | Tokens] = []
    begun: list[int] = []  # requests that have their pages, and whose prompts were requested from prefill
    returned: list[int] = []  # to be sent again: withdrawn before they began, or they awaited a room that failed


def in_pieces(data: bytes) -> Iterator[bytes]:
    """Cut chosen experts, or rows of log probabilities, into pieces that a message may carry."""
    return (data[at : at + PIECE] for at in range(0, len(data), PIECE))


def in_messages(news: Updates) -> Iterator[Updates]:
    """Yield the news, in order, in messages with at most PIECES updates that have a piece. There is always one."""
    begin = count = 0
    begun, returned = news.begun, news.returned
    for i, update in enumerate(news.updates):
        if isinstance(update, Update) and (update.experts or update.prompt_rows):
            if count == PIECES:
                yield Updates(news.updates[begin:i], begun, returned)
                begin, count, begun, returned = i, 0, [], []
            count += 1
    yield Updates(news.updates[begin:], begun, returned) if begin else news


class Stats(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router, every few seconds: its statistics so far. The router keeps the latest."""

    stats: Statistics


class Kept(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A replica to the router, every second: how the pages in its cache have changed since it said so last."""

    got: Digests = b""
    lost: Digests = b""
    anew: bool = False  # what it said before holds no more


class Bye(msgspec.Struct, frozen=True, tag=True):
    """A replica to the router, as its last message: its statistics."""

    stats: Statistics


ToWorker = Welcome | Submit | Withdraw | Abort | Gone | Back | Finish | Ping
ToRouter = Hello | Beat | Updates | Stats | Kept | Bye

encode = msgspec.msgpack.encode


class Decoder(Generic[T]):
    """Decodes bytes to a message of the types T. Raises ValueError for all other input."""

    def __init__(self, kind: Any) -> None:
        """`kind`: T as a value, which may be a union. (Python 3.11 has no annotation for that.)"""
        self._decoder = msgspec.msgpack.Decoder(kind)

    def __call__(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(f"not a message: {error}") from None
