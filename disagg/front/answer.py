"""Answer: one line of output."""

from dataclasses import dataclass
from typing import Any

INTERRUPTED = "interrupted"  # the error of a request that Ctrl-C ended
# Left out of the line if they are None.
OPTIONAL = (
    "accepted_tokens",
    "verified_tokens",
    "logprobs",
    "prompt_token_ids",
    "prompt_logprobs",
    "experts",
    "error",
)
UNWRITTEN = ("refused",)  # never part of the line


@dataclass(frozen=True)
class Answer:
    """One line of output."""

    id: Any
    text: str | None  # None if the model has no tokenizer
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    latency_s: float | None
    cached_tokens: int = 0  # of the prompt: their KV was there
    accepted_tokens: int | None = None  # generated beyond one per step, if the model drafts
    verified_tokens: int | None = None  # drafts that could have been such tokens, right or wrong
    logprobs: list | None = None
    prompt_token_ids: list[int] | None = None  # beside prompt_logprobs: which of its tokens are the prompt's own
    prompt_logprobs: list | None = None  # as `PromptRows.encode` makes it
    experts: dict | None = None  # as `ExpertRows.encode` makes it
    error: str | None = None
    refused: bool = False  # is the error the request's own? Then no replica of this kind can serve it.

    def as_dict(self) -> dict:
        """Return the fields of the line."""
        fields = {name: value for name, value in vars(self).items() if name not in UNWRITTEN}
        return {name: value for name, value in fields.items() if name not in OPTIONAL or value is not None}


def refusal(id: Any, error: str) -> Answer:
    """Return the answer to a line that never became a request."""
    return Answer(id, "", [], "error", 0, 0, None, None, error=error)
