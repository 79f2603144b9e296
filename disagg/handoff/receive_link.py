"""The decode rank's end of a link: receives announced pages into the pool, and reports rooms as done."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disagg.handoff.checksum import MISMATCH, checksum
from disagg.handoff.credits import most_pages
from disagg.handoff.link import Link
from disagg.handoff.protocol import (
    AllRead,
    Cancel,
    Chosen,
    Closed,
    Command,
    Join,
    Last,
    Message,
    Open,
    Read,
    RoomEnded,
    Scored,
    Sending,
)
from disagg.handoff.transport import TIMEOUT
from kernels import ref


class Pieces:
    """Bytes that come in pieces, per room."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._rooms: dict[int, tuple[int, bytearray]] = {}  # the most bytes that may come, and those so far

    def expect(self, uid: int, max_bytes: int) -> None:
        if max_bytes:
            self._rooms[uid] = max_bytes, bytearray()

    def add(self, uid: int, piece: bytes) -> None:
        """Raises ValueError if more bytes have come than were expected."""
        max_bytes, data = self._rooms.get(uid, (0, bytearray()))
        if len(data) + len(piece) > max_bytes:
            raise ValueError(f"the other end sent over {max_bytes} bytes of {self.what} for room {uid}")
        data += piece

    def take(self, uid: int) -> bytes:
        """Return the bytes of a room that has ended, and forget them. Called by the rank's loop.

        They are no event, because the loop shares events with the replica, and only its first rank needs them.
        """
        return bytes(self._rooms.pop(uid, (0, b""))[1])


class ReceiveLink(Link):
    """The decode rank's end of a link.

    It needs no `meet`: the peer has opened the pipe already, so this end can write at once. It calls `greet` even if it
    was stopped before that. The peer may already be waiting in its own `greet`, and nothing else ends that wait.
    """

    def __init__(self, *args: Any, unpack_pages: Callable[[Tensor, Tensor, Tensor], None] = ref.unpack_pages) -> None:
        self._unpack_pages = unpack_pages
        # For the mover: rooms with a transfer that did not have its checksum. Each transfer counts for its first room.
        self._mismatched: Counter[int] = Counter()
        self.experts, self.prompt_rows = Pieces("chosen experts"), Pieces("prompt log probabilities")
        super().__init__(*args)

    def handle(self, item: Message | Command | AllRead) -> None:
        match item:
            case Join(uid, Open() as opening, expert_bytes, row_bytes):
                self.experts.expect(uid, expert_bytes)
                self.prompt_rows.expect(uid, row_bytes)
                self.pipe.send(opening)
            case Cancel(uid) if self.is_open(uid):
                self.pipe.send(item)
            case Sending():
                self._receive(item)
            case Read():
                self.pipe.send(item)
            case Chosen(uid, experts) if self.is_open(uid):
                self.experts.add(uid, experts)
            case Scored(uid, rows) if self.is_open(uid):
                self.prompt_rows.add(uid, rows)
            case Last(uid) as last:
                self._expect_no_more(uid)
                came = time.perf_counter()
                self.then(lambda: self._done(last, came))
            case Closed(uid, error):
                self._expect_no_more(uid)
                self.then(lambda: self.end(self._judged(RoomEnded(uid, error))))

    def _receive(self, sending: Sending) -> None:
        for uid in sending.uids:
            self._await(uid)
        self._check_pages(sending)
        ids = self.page_ids(sending.pages)
        credit = self._credits.take(self.check, TIMEOUT.total_seconds())
        x, pages, claimed = self.pool, sending.pages, sending.uids
        if not self.transport.in_place:
            x, pages, claimed = self.buffer(credit, len(pages)), None, []
        elif not self.claim(claimed):
            raise RuntimeError(self._down)
        try:
            transfer = self.transport.recv(x, sending.location, pages)
        except Exception:
            self.let_go(claimed)
            raise
        self.then(lambda: self._arrived(x, ids, sending), transfer, credit, claimed)

    def _check_pages(self, sending: Sending) -> None:
        """Raise ValueError for more pages than a transfer may have, for one of no room's, and for a room without one.

        Other requests may read a page that is not expected. A room without one would be claimed for nothing.
        """
        if len(sending.pages) > (most := most_pages(self.pool[:, 0].nbytes)):
            raise ValueError(f"the other end sends {len(sending.pages)} pages at once; it may send {most}")
        with self._changed:
            of_room = {uid: self._rooms.get(uid, frozenset()) for uid in sending.uids}
        pages, expected = set(sending.pages), frozenset().union(*of_room.values())
        if others := sorted(pages - expected):
            raise ValueError(
                f"the other end sends page {others[0]}, which is none of rooms {sorted(set(sending.uids))}"
            )
        if idle := [uid for uid, own in of_room.items() if pages.isdisjoint(own)]:
            raise ValueError(f"the other end sends pages for room {idle[0]}, but none of them is that room's")

    def _arrived(self, x: Tensor, ids: Tensor, sending: Sending) -> None:
        """Check what has come, and unpack it if it is in a buffer `x`. In place, `x` is the pool."""
        in_place = self.transport.in_place
        if self.transport.one_sided:
            self.tell(Read())
        if sending.checksum is not None and checksum(x[:, ids] if in_place else x) != sending.checksum:
            self._mismatched.update({uid: int(uid == sending.uids[0]) for uid in sending.uids})
            for uid in sending.uids:  # the rooms still end by the sender's word, after all that is under way
                self.tell(Cancel(uid))
        elif not in_place and self.claim(sending.uids):  # otherwise the pages may belong to another request
            try:
                self._unpack_pages(x, self.pool, ids)
                if x.is_cuda:
                    torch.cuda.current_stream().synchronize()  # the room's end must not overtake the copy
            finally:
                self.let_go(sending.uids)

    def _done(self, last: Last, came: float) -> None:
        now = time.perf_counter()
        transfer = last.waited + now - came
        times = last.prefill, transfer, now
        done = RoomEnded(last.uid, None, last.token, last.logprobs, False, *times, last.cached, last.drafts)
        self.end(self._judged(done))

    def _judged(self, ended: RoomEnded) -> RoomEnded:
        """Return the end of a room, which is an error if a transfer did not have its checksum.

        The sender's last word has come, so it kept its memory until this end had read it. A link that goes down says no
        such word. This end may have read another request's KV there.
        """
        if ended.uid not in self._mismatched:
            return ended
        self.mismatches += self._mismatched.pop(ended.uid)
        return RoomEnded(ended.uid, MISMATCH)

    def _expect_no_more(self, uid: int) -> None:
        """The peer has said its last word on a room: it ends behind what is under way, and no page may follow."""
        self._await(uid)
        with self._changed:
            if uid in self._rooms:
                self._rooms[uid] = frozenset()

    def _await(self, uid: int) -> None:
        """Wait until this rank's own loop has joined the room: another rank of the replica may have opened it earlier.

        Raises TimeoutError if it does not within TIMEOUT.
        """
        with self._changed:
            joined = self._changed.wait_for(
                lambda: self.is_open(uid) or self._down is not None, timeout=TIMEOUT.total_seconds()
            )
        if not joined:
            raise TimeoutError(f"this rank never joined room {uid}")
