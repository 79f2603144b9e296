"""The rules of a request's fields: one table, for the parser and for the description of the API at /openapi.json.

A rule is a type with limits, and the same in words. What no such type can say is a test beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from disagg.request import MOST_ENTRIES, MOST_SALT
from model.prompt_row import MAX_LOGPROBS

PROMPTS = ("prompt", "prompt_token_ids", "messages")
MAX_STOPS = 64  # stop strings; each of them is searched at each token
LEAST_TOKENS = "an integer of at least 1, or 0 with prompt_logprobs"
ALIASES = {"max_completion_tokens": "max_tokens"}  # other name -> name


@dataclass(frozen=True)
class Rule:
    kind: Any  # a type that msgspec can check, with its limits
    words: str
    also: Callable[[Any], bool] = lambda value: True  # what the type cannot say

    def check(self, name: str, value: Any) -> Any:
        """Return the value, an integer as a float where the rule asks for a number. Raises ValueError."""
        try:
            found = msgspec.convert(value, self.kind)
        except msgspec.ValidationError:
            found = None
        if found is None or not self.also(found):
            raise ValueError(f"{name} is {value!r:.60}; it must be {self.words}")
        return found


def is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which cannot be printed."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _name_tokens(biases: dict[str, float]) -> bool:
    """Are the names different tokens? JSON has only strings as names, so a token is its digits."""
    return all(name.isdecimal() for name in biases) and len({int(name) for name in biases}) == len(biases)


Token = Annotated[int, Meta(ge=0)]
Digits = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Top = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Text = Annotated[str, Meta(min_length=1)]
Stop = Text | Annotated[list[Text], Meta(max_length=MAX_STOPS)]
OF_OTHER_FIELDS = ("messages", "tools", "documents")  # variables that the chat template gets from other fields
TemplateValues = Annotated[dict, Meta(extra_json_schema={"propertyNames": {"not": {"enum": [*OF_OTHER_FIELDS]}}})]

RULES = {
    "max_tokens": Rule(Annotated[int, Meta(ge=0)], LEAST_TOKENS),
    "temperature": Rule(Annotated[float, Meta(ge=0, le=1000)], "a number in 0..1000 (0 = greedy)"),
    "top_p": Rule(Annotated[float, Meta(gt=0, le=1)], "a number in (0, 1]"),
    "top_k": Rule(Annotated[int, Meta(ge=0, le=2**31 - 1)], "an integer of at least 0 (0 = off)"),
    "min_p": Rule(Annotated[float, Meta(ge=0, le=1)], "a number in 0..1 (0 = off)"),
    "presence_penalty": Rule(Penalty, "a number in -2..2 (0 = off)"),
    "frequency_penalty": Rule(Penalty, "a number in -2..2 (0 = off)"),
    "repetition_penalty": Rule(Annotated[float, Meta(ge=0.01, le=100)], "a number in 0.01..100 (1 = off)"),
    "logit_bias": Rule(
        Annotated[dict[Digits, Bias], Meta(max_length=MOST_ENTRIES)],
        f"an object of at most {MOST_ENTRIES} tokens, each with a number in -100..100",
        _name_tokens,
    ),
    "min_tokens": Rule(Annotated[int, Meta(ge=0)], "an integer of at least 0"),
    "stop_token_ids": Rule(
        Annotated[list[Token], Meta(max_length=MOST_ENTRIES)], f"a list of at most {MOST_ENTRIES} tokens"
    ),
    "seed": Rule(Annotated[int, Meta(ge=0, le=2**63 - 1)], "an integer in 0..2**63 - 1"),
    "ignore_eos": Rule(bool, "true or false"),
    "return_experts": Rule(bool, "true or false"),
    "logprobs": Rule(Top, f"an integer in 0..{MAX_LOGPROBS}"),
    "session_id": Rule(
        Annotated[str, Meta(min_length=1, max_length=256)], "a string of Unicode with 1 to 256 characters", is_unicode
    ),
    "cache_salt": Rule(
        Annotated[str, Meta(min_length=1, max_length=MOST_SALT)],
        f"a string of Unicode with 1 to {MOST_SALT} characters",
        is_unicode,
    ),
    "prompt_logprobs": Rule(Top, f"an integer in 0..{MAX_LOGPROBS}"),
}
CHAT_RULES = {  # of fields beside messages
    "tools": Rule(list[dict], "a list of objects"),
    "documents": Rule(list[dict], "a list of objects"),
    "chat_template_kwargs": Rule(
        TemplateValues,
        "an object without messages, tools and documents",
        lambda value: value.keys().isdisjoint(OF_OTHER_FIELDS),
    ),
}
