"""Request: one prompt to continue, as the engine sees it. The router sends it to the ranks, which validate it.

`disagg/front/parse.py` has the rules for what a user may write.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FinishReason = Literal["stop", "length"]


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """`uid` is the router's number for the request, also used in the KV handoff. The user's `id` is never sent."""

    uid: int
    prompt: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int = 0
    return_experts: bool = False

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt plus the tokens that may be generated."""
        return len(self.prompt) + self.max_tokens

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError if the prompt has a token outside a vocabulary of `size` tokens."""
        if (largest := max(self.prompt)) >= size:
            raise ValueError(f"token {largest} is not in the vocabulary of {size} of the model that serves it")
