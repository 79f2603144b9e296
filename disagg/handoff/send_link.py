"""The prefill rank's end of a link: packs pages if need be, announces and starts transfers, and ends each room."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import zmq
from torch import Tensor

from disagg.handoff.checksum import checksum
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
    SendLast,
    SendPages,
)
from disagg.handoff.transport import TIMEOUT
from kernels import ref
from model.pages import PAGE, pages_for

LOOK_MS = 1  # between two looks at what this thread waits for, while it also listens
T = TypeVar("T")


class SendLink(Link):
    def __init__(
        self, *args: Any, pack_pages: Callable[[Tensor, Tensor, Tensor], None] = ref.pack_pages, checksums: bool = False
    ) -> None:
        """`checksums`: send one with each transfer."""
        self._cancelled: set[int] = set()  # cancelled before this rank's loop joined the room
        self._sending: set[int] = set()  # rooms on which the last word has not been given
        self._pack_pages, self._checksums = pack_pages, checksums
        super().__init__(*args)

    def meet(self) -> None:
        """Wait until the peer is at the pipe: it may connect to the transport first, and this end may send first."""
        poller, deadline = zmq.Poller(), time.monotonic() + TIMEOUT.total_seconds()
        poller.register(self.pipe.sock, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while self._down is None:
            came = dict(poller.poll(int(1000 * max(0, deadline - time.monotonic()))))
            if self.pipe.sock in came:
                for message in self.pipe.poll():
                    self.handle(message)
                if self.pipe.is_met:
                    return
                if self.pipe.has_come:  # it does not come twice
                    raise ConnectionError("the other end has gone")
            if self._woken in came:
                self._woken.recv()
            if time.monotonic() >= deadline:
                raise TimeoutError("nobody came to the pipe")
        raise RuntimeError(self._down)

    def handle(self, item: Message | Command | AllRead) -> None:
        match item:
            case Open(request, pages, have=have):
                if have > (most := (len(request.prompt) - 1) // PAGE):
                    raise ValueError(f"the other end opened a room that has {have} pages; it can have {most}")
                if len(pages) < pages_for(len(request.prompt)):
                    raise ValueError(
                        f"the other end opened a room of {len(pages)} pages for {len(request.prompt)} tokens"
                    )
                self._events.put(item)
            case Join(uid):
                self._sending.add(uid)
                if uid in self._cancelled:
                    self._cancelled.remove(uid)
                    self._conclude(Closed(uid, "cancelled"))
            case Cancel(uid) if uid not in self._sending:
                self._cancelled.add(uid)
            case Cancel(uid):
                self._conclude(Closed(uid, "cancelled"))
            case SendPages(uid) if uid in self._sending:
                self._send(item)
            case Chosen(uid) | Scored(uid) if uid in self._sending:
                self.pipe.send(item)
            case SendLast(uid) | Closed(uid) if uid in self._sending:
                self._conclude(item)
            case AllRead(word):
                self._end(word)
            case Read():
                self.transport.was_read()

    def _send(self, first: SendPages) -> None:
        """Start the next transfer: these pages, and all ready pages queued after them."""
        ready = first.ready
        if ready is not None and self.transport.one_sided:
            self._wait(lambda: ready.query() or None)
        elif ready is not None:
            ready.synchronize()
        credit = self._wait(lambda: self._credits.try_take(0))
        self._commands.appendleft(first)
        uids, mine, theirs, last_words = self._gather(most_pages(self.pool[:, 0].nbytes))
        if not uids:  # the peer has cancelled them meanwhile
            self._credits.give_back(credit)
            return
        ids = self.page_ids(mine)
        x, pages = self.pool, mine
        if not self.transport.in_place:
            x, pages = self.buffer(credit, len(mine)), None
            self._pack_pages(self.pool, ids, x)
        # The send runs after the packing on the same stream, so this GPU has room for it by then. `Sending` comes after
        # both, because the peer's receive occupies its GPU until the bytes arrive.
        transfer, location = self.transport.send(x, pages)
        if x.is_cuda:
            torch.cuda.current_stream().synchronize()
        summed = checksum(x if pages is None else x[:, ids]) if self._checksums else None
        self.check()  # once the link is down, these pages may have been another request's when they were packed
        self.pipe.send(Sending(uids, theirs, location, summed))
        self.then(lambda: None, transfer, credit)
        for word in last_words:
            self.handle(word)

    def _wait(self, look: Callable[[], T | None]) -> T:
        """Wait until `look` returns something. Listen meanwhile: the peer's word `Read` gives credits back.

        Raises if the link goes down, or if the peer leaves. That alone would give no credit back.
        """
        while (found := look()) is None:
            self.check()
            self.attend(LOOK_MS)
        return found

    def _gather(self, max_pages: int) -> tuple[list[int], list[int], list[int], list[SendLast | Closed]]:
        """Take up to `max_pages` pages from the waiting commands.

        Returns the rooms, the pages here, the pages at the peer, and the commands that end one of these rooms. Those
        must be handled after the pages.
        """
        uids, mine, theirs, last_words = [], [], [], []
        while self._commands and len(mine) < max_pages:
            match self._commands.popleft():
                case SendPages(uid, own_pages, peer_pages, ready) as item if uid in self._sending:
                    if ready is not None and not ready.query():
                        self._commands.appendleft(item)
                        break
                    space = max_pages - len(mine)
                    uids.append(uid)
                    mine += own_pages[:space]
                    theirs += peer_pages[:space]
                    if len(own_pages) > space:
                        self._commands.appendleft(SendPages(uid, own_pages[space:], peer_pages[space:]))
                case SendLast(uid) | Closed(uid) as word if uid in uids:
                    last_words.append(word)
                case item:
                    self.handle(item)
        return uids, mine, theirs, last_words

    def _conclude(self, word: SendLast | Closed) -> None:
        """Send no more for a room. With a one-sided transport it ends only when the peer has read its pages.

        Otherwise a link that goes down here could let them be overwritten while the peer reads them. So when the peer
        hears the last word, it has read what was sent.
        """
        self._sending.remove(word.uid)
        if self.transport.one_sided:
            self.then(lambda: self.tell(AllRead(word)))
        else:
            self._end(word)

    def _end(self, word: SendLast | Closed) -> None:
        """Send a room's last message, which the peer handles after the bytes. Here it ends when the bytes have left."""
        match word:
            case SendLast(uid, token, logprobs, prefill, sampled, cached, drafts):
                waited = time.perf_counter() - sampled
                message, error = Last(uid, token, logprobs, prefill, waited, cached, drafts), None
            case Closed(uid, error):
                message = word
        self.pipe.send(message)
        self.then(lambda: self.end(RoomEnded(uid, error)))
