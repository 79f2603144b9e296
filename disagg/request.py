"""Request: what the engine is asked for. It travels between the router and the ranks, and is checked when it arrives.

`disagg/front/parse.py` has the rules that a user's request is held to.
"""

from typing import Annotated

import msgspec
from msgspec import Meta


class Request(msgspec.Struct, frozen=True):
    """`uid` is the router's own number for it (and its room's in the KV handoff); the user's `id` never travels."""

    uid: int
    prompt: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int = 0

    @property
    def most_tokens(self) -> int:
        """Its prompt's and all that it may generate."""
        return len(self.prompt) + self.max_tokens

    def check_vocabulary(self, size: int) -> None:
        """ValueError if the prompt has a token that a model with so many has not."""
        if (most := max(self.prompt)) >= size:
            raise ValueError(f"token {most} is not in the vocabulary of {size} of the model that serves it")
