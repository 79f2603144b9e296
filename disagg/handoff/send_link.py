"""The prefill rank's end of a link: packs pages, announces and starts transfers, says how each room ends."""

import time
from collections.abc import Callable
from typing import Any

import torch
import zmq
from torch import Tensor

from disagg.handoff.credits import most_pages
from disagg.handoff.link import Link
from disagg.handoff.protocol import Cancel, Closed, Join, Last, Open, RoomEnded, Sending, SendLast, SendPages
from disagg.handoff.transports.torch_dist import TIMEOUT
from kernels import ref
from model.kv_cache import pages_for


class SendLink(Link):
    def __init__(self, *args: Any, pack_pages: Callable[[Tensor, Tensor], Tensor] = ref.pack_pages):
        self._cancelled: set[int] = set()  # cancelled before this rank's loop joined the room
        self._sending: set[int] = set()  # rooms of which neither Last nor Closed has been said
        self._pack_pages = pack_pages
        super().__init__(*args)

    def meet(self) -> None:
        """It may come later to the pipe than to the transport, and this end be the first to speak."""
        poller, deadline = zmq.Poller(), time.monotonic() + TIMEOUT.total_seconds()
        poller.register(self.pipe.sock, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while self._down is None:
            came = dict(poller.poll(1000 * max(0, deadline - time.monotonic())))
            if self.pipe.sock in came:
                for message in self.pipe.poll():
                    self.handle(message)
                if self.pipe.is_met:
                    return
            if self._woken in came:
                self._woken.recv()
            if time.monotonic() >= deadline:
                raise TimeoutError("nobody came to the pipe")
        raise RuntimeError(self._down)

    def look(self) -> None:
        """The credits may be held by transfers to this very peer, which its leaving alone does not end."""
        super().look()
        if self.pipe.has_gone:
            raise ConnectionError("the other end has gone")

    def handle(self, item: Any) -> None:
        match item:
            case Open(request, pages):
                if len(pages) < pages_for(len(request.prompt)):
                    raise ValueError(
                        f"the other end opened a room of {len(pages)} pages for {len(request.prompt)} tokens"
                    )
                self._events.put(item)
            case Join(uid):
                self._sending.add(uid)
                if uid in self._cancelled:
                    self._cancelled.remove(uid)
                    self._conclude(Closed(uid, "cancelled"), RoomEnded(uid, "cancelled"))
            case Cancel(uid) if uid not in self._sending:
                self._cancelled.add(uid)
            case Cancel(uid):
                self._conclude(Closed(uid, "cancelled"), RoomEnded(uid, "cancelled"))
            case SendPages(uid) if uid in self._sending:
                self._send(item)
            case SendLast(uid, token, logprobs, prefill, sampled) if uid in self._sending:
                waited = time.perf_counter() - sampled
                self._conclude(Last(uid, token, logprobs, prefill, waited), RoomEnded(uid))
            case Closed(uid, error) if uid in self._sending:
                self._conclude(item, RoomEnded(uid, error))

    def _send(self, first: SendPages) -> None:
        """Start the next transfer: of these pages, and of what is ready behind them."""
        if first.ready is not None:
            first.ready.synchronize()
        self._credits.take(self.look)
        self._commands.appendleft(first)
        uids, mine, theirs, last_words = self._gather(most_pages(self.pool[:, 0].nbytes))
        packed = self._pack_pages(self.pool, self.page_ids(mine))  # [layers, pages, 64, C + R]
        # Behind the packing, and so where that had room on this GPU. The receive, which occupies the peer's until it
        # has the bytes, is asked for after both.
        transfer = self.transport.send(packed)
        if packed.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.pipe.send(Sending(uids, theirs))
        self.then(lambda: None, transfer)
        for word in last_words:
            self.handle(word)

    def _gather(self, most: int) -> tuple[list[int], list[int], list[int], list[SendLast | Closed]]:
        """At most so many pages from the commands that wait: their rooms, and where they are here and go there. With
        them what ends one of these rooms, which is to be handled behind its pages."""
        uids, mine, theirs, last_words = [], [], [], []
        while self._commands and len(mine) < most:
            match self._commands.popleft():
                case SendPages(uid, here, there, ready) as item if uid in self._sending:
                    if ready is not None and not ready.query():
                        self._commands.appendleft(item)
                        break
                    space = most - len(mine)
                    uids.append(uid)
                    mine += here[:space]
                    theirs += there[:space]
                    if len(here) > space:
                        self._commands.appendleft(SendPages(uid, here[space:], there[space:]))
                case SendLast(uid) | Closed(uid) as word if uid in uids:
                    last_words.append(word)
                case item:
                    self.handle(item)
        return uids, mine, theirs, last_words

    def _conclude(self, word: Last | Closed, ended: RoomEnded) -> None:
        """Say the last word of a room, which the peer takes behind the bytes; here it ends when they have left."""
        self._sending.remove(word.uid)
        self.pipe.send(word)
        self.then(lambda: self.end(ended))
