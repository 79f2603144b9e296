"""The decode role: like unified, but a prompt's KV arrives from a prefill rank instead of being computed here.

queue --(all its pages)--> room --(KV and first token)--> scheduler --> tokens
"""

import time
from collections import abc, deque

import msgspec

from disagg.control.messages import Abort, Back, Forget, Gone, Load, Member, Parts, Submit, Update, Withdraw
from disagg.control.secret import Secret
from disagg.engine import Engine
from disagg.handoff.connect import dial, link_key
from disagg.handoff.links import Links
from disagg.handoff.protocol import Join, Open, Room, RoomEnded, RoomFailed, RoomState
from disagg.handoff.receive_link import ReceiveLink
from disagg.handoff.transport import Endpoint
from disagg.incoming import Incoming, Rooms
from disagg.role import Event
from disagg.scheduler import Sequence
from disagg.unified import Unified
from model.pages import pages_for
from model.prompt_row import row_bytes


class Decode(Unified):
    def __init__(self, engine: Engine, members: list[Member], endpoint: Endpoint, secret: Secret | None = None) -> None:
        """`members`: the ranks of this replica, in order. `endpoint`: this rank's. `secret`: of the prefill ranks."""
        super().__init__(engine)
        self.members, self.endpoint, self.secret = members, endpoint, secret
        self.rank = engine.mesh.attn.rank
        self.queue: deque[Incoming] = deque()  # waiting for pages
        self.incoming = Rooms(self.scheduler)  # have pages, waiting for KV
        self.links = Links(self.make_link)
        self.failures = 0  # handoffs that ended with an error, and were not cancelled
        self.generations: dict[str, int] = {}  # of the links to a prefill replica, by its first rank's id

    def collect(self) -> abc.Sequence[Event]:
        return self.links.drain()

    def handle(self, event: Event) -> None:
        match event:
            case Submit(request, prefill) if not self.has(request.uid):
                if prefill is None:
                    self.updates.append(Update(request.uid, error="a decode replica needs a prefill replica"))
                elif self.fits(request):
                    sequence = Sequence(request, self.engine.config.eos_token_ids)
                    self.queue.append(Incoming(sequence, prefill, Room(len(self.members))))
            case RoomFailed(uid, error):
                self.room_failed(uid, error)
            case RoomEnded() as ended:
                self.room_ended(ended)
            case Abort(uid) if uid in self.incoming:
                self.cancel(self.incoming[uid])
                self.settle_rooms()
            case Abort(uid):
                self.queue = deque(a for a in self.queue if a.sequence.uid != uid)
                super().handle(event)
            case Withdraw(uids):
                self.returned += [a.sequence.uid for a in self.queue if a.sequence.uid in uids]
                self.queue = deque(a for a in self.queue if a.sequence.uid not in uids)
            case Forget():
                self.queue.clear()
                for arrival in self.incoming:
                    self.cancel(arrival)
                self.settle_rooms()
                self.renew_links(list(self.generations))
                self.links.gone.clear()  # the next session repeats who is gone
                super().handle(event)
            case Gone(ids):
                self.renew_links(ids)
                self.links.lose(ids)
            case Back(ids):
                self.links.find(ids)

    def has(self, uid: int) -> bool:
        known = (self.sequences, self.incoming, {arrival.sequence.uid for arrival in self.queue})
        return any(uid in uids for uids in known)

    def cancel(self, arrival: Incoming) -> None:
        """Cancel a request that has its pages, and that the router does not want any more."""
        arrival.wanted = False
        self.incoming.cancel(arrival)

    def admit(self) -> None:
        """Open rooms, in order, as long as there are free pages."""
        while self.queue and self.open(self.queue[0]):
            self.queue.popleft()

    def open(self, arrival: Incoming) -> bool:
        """Give the request its pages, then request its KV. Returns False if there are not enough free pages yet."""
        sequence, request = arrival.sequence, arrival.sequence.request
        if any(member.id in self.links.gone for member in arrival.prefill):
            self.updates.append(Update(request.uid, error="its prefill replica has died", retry=True))
            return True
        arrival.generation = self.generations.setdefault(arrival.prefill[0].id, 0)
        if not self.incoming.open(arrival):
            return False
        opening = None
        if self.rank == 0:
            opening = Open(request, sequence.pages, self.members, arrival.generation, sequence.hits)
        link = self.links.get(arrival.prefill[self.rank % len(arrival.prefill)], arrival.generation)
        prompt_len = len(request.prompt)
        experts = self.engine.expert_bytes(prompt_len) if opening and request.return_experts else 0
        top, rows = request.prompt_logprobs, 0
        if opening and top is not None:
            rows = (prompt_len - 1) * row_bytes(top, self.engine.config.vocab_size)
        link.put(Join(request.uid, opening, experts, rows, sequence.pages[sequence.hits : pages_for(prompt_len)]))
        arrival.link = link
        self.begun.append(request.uid)
        return True

    def make_link(self, prefill: Member, generation: int) -> ReceiveLink:
        me, pool = self.members[self.rank], self.engine.pool
        connect = dial(prefill, me, self.endpoint, generation, self.secret)
        unpack_pages = self.engine.ops.unpack_pages
        key = link_key(prefill, me, generation)
        return ReceiveLink(key, connect, pool, self.links.events, self.links.credits, unpack_pages=unpack_pages)

    def room_ended(self, ended: RoomEnded) -> None:
        """Record that one link has ended a room. The last one ends the room, and those that only awaited it.

        An error ends those that await it at once, as far as their own links have ended them.
        """
        arrival = self.incoming[ended.uid]
        error = ended.error or self.misfit(ended)
        arrival.room.end_link(error)
        if ended.link_down:
            arrival.link_down = True
            self.give_up_links(arrival)
        if error is None:
            arrival.first = ended
        else:
            self.incoming.break_promise(arrival)
        if arrival.room.may_release:
            arrival.ended = ended
        if arrival.room.may_release or error is not None:
            self.settle_rooms()

    def room_failed(self, uid: int, error: str) -> None:
        """Say at once that a link went down. The room stays until nobody writes its pages."""
        arrival = self.incoming[uid]
        arrival.room.fail(error)
        arrival.link_down = True
        self.give_up_links(arrival)
        self.incoming.break_promise(arrival)
        self.tell_failure(arrival)
        self.settle_rooms()

    def tell_failure(self, arrival: Incoming) -> None:
        """Tell the router, if it still wants the request. It tries it elsewhere, under another uid."""
        if arrival.wanted:
            arrival.wanted = False
            self.failures += 1
            error, down = arrival.room.error, arrival.link_down
            self.updates.append(Update(arrival.uid, error=error, retry=True, link_down=down))

    def settle_rooms(self) -> None:
        """Settle the rooms that are over. Call it after whatever may end one: no other event may come."""
        for one in list(self.incoming):  # in order, because a room that is settled may end later ones
            if one.is_over:
                self.settle(one)

    def settle(self, arrival: Incoming) -> None:
        """Start the request of a room that is over, or release its pages."""
        uid = arrival.uid
        assert arrival.link is not None
        experts, prompt_rows = arrival.link.experts.take(uid), arrival.link.prompt_rows.take(uid)
        self.incoming.close(arrival)
        if arrival.is_good:
            self.start(arrival, experts, prompt_rows)
        elif arrival.wanted and arrival.cancelled and not arrival.link_down:
            self.returned.append(uid)
        else:
            self.tell_failure(arrival)

    def start(self, arrival: Incoming, experts: bytes, prompt_rows: bytes) -> None:
        """Report a request's first token, and let it run. `experts`, `prompt_rows`: what came with its KV."""
        sequence, first, ended = arrival.sequence, arrival.first, arrival.ended
        assert first is not None and ended is not None  # every link has ended the room without an error
        sequence.computed = len(sequence.tokens)
        self.scheduler.publish(sequence, sequence.computed)
        self.sequences[sequence.uid] = sequence
        reason, sequence.drafts = sequence.append(first.token), first.drafts
        self.report_experts(sequence.uid, experts)
        self.report_prompt(sequence.uid, prompt_rows)
        logprobs = [first.logprobs] if first.logprobs else []
        self.emit(sequence, [first.token], logprobs, reason, self.parts(arrival, ended), first.cached)
        if reason is None:
            self.scheduler.add(sequence)

    def misfit(self, ended: RoomEnded) -> str | None:
        """Return why no step could take what prefill has chosen, or None. A step that fails would end the process."""
        vocab, most = self.engine.config.vocab_size, self.engine.settings.speculate
        if (largest := max([ended.token, *ended.drafts])) >= vocab:
            return f"prefill sent token {largest}; the model's vocabulary has {vocab}"
        if len(ended.drafts) > most:
            return f"prefill sent {len(ended.drafts)} drafts; --speculate is {most}"
        return None

    def parts(self, arrival: Incoming, ended: RoomEnded) -> Parts:
        """Return the parts of its time to first token.

        The prefill side sends only durations, because its clock differs. The last link to end may belong to another
        rank of this replica, which is assumed to be on this machine.
        """
        queue = ended.at - arrival.submitted - ended.prefill - ended.transfer
        return Parts(queue, ended.prefill, ended.transfer, time.perf_counter() - ended.at)

    def give_up_links(self, arrival: Incoming) -> None:
        """Stop this rank's link, because a link of the replica to the same prefill replica went down.

        Otherwise the room would wait for the other links for ever. The next request makes new links.
        """
        assert arrival.link is not None
        leader = arrival.prefill[0].id
        if arrival.generation == self.generations[leader]:
            self.renew_links([leader])
        arrival.link.stop()

    def renew_links(self, leaders: list[str]) -> None:
        """Make the next request to each of these prefill replicas use new links."""
        for leader in leaders:
            self.generations[leader] = self.generations.get(leader, 0) + 1

    def load(self) -> Load:
        load = super().load()
        waiting = load.waiting + len(self.queue) + len(self.incoming)
        unwanted = sum(len(arrival.sequence.pages) for arrival in self.incoming if not arrival.wanted)
        return msgspec.structs.replace(load, waiting=waiting, unwanted_pages=unwanted)

    @property
    def is_waiting(self) -> bool:
        return any(arrival.room.state != RoomState.FAILED for arrival in self.incoming)

    def stats(self) -> dict[str, float]:
        failures = self.failures if self.rank == 0 else 0  # every rank of the replica has counted the same ones
        return super().stats() | self.links.stats() | {"transfer_failures": failures}

    def close(self) -> None:
        self.links.close()
