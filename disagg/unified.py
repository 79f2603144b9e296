"""The unified role: prompts and tokens in one job. What decode has in common with it is here too."""

from typing import Any

from disagg.control import Abort, Parts, Submit, Update
from disagg.engine import Engine, Step
from disagg.request import Request
from disagg.scheduler import Plan, Sequence


class Unified:
    """One replica's requests. `handle` and `after` see the same on every rank of the replica, in the same order, so
    their scheduler and page allocator stay equal without further talk."""

    def __init__(self, engine: Engine):
        self.engine, self.scheduler = engine, engine.scheduler
        self.sequences: dict[int, Sequence] = {}  # by uid, all that are queued or running
        self.updates: list[Update] = []  # for the router

    def collect(self) -> list[Any]:
        """What happened to this rank alone since the last step; the loop tells the rest of the replica."""
        return []

    def handle(self, event: Any) -> None:
        match event:
            case Submit(request, _):
                if self.fits(request):
                    self.sequences[request.uid] = Sequence(request)
                    self.scheduler.add(self.sequences[request.uid])
            case Abort(uid) if uid in self.sequences:
                self.finish(self.sequences[uid])

    def fits(self, request: Request) -> bool:
        """Can it ever run here? If not, the router hears why."""
        try:
            self.scheduler.check_fits(len(request.prompt) + request.max_tokens)
        except ValueError as error:
            self.updates.append(Update(request.uid, error=str(error)))
            return False
        return True

    def plan(self) -> Plan:
        return self.scheduler.schedule()

    def launched(self, step: Step) -> None:
        """A step of mine has just been launched."""

    def after(self, step: Step) -> int:
        """Take up the tokens of a step; the next one may have been launched already. How many were wanted."""
        wanted = 0
        for one in step.sampled():
            sequence = one.sequence
            sequence.in_flight -= 1
            if self.sequences.get(sequence.request.uid) is sequence:
                wanted += 1
                self.emit(sequence, one.token, one.logprobs)
            elif not sequence.in_flight:  # it ended while this token was on its way, which nobody wants now
                self.scheduler.release(sequence)
        return wanted

    def emit(
        self, sequence: Sequence, token: int, logprobs: list[tuple[int, float]], parts: Parts | None = None
    ) -> bool:
        """A request has a new token; was it the last?"""
        reason = sequence.append(token, self.engine.config.eos_token_ids)
        uid = sequence.request.uid
        self.updates.append(Update(uid, [token], [logprobs] if sequence.request.logprobs else [], reason, parts=parts))
        if reason:
            self.finish(sequence)
        return bool(reason)

    def finish(self, sequence: Sequence) -> None:
        del self.sequences[sequence.request.uid]
        self.scheduler.remove(sequence)
        # While a token is in flight, a step still writes to the pages, and `after` releases them. A prompt's chunk in
        # flight has no token: the pages' next owner writes after it, on the same stream.
        if sequence.pages and not sequence.in_flight:
            self.scheduler.release(sequence)

    @property
    def in_flight(self) -> bool:
        """Is something under way outside the scheduler, that will soon make work?"""
        return False

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
