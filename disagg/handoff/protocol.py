"""The KV handoff: rooms (the state of one request's handoff) and links (a prefill rank paired with a decode rank).

    router --Submit--> decode --Open(request, pages)--> prefill        decode reserves BEFORE prefill computes
                       decode <--Sending(pages), bytes-- prefill       for each chunk, while prefill computes the next
                       decode <--Last(first token)------ prefill       the room is done: the request joins the batch

Bytes go over the link's transport and messages over its pipe, in the same order. Every send is announced by `Sending`,
so decode never posts a receive without a matching send. On each link a room ends exactly once: with `Last` or `Closed`,
after all bytes sent before, or with the link itself. Its pages may be freed only when it has ended on every link,
because until then a transfer may still write them. An abort therefore only ASKS (`Cancel`) and waits for `Closed`.
A link that goes down while a room's pages are written says so at once (`RoomFailed`), and ends the room after that.

With attention TP on either side, decode rank j is linked to prefill rank j % t. KV is the same on all ranks of a
replica, so each decode rank takes a copy from one of them.
"""

from enum import IntEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from disagg.control.messages import Count, Member, Members, Piece, TokenId
from disagg.request import MOST_DRAFTS, Request

Page = Annotated[int, Meta(ge=1)]  # page 0 is the null page
Drafts = Annotated[list[TokenId], Meta(max_length=MOST_DRAFTS)]  # of the tokens after the first one (--speculate)


class RoomState(IntEnum):
    FAILED = 0
    BOOTSTRAPPING = 1  # waiting for pages on the decode side
    WAITING = 2  # open on both sides
    TRANSFERRING = 3
    DONE = 4


class Room:
    """A state that only rises or fails, and the number of links that may still touch the pages."""

    def __init__(self, links: int) -> None:
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
        """Record that one link has ended this room. The room is done when all links have ended it without an error."""
        assert self.open_links > 0, "a link ended a room twice"
        self.open_links -= 1
        if error is not None:
            self.fail(error)
        elif self.open_links == 0:
            self.rise(RoomState.DONE)

    @property
    def may_release(self) -> bool:
        return self.open_links == 0


# Messages over a link's pipe, and the knock that comes before.


class Knock(msgspec.Struct, frozen=True, tag=True):
    """decode -> the prefill rank's door: make a link with me."""

    decode: Member
    generation: Count  # counts the links between these two ranks: each replaces one that went down


class Open(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill: compute this prompt, and send its KV to these pages on all these decode ranks.

    The first `have` pages came from decode's prefix cache. They are not sent, because other requests read them.
    """

    request: Request
    pages: list[Page]
    decode: Members
    generation: Count = 0  # of the links to them
    have: Count = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a member that is named twice: its link would end the room only once."""
        if len({member.id for member in self.decode}) < len(self.decode):
            raise ValueError("a decode rank is named twice")


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill: stop sending for this room, and confirm it with `Closed`."""

    uid: int


class Sending(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: the next tensor on the transport goes to these pages of your pool, for these rooms."""

    uids: Annotated[list[int], Meta(min_length=1)]
    pages: Annotated[list[Page], Meta(min_length=1)]
    location: bytes = b""  # where to read it from, if the transport is one-sided
    checksum: Annotated[int, Meta(ge=0, lt=2**32)] | None = None  # of its bytes, with --kv-checksum


class Read(msgspec.Struct, frozen=True, tag=True):
    """decode -> prefill, if the transport is one-sided: the oldest tensor that you announced has been read.

    It is also the mover's word to its link.
    """


class Chosen(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode's first rank: the chosen experts of the next prompt tokens, if the request asks for them.

    In order, and before `Last`. From the loop of the prefill replica's first rank it is a command to its link.
    """

    uid: int
    experts: Piece  # a piece of [tokens, MoE layers, K] uint16, cut anywhere


class Scored(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode's first rank: log probabilities of the next prompt tokens, if the request asks for them.

    Like `Chosen`: in order, before `Last`, and also a command.
    """

    uid: int
    rows: Piece  # a piece of the rows of `model/prompt_logprobs.py`, cut anywhere


class Last(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: all pages have been sent, and this is the first token."""

    uid: int
    token: TokenId
    logprobs: list[tuple[int, float]]
    prefill: float = 0.0  # seconds from its first step to this token
    waited: float = 0.0  # seconds from this token until this message was sent, after the last Sending
    cached: Count = 0  # prompt tokens that prefill had in its cache
    drafts: Drafts = []


class Closed(msgspec.Struct, frozen=True, tag=True):
    """prefill -> decode: nothing more will come for this room."""

    uid: int
    error: str


# Commands from the rank's loop to a link's thread, and the event that comes back.


class Join(msgspec.Struct, frozen=True):
    """This rank has the room now. `opening`: the message that opens it at the peer, if this link is to send it."""

    uid: int
    opening: Open | None = None
    expert_bytes: int = 0  # the most bytes of chosen experts that may come over this link
    row_bytes: int = 0  # the most bytes of the prompt's log probabilities
    pages: list[int] = []  # of decode's pool, to which its KV may come


class SendPages(msgspec.Struct, frozen=True):
    """Copy pages of my pool to pages of the peer's. `ready`: the CUDA event after which mine are written, or None."""

    uid: int
    mine: list[int]
    theirs: list[int]
    ready: Any = None  # torch.cuda.Event, a type that msgspec does not know


class SendLast(msgspec.Struct, frozen=True):
    """All SendPages of the room have been given: send the first token after them."""

    uid: int
    token: int
    logprobs: list[tuple[int, float]]
    prefill: float = 0.0  # as in Last
    sampled: float = 0.0  # time.perf_counter() when the token was known
    cached: int = 0  # as in Last
    drafts: list[int] = []  # as in Last


class AllRead(msgspec.Struct, frozen=True):
    """From the mover to its link, if the transport is one-sided: the peer has read all pages of this room."""

    word: SendLast | Closed  # the last one on the room


class RoomFailed(msgspec.Struct, frozen=True, tag=True):
    """This link went down, and the room with it. But its pages may still be written until `RoomEnded` follows."""

    uid: int
    error: str


class RoomEnded(msgspec.Struct, frozen=True, tag=True):
    """This link will not touch the room's pages any more. Exactly one per link and room that it joined."""

    uid: int
    error: str | None = None
    token: int = -1
    logprobs: list[tuple[int, float]] = []
    link_down: bool = False  # the link failed, not the room
    prefill: float = 0.0  # as in Last
    transfer: float = 0.0  # seconds from the token until all KV had arrived
    at: float = 0.0  # time.perf_counter() when all KV had arrived
    cached: int = 0  # as in Last
    drafts: list[int] = []  # as in Last


Message = Open | Cancel | Sending | Read | Chosen | Scored | Last | Closed  # over the pipe
Command = Join | Cancel | SendPages | Chosen | Scored | SendLast | Closed  # from the rank's loop
LinkEvent = Open | RoomFailed | RoomEnded  # to the rank's loop
