"""Tracked: what the router knows of a request that has no answer yet."""

from dataclasses import dataclass, field

import msgspec

from disagg.front.client import Client
from disagg.front.expert_rows import NO_EXPERTS, ExpertRows
from disagg.front.fleet import Replica
from disagg.front.parse import UserRequest
from disagg.front.text_stream import TextStream
from disagg.request import Request


@dataclass(eq=False)
class Tracked:
    """A request without its answer yet. Times are time.monotonic()."""

    user: UserRequest
    client: Client
    stream: TextStream
    submitted: float
    uid: int = -1  # of its current attempt
    experts: ExpertRows = field(default_factory=lambda: ExpertRows(NO_EXPERTS, 0))
    logprobs: list = field(default_factory=list)
    first: float | None = None  # when the first token arrived
    latest: float | None = None  # when the latest token arrived
    attempts: int = 0
    decode: Replica | None = None
    prefill: Replica | None = None  # until it has made a token
    begun: bool = False  # at its current replica
    suspects: dict[str, float] = field(default_factory=dict)  # job where it failed -> until when it avoids that job

    def request(self, uid: int) -> Request:
        """Return the rest of the request: the tokens so far join the prompt."""
        request, done = self.user.request, self.stream.token_ids
        max_tokens = request.max_tokens - len(done)
        return msgspec.structs.replace(request, uid=uid, prompt=request.prompt + done, max_tokens=max_tokens)

    def push(self, token: int, logprobs: list) -> bool:
        """Add a token, and show what may be shown now. Returns True if a stop string is complete."""
        shown = self.stream.shown
        stopped = self.stream.push(token)
        self.client.show(self.stream.text[shown : self.stream.shown], [token], logprobs)
        return stopped

    def close(self) -> None:
        """End the text, and show the rest of it."""
        shown = self.stream.shown
        self.stream.close()
        if self.stream.shown > shown:
            self.client.show(self.stream.text[shown:], [], [])
