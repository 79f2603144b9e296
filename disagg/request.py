"""Request: one prompt to continue, as the engine sees it. The router sends it to the ranks, which validate it.

`disagg/front/parse.py` has the rules for what a user may write.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from model.sampling import MAX_LOGPROBS

FinishReason = Literal["stop", "length"]


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """`uid` is the router's number for the request, also used in the KV handoff. The user's `id` is never sent."""

    uid: int
    prompt: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0)] = 16  # 0, which only prompt_logprobs allows: the answer has no token
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int = 0
    return_experts: bool = False
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None  # likeliest tokens per prompt token

    def __post_init__(self) -> None:
        if self.max_tokens < 1 and self.prompt_logprobs is None:
            raise ValueError(f"max_tokens is {self.max_tokens}; without prompt_logprobs it must be at least 1")

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt plus the tokens that may be generated."""
        return len(self.prompt) + self.max_tokens

    @property
    def most_fed(self) -> int:
        """Tokens that may run through the model: the last generated one does not."""
        return len(self.prompt) + max(self.max_tokens, 1) - 1

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError if the prompt has a token outside a vocabulary of `size` tokens."""
        if (largest := max(self.prompt)) >= size:
            raise ValueError(f"token {largest} is not in the vocabulary of {size} of the model that serves it")
