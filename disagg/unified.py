"""The unified role: one job computes prompts and decodes. The decode role is a subclass."""

from disagg.control.messages import Abort, Forget, Parts, Submit, Tokens, Update, Updates, Withdraw, in_pieces
from disagg.engine import Engine
from disagg.request import FinishReason, Request
from disagg.role import NOT_FINITE, Event, Role
from disagg.scheduler import Sequence
from disagg.step import Step
from model.pages import PAGE
from model.sampling import NO_TOKEN


class Unified(Role):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.sequences: dict[int, Sequence] = {}  # by uid: queued or running
        self.updates: list[Update | Tokens] = []  # news for the router, as are the next two
        self.begun: list[int] = []
        self.returned: list[int] = []

    def handle(self, event: Event) -> None:
        match event:
            case Submit(request, _) if request.uid not in self.sequences:
                if self.fits(request):
                    self.sequences[request.uid] = Sequence(request, self.engine.config.eos_token_ids)
                    self.scheduler.add(self.sequences[request.uid])
            case Abort(uid) if uid in self.sequences:
                self.finish(self.sequences[uid])
            case Withdraw(uids):
                for uid in uids:
                    if uid in self.sequences and self.sequences[uid] in self.scheduler.waiting:
                        self.finish(self.sequences[uid])
                        self.returned.append(uid)
            case Forget():
                for sequence in list(self.sequences.values()):
                    self.finish(sequence)

    def news(self) -> Updates | None:
        if not (self.updates or self.begun or self.returned):
            return None
        news = Updates(self.updates, self.begun, self.returned)
        self.updates, self.begun, self.returned = [], [], []
        return news

    def fits(self, request: Request) -> bool:
        """Can the request ever run here? If not, tell the router why. (The router may have another model.)"""
        try:
            request.check_vocabulary(self.engine.config.vocab_size)
            self.scheduler.check_fits(request.most_tokens)
            if request.return_experts:
                self.engine.check_experts()
        except ValueError as error:
            self.updates.append(Update(request.uid, error=str(error)))
            return False
        return True

    def take_up(self, step: Step) -> int:
        step.wait()
        plan, drafts = step.work.plan, step.work.drafts
        one_each = not plan.prefills and (drafts is None or not drafts.verified)
        tokens = step.sampled() if one_each else []
        for sequence, experts in step.chosen_experts():
            if self.sequences.get(sequence.uid) is sequence:
                self.report_experts(sequence.uid, experts)
        for sequence, rows in step.prompt_logprobs():
            if self.sequences.get(sequence.uid) is sequence:
                self.report_prompt(sequence.uid, rows)
        fed, ends = step.fed_experts(), plan.may_end if drafts is None else plan.has_last_token
        nothing_else = (
            one_each and not ends and not fed and step.logprobs is None and plan.stop_tokens.isdisjoint(tokens)
        )
        if nothing_else and plan.uids.keys() <= self.sequences.keys():  # the usual step: every request goes on
            for append, token in zip(plan.appends, tokens, strict=True):
                append(token)
            self.updates.append(Tokens(dict(zip(plan.uids, tokens, strict=True))))
            return len(tokens)
        going_on, useful = {}, 0
        for i, (sequence, several, logprobs) in enumerate(step.outcomes()):
            uid, is_first = sequence.uid, len(sequence.tokens) == sequence.prompt_len
            if NO_TOKEN in several:
                self.scheduler.cache.distrust()
            if uid not in self.sequences:  # it ended while this step was in flight
                sequence.extend(several[:1])  # the others may not follow on the tokens that it ended with
                if not sequence.unseen:
                    self.engine.release(sequence)
                continue
            count, reason = sequence.extend(several)
            new, cached_tokens = several[:count], sequence.hits * PAGE if is_first else 0
            useful += count
            given = new[:-1] if new[-1] == NO_TOKEN else new
            if given and drafts is not None and i < len(plan.decodes):
                left = 0 if reason or given != new else sequence.limit - len(sequence.tokens)
                sequence.verified += self.acceptance.add(drafts.verified, len(given) - 1, len(given) - 1 + left)
            if new[-1] == NO_TOKEN:
                if given:
                    self.emit(sequence, given, logprobs[: len(given)], None, accepted=len(given) - 1)
                self.updates.append(Update(uid, error=NOT_FINITE, retry=True))
                self.finish(sequence)
            elif sequence in fed:
                self.emit_with_experts(sequence, new, logprobs, reason, fed[sequence])
            elif reason or logprobs or cached_tokens or count > 1:
                self.emit(sequence, new, logprobs[:count], reason, cached_tokens=cached_tokens, accepted=count - 1)
            else:
                going_on[uid] = new[0]
        if going_on:
            self.updates.append(Tokens(going_on))
        return useful

    def report_experts(self, uid: int, experts: bytes) -> None:
        """Report the chosen experts of the sequence's next tokens. Call it before `emit` of a later token."""
        self.updates += [Update(uid, experts=piece) for piece in in_pieces(experts)]

    def report_prompt(self, uid: int, rows: bytes) -> None:
        """Report log probabilities of the next prompt tokens. Call it before `emit` of the first token."""
        self.updates += [Update(uid, prompt_rows=piece) for piece in in_pieces(rows)]

    def emit(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[list[tuple[int, float]]],
        reason: FinishReason | None,
        parts: Parts | None = None,
        cached_tokens: int = 0,
        accepted: int = 0,
    ) -> None:
        """Report tokens in an Update of their own. With a `reason` they are the request's last ones.

        `cached_tokens`: of the prompt; with the first token, that is how many were not computed. `accepted`: of
        `tokens`, those beyond the one that every step gives.

        A request with `max_tokens` 0 only ends here: its token is dropped.
        """
        if not sequence.request.max_tokens:
            tokens, logprobs = [], []
        update = Update(
            sequence.uid,
            tokens,
            logprobs,
            reason,
            parts=parts,
            cached_tokens=cached_tokens,
            accepted=accepted,
            verified=sequence.verified,
        )
        sequence.verified = 0
        self.updates.append(update)
        if reason:
            self.finish(sequence)

    def emit_with_experts(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[list[tuple[int, float]]],
        reason: FinishReason | None,
        experts: list[bytes],
    ) -> None:
        """Report tokens one by one, each behind the chosen experts of the token before it."""
        for i, (token, piece) in enumerate(zip(tokens, experts, strict=False)):  # wrong drafts have experts, too
            self.report_experts(sequence.uid, piece)
            last = reason if i == len(tokens) - 1 else None
            self.emit(sequence, [token], logprobs[i : i + 1], last, accepted=int(i > 0))

    def finish(self, sequence: Sequence) -> None:
        """End a request, and release its pages as soon as no step of its own writes to them."""
        del self.sequences[sequence.uid]
        self.scheduler.remove(sequence)
        # While a token is unseen, a step still writes to the pages, and `take_up` releases them. A prompt chunk that
        # samples no token needs no wait: the pages' next owner writes later on the same stream.
        if sequence.pages and not sequence.unseen:
            self.engine.release(sequence)

    def stats(self) -> dict[str, float]:
        return self.acceptance.stats() if self.engine.mesh.leads else {}  # the replica's other ranks count the same

    @property
    def is_waiting(self) -> bool:
        return False

    def close(self) -> None:
        pass
