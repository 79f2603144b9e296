"""Tracked: what the router knows of a request that has no answer yet."""

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tokenizers import Tokenizer

from disagg.control.messages import Parts, Update
from disagg.front.answer import Answer
from disagg.front.client import Client
from disagg.front.expert_rows import ExpertRows, RowShape
from disagg.front.fleet import Replica
from disagg.front.parse import UserRequest
from disagg.front.prompt_rows import PromptRows
from disagg.front.text_stream import TextStream
from disagg.request import Request

STATES = ("waiting", "queued", "prefill", "decode")


@dataclass(eq=False, slots=True)
class Tracked:
    """A request without its answer yet. Times are time.monotonic()."""

    user: UserRequest
    client: Client
    stream: TextStream
    submitted: float
    experts: ExpertRows
    prompt_rows: PromptRows
    number: int  # in the order of submission
    uid: int = -1  # of its current attempt
    logprobs: list = field(default_factory=list)
    first: float | None = None  # when the first token arrived
    latest: float | None = None  # when the latest token arrived
    parts: Parts | None = None  # of the time to first token, if the prompt was computed elsewhere
    cached_tokens: int = 0  # of the prompt
    accepted_tokens: int | None = None  # beyond one per step, of all attempts; None: no replica of its own drafts
    verified_tokens: int = 0  # drafts, of all attempts
    attempts: int = 0
    decode: Replica | None = None
    prefill: Replica | None = None  # until it has made a token
    begun: bool = False  # at its current replica
    path: tuple[str, str] = ("", "")  # ids of the latest attempt's prefill and decode replica
    suspects: dict[str, float] = field(default_factory=dict)  # job where it failed -> until when it avoids that job
    began_with: int = 0  # tokens that it had when its current attempt began
    deaths: int = 0  # jobs that have died as they began it, since it last went on
    blamed: bool = False  # has its latest attempt been counted among them?
    held_since: float = 0.0  # when `Trials` first kept it from all replicas, 0.0: not yet

    @classmethod
    def new(
        cls,
        user: UserRequest,
        client: Client,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        expert_shape: RowShape,
        number: int,
    ) -> "Tracked":
        """Make one that is submitted now. The model's tokenizer, vocabulary and experts: as in `Router`."""
        request = user.request
        return cls(
            user,
            client,
            TextStream(tokenizer, user.stop, user.marks, request.min_tokens),
            time.monotonic(),
            ExpertRows(expert_shape, request.most_fed if request.return_experts else 0),
            PromptRows(request, vocab_size),
            number,
        )

    @property
    def state(self) -> str:
        """Return how far it is, one of STATES.

        It waits here, or is queued on a decode replica that has no pages for it yet. Then its prompt is computed and
        transferred, until this attempt's first token arrives. A unified replica does not say when it begins.
        """
        if self.decode is None:
            return "waiting"
        begun = self.begun or self.prefill is self.decode
        return "decode" if self.prefill is None else "prefill" if begun else "queued"

    @property
    def is_fresh(self) -> bool:
        """Has its current attempt not gone on yet?

        The first token is prefill's. The second one shows that decode serves it.
        """
        return len(self.stream.token_ids) < self.began_with + 2

    def avoids(self, job: str) -> bool:
        """Did it fail there a moment ago?"""
        return self.suspects.get(job, 0.0) > time.monotonic()

    def request(self, uid: int, kv_tokens: int) -> Request:
        """Return the rest of the request: the tokens so far join the prompt.

        `kv_tokens`: of the largest replica. A request without a limit of its own is cut to them.

        The log probabilities of the user's prompt came before the first token, and are not computed again after it.
        """
        request, done = self.user.request, self.stream.token_ids
        max_tokens, room = request.max_tokens - len(done), kv_tokens - len(request.prompt) - len(done)
        if not self.user.limited and 0 < room < max_tokens:
            max_tokens = room
        return msgspec.structs.replace(
            request,
            uid=uid,
            prompt=request.prompt + done,
            max_tokens=max_tokens,
            resumed=len(done),
            prompt_logprobs=None if done else request.prompt_logprobs,
        )

    def restart(self) -> None:
        """Forget what the next attempt sends again."""
        self.began_with, self.blamed = len(self.stream.token_ids), False
        self.experts.clear()
        if not self.stream.token_ids:
            self.prompt_rows.clear()

    def take(self, update: Update) -> None:
        """Keep what comes beside tokens. Raises ValueError for rows that the request must not get now."""
        if not self.stream.token_ids:
            self.cached_tokens = min(update.cached_tokens, len(self.user.request.prompt))
        self.accept(min(update.accepted, len(update.tokens)))
        self.verified_tokens += update.verified
        if update.experts:
            self.experts.add(update.experts)
        if update.prompt_rows:
            self.prompt_rows.add(update.prompt_rows)

    def accept(self, tokens: int) -> None:
        """Count tokens beyond one per step. Below 0: so many of those counted came behind the end."""
        if self.accepted_tokens is not None:
            self.accepted_tokens = max(0, self.accepted_tokens + tokens)

    def rows(self) -> dict[str, Any]:
        """Return the answer's fields that the rows make. Raises ValueError if they are not those of this answer."""
        request, found = self.user.request, {}
        if request.return_experts:  # of all tokens but the last generated one, which is not fed back
            found["experts"] = self.experts.encode(len(request.prompt) + max(len(self.stream.token_ids), 1) - 1)
        if request.prompt_logprobs is not None:
            found["prompt_token_ids"] = request.prompt
            found["prompt_logprobs"] = self.prompt_rows.encode()
        return found

    def push(self, token: int, logprobs: list) -> bool:
        """Add a token, and show what may be shown now. Returns True if a stop string is complete."""
        stream = self.stream
        self.logprobs += logprobs
        shown = stream.shown
        stopped = stream.push(token)
        self.client.show(stream.text[shown : stream.shown], [token], logprobs)
        return stopped

    def answer(self, reason: str, error: str | None, refused: bool, has_text: bool, rows: dict[str, Any]) -> Answer:
        """Return its answer. `has_text`: does the model have a tokenizer? `rows`: as from `rows`."""
        request, stream, now = self.user.request, self.stream, time.monotonic()
        return Answer(
            id=self.user.id,
            text=stream.text if has_text else None,
            token_ids=stream.token_ids,
            finish_reason=reason,
            prompt_tokens=len(request.prompt),
            completion_tokens=len(stream.token_ids),
            ttft_s=None if self.first is None else round(self.first - self.submitted, 4),
            latency_s=round(now - self.submitted, 4),
            cached_tokens=self.cached_tokens,
            accepted_tokens=self.accepted_tokens,
            verified_tokens=None if self.accepted_tokens is None else self.verified_tokens,
            logprobs=self.logprobs if request.logprobs else None,
            error=error,
            refused=refused,
            **rows,
        )

    def close(self) -> None:
        """End the text, and show the rest of it."""
        shown = self.stream.shown
        self.stream.close()
        if self.stream.shown > shown:
            self.client.show(self.stream.text[shown:], [], [])
