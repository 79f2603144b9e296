"""Answer: one line of output."""

from dataclasses import dataclass
from typing import Any

INTERRUPTED = "interrupted"  # the error of a request that Ctrl-C ended


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
    logprobs: list | None = None
    error: str | None = None

    def as_dict(self) -> dict:
        optional = {k: v for k in ("logprobs", "error") if (v := getattr(self, k)) is not None}
        return {k: v for k, v in vars(self).items() if k not in ("logprobs", "error")} | optional


def refusal(id: Any, error: str) -> Answer:
    """Return the answer to a line that never became a request."""
    return Answer(id, "", [], "error", 0, 0, None, None, error=error)
