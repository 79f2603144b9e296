"""The KV handoff: rooms (one request's place in it) and links (one prefill rank paired with one decode rank).

    router --Submit--> decode --Open(request, pages)--> prefill        decode allocates BEFORE prefill computes
                       decode <--Sending(pages), bytes-- prefill       for each chunk, while prefill computes the next
                       decode <--Last(first token)------ prefill       the room is done: the request joins the batch

Bytes go over the link's transport, messages over its pipe, in one order. Every send is announced by `Sending`, so
decode never posts a receive that nobody will match. On each link a room ends exactly once, with `Last` or `Closed` and
after the bytes before it (or with the link itself); only when it has ended on every link may its pages be freed,
because until then a transfer may still write them. An abort therefore only ASKS (`Cancel`) and waits for `Closed`.

With attention TP on either side, decode rank j is linked to prefill rank j % t: KV is the same on all ranks of a
replica, so each decode rank takes a copy from one of them.
"""

from enum import IntEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from disagg.control.messages import Count, Member, TokenId
from disagg.request import Request

Page = Annotated[int, Meta(ge=1)]  # page 0 belongs to nobody


class RoomState(IntEnum):
    FAILED = 0
    BOOTSTRAPPING = 1  # waiting for pages on the decode side
    WAITING = 2  # both sides know of it
    TRANSFERRING = 3
    DONE = 4


class Room:
    """A state that only rises, or fails; and a count of the link ends that may still touch the pages."""

    def __init__(self, links: int):
        self.state = RoomState.BOOTSTRAPPING
        self.open_links = links
        self.error: str | None = None

    def rise(self, state: RoomState) -> None:
        assert state > RoomState.FAILED, "use fail()"
        if self.state != RoomState.FAILED:
            assert state >= self.state, f"a room only rises: {self.state.name} -> {state.name}"
            self.state = state

    def fail(self, error: str) -> None:
        assert self.state != RoomState.DONE, "a room that is done cannot fail"
        if self.state != RoomState.FAILED:
            self.state, self.error = RoomState.FAILED, error

    def end_link(self, error: str | None) -> None:
        """One link has ended this room. The last one to end it well makes it done."""
        assert self.open_links > 0, "a link ended a room twice"
        self.open_links -= 1
        if error is not None:
            self.fail(error)
        elif self.open_links == 0:
            self.rise(RoomState.DONE)

    @property
    def may_release(self) -> bool:
        return self.open_links == 0


# What passes over a link's pipe.


class Knock(msgspec.Struct, frozen=True, tag=True):
    """decode -> the prefill rank's door: make a link with me."""

    decode: Member
    generation: Count  # 0, 1, ... each time the one before went down


class Open(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill: compute this prompt; its KV goes to these pages, on all these decode ranks."""

    request: Request
    pages: list[Page]
    decode: Annotated[list[Member], Meta(min_length=1)]
    generation: Count = 0  # of the links to them


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill: send nothing more for this room, and say when that is so."""

    uid: int


class Sending(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: the next bytes on the transport are these pages of yours, of these rooms."""

    uids: Annotated[list[int], Meta(min_length=1)]
    pages: Annotated[list[Page], Meta(min_length=1)]


class Last(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: that was all; this is the first token."""

    uid: int
    token: TokenId
    logprobs: list[tuple[int, float]]
    prefill: float = 0.0  # seconds from its first step to this token
    waited: float = 0.0  # seconds from then until this was said, behind the last Sending


class Closed(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: nothing more will come for this room."""

    uid: int
    error: str


# What the rank's loop tells a link's thread, and what it hears back.


class Join(msgspec.Struct, frozen=True):
    """This rank knows the room now; `opening` is what to tell the peer of it, if it is for this link to tell."""

    uid: int
    opening: Open | None = None


class SendPages(msgspec.Struct, frozen=True):
    """Copy pages of my pool to pages of the peer's. `ready`: the CUDA event after which mine are written."""

    uid: int
    mine: list[int]
    theirs: list[int]
    ready: Any = None


class SendLast(msgspec.Struct, frozen=True):
    """All pages have been put: tell the peer the first token, after them."""

    uid: int
    token: int
    logprobs: list[tuple[int, float]]
    prefill: float = 0.0  # as in Last
    sampled: float = 0.0  # when the token was known, of time.perf_counter


class RoomEnded(msgspec.Struct, frozen=True):
    """This link will not touch the room's pages any more. Exactly once for each joined room on each link."""

    uid: int
    error: str | None = None
    token: int = -1
    logprobs: list[tuple[int, float]] = []
    link_down: bool = False  # it was not the room's own fault
    prefill: float = 0.0  # as in Last
    transfer: float = 0.0  # seconds from the token until all was there
    at: float = 0.0  # when all was there, of time.perf_counter
