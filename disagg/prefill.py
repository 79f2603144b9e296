"""The prefill role: compute prompts, and send each chunk's KV to the decode rank while computing the next chunk."""

import time
from collections import abc
from dataclasses import dataclass

import msgspec
import torch
import zmq

from disagg.control.messages import Back, Forget, Gone, Load, Member, Updates, in_pieces
from disagg.engine import Engine
from disagg.handoff.connect import Door, link_key, listen
from disagg.handoff.links import Links
from disagg.handoff.protocol import (
    Chosen,
    Closed,
    Join,
    Open,
    Room,
    RoomEnded,
    RoomState,
    Scored,
    SendLast,
    SendPages,
)
from disagg.handoff.send_link import SendLink
from disagg.handoff.transport import Endpoint
from disagg.role import NOT_FINITE, Event, Role, tokens_left
from disagg.scheduler import Plan, Sequence
from disagg.step import Step
from model.pages import PAGE
from model.sampling import NO_TOKEN

MOST_LINKS = 256  # alive at once; each has two threads, and any process that reaches the door can ask for one
NO_LINK = ValueError, zmq.ZMQError, RuntimeError  # the last two: too many open files, or threads


@dataclass(eq=False)
class Outgoing:
    """A prompt being computed, and the destination of its KV."""

    sequence: Sequence
    pages: list[int]  # the decode side's
    links: list[SendLink]  # this rank's, out of all that serve the request
    room: Room
    sent: int  # pages, those that the decode side had among them
    began: float = 0.0  # time.perf_counter() at its first step


class Prefill(Role):
    def __init__(
        self, engine: Engine, members: list[Member], door: Door, endpoint: Endpoint, checksums: bool = False
    ) -> None:
        """`members`: the ranks of this replica, in order. `door`, `endpoint`: this rank's. `checksums`: send them."""
        super().__init__(engine)
        self.door, self.endpoint, self.checksums = door, endpoint, checksums
        self.rank, self.members = engine.mesh.attn.rank, members
        self.outgoing: dict[int, Outgoing] = {}
        self.links = Links(self.make_link)
        self.before: torch.cuda.Event | None = None  # of the latest step

    def news(self) -> Updates | None:
        """Always None: the decode side reports to the router."""

    def collect(self) -> abc.Sequence[Event]:
        for knock in self.door.poll():
            try:
                self.link(knock.decode, knock.generation)
            except NO_LINK as error:
                self.door.refusals.add("a link", str(error))
        return self.links.drain()

    def link(self, decode: Member, generation: int) -> SendLink:
        """Return the link to this peer and generation, and make it if there is none.

        Raises one of NO_LINK, ValueError if there are too many.
        """
        if (decode.id, generation) not in self.links and self.links.num_alive >= MOST_LINKS:
            raise ValueError(f"{MOST_LINKS} are open")
        return self.links.get(decode, generation)

    def handle(self, event: Event) -> None:
        match event:
            case Open() if event.request.uid not in self.outgoing:
                self.open(event)
            case RoomEnded(uid, error):
                departure = self.outgoing[uid]
                departure.room.end_link(error)
                if error is not None:
                    self.fail(departure, error)
                if departure.room.may_release:
                    del self.outgoing[uid]
                    if departure.sequence.pages:
                        self.scheduler.release(departure.sequence)
            case Gone(ids):
                self.links.lose(ids)
            case Back(ids):
                self.links.find(ids)
            case Forget():  # the decode side cancels its rooms, and the next session repeats who is gone
                self.links.gone.clear()

    def open(self, event: Open) -> None:
        request, step = event.request, len(self.members)
        links = []
        for decode in event.decode[self.rank :: step]:
            try:
                links.append(self.link(decode, event.generation))
            except NO_LINK as error:  # to all ranks of this replica it is a link that went down
                self.door.refusals.add("a link", str(error))
                self.links.events.put(RoomEnded(request.uid, f"prefill: no link: {error}", link_down=True))
        sequence = Sequence(request, self.engine.config.eos_token_ids)
        departure = Outgoing(sequence, event.pages, links, Room(len(event.decode)), event.have)
        departure.room.rise(RoomState.WAITING)
        self.outgoing[request.uid] = departure
        for link in links:
            link.put(Join(request.uid))
        try:
            request.check_vocabulary(self.engine.config.vocab_size)
            self.scheduler.check_fits(len(request.prompt))
        except ValueError as error:
            self.fail(departure, f"prefill: {error}")
        else:
            self.scheduler.add(sequence)

    def fail(self, departure: Outgoing, error: str) -> None:
        """Stop computing a prompt, and close its room. It keeps its pages until every link has ended the room."""
        departure.room.fail(error)
        self.scheduler.remove(departure.sequence)
        for link in departure.links:
            link.put(Closed(departure.sequence.uid, error))  # ignored by a link where the room has ended already

    def make_link(self, decode: Member, generation: int) -> SendLink:
        door = self.door
        connect = listen(door.store.port, door.host, self.endpoint, door.secret, door.link_refusals)
        key = link_key(self.members[self.rank], decode, generation)
        own = self.engine.pool, self.links.events, self.links.credits
        return SendLink(key, connect, *own, pack_pages=self.engine.ops.pack_pages, checksums=self.checksums)

    def schedule(self) -> Plan:
        return self.scheduler.schedule(reserve_output=False)

    def launched(self, step: Step) -> None:
        """Send the pages that this step fills. A prompt with its last chunk launched leaves the queues.

        With a prompt's first chunk, its pages from the cache leave, too. Most of them were filled by earlier steps, and
        do not wait for this one.
        """
        prefills = step.work.plan.prefills
        filled = {page for s, count in prefills for page in s.pages[(s.computed - count) // PAGE : s.computed // PAGE]}
        for sequence, _ in prefills:
            departure = self.outgoing[sequence.uid]
            if not departure.began:
                departure.began = step.started
                hits = sequence.pages[: sequence.hits]
                self.send(departure, next((i for i, page in enumerate(hits) if page in filled), len(hits)), self.before)
            departure.room.rise(RoomState.TRANSFERRING)
            whole = not sequence.in_prompt
            upto = -(-sequence.computed // PAGE) if whole else sequence.computed // PAGE  # full pages, except the last
            self.send(departure, upto, step.done)
            if whole:
                self.scheduler.remove(sequence)
        self.before = step.done

    def send(self, departure: Outgoing, upto: int, ready: torch.cuda.Event | None) -> None:
        """Send a prompt's first `upto` pages, but those that were sent. `ready`: after this, their KV is there."""
        if upto > departure.sent:
            new, sequence = slice(departure.sent, upto), departure.sequence
            for link in departure.links:
                link.put(SendPages(sequence.uid, sequence.pages[new], departure.pages[new], ready))
            departure.sent = upto

    def take_up(self, step: Step) -> int:
        step.wait()
        given, now = list(zip(step.outcomes(), step.first_drafts(), strict=True)), time.perf_counter()
        for kind, found in ((Chosen, step.chosen_experts()), (Scored, step.prompt_logprobs())):
            for sequence, data in found:
                departure = self.outgoing.get(sequence.uid)
                if departure is not None and departure.sequence is sequence:
                    for link in departure.links[:1]:  # to the decode replica's first rank
                        for piece in in_pieces(data):
                            link.put(kind(sequence.uid, piece))
        for (sequence, (token,), pairs), drafts in given:
            sequence.tokens.append(token)
            uid = sequence.uid
            if token == NO_TOKEN:
                self.scheduler.cache.distrust()
            if uid in self.outgoing:  # otherwise its links ended while the token was in flight
                departure = self.outgoing[uid]
                if token == NO_TOKEN:
                    self.fail(departure, f"prefill: {NOT_FINITE}")
                    continue
                logprobs = pairs[0] if pairs else []
                last = SendLast(uid, token, logprobs, now - departure.began, now, sequence.hits * PAGE, drafts)
                for link in departure.links:
                    link.put(last)
        return len(given)

    def load(self) -> Load:
        """Return the replica's load. A computed prompt has no tokens left, though its first token may be on its way."""
        left = tokens_left(departure.sequence for departure in self.outgoing.values())
        return msgspec.structs.replace(super().load(), tokens_left=left)

    @property
    def is_waiting(self) -> bool:
        return bool(self.outgoing)

    def stats(self) -> dict[str, float]:
        return {"refusals": self.door.refusals.count + self.door.link_refusals.count}

    def close(self) -> None:
        self.links.close()
        self.door.close()
