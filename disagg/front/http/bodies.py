"""The JSON Schemas of requests' bodies, made from the rules that check them. For /openapi.json.

A schema cannot say every rule: IN_WORDS has the others. It also takes 1.0 for an integer, which the parser does not.
"""

from typing import Any

import msgspec

from disagg.front.http.fields import MOST_PROMPTS, MOST_TOP_LOGPROBS, REFUSED
from disagg.front.http.information import MOST_TOKENS
from disagg.front.parse import Served
from disagg.front.rules import ALIASES, CHAT_RULES, PROMPTS, RULES, Stop, Text

IN_WORDS = (
    "Beyond this schema: prompt and max_tokens must fit into max_model_len together. min_tokens is at most max_tokens. "
    "max_tokens is 0 only with prompt_logprobs, or with echo. If both are given, max_completion_tokens equals "
    "max_tokens. prompt_logprobs does not go with echo and logprobs together. top_logprobs over 0 needs logprobs. "
    "Tokens of logit_bias are in the vocabulary, each once. The chat template may refuse messages, and parts that are "
    "no texts. Integers are written without a fraction."
)
Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
FLAG: Schema = {"type": ["boolean", "null"]}
TEXT = msgspec.json.schema(Text)
TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
STREAM_OPTIONS: Schema = {"type": ["object", "null"], "properties": {"include_usage": FLAG}}


def request_bodies(served: Served, names: list[str]) -> dict[str, Schema]:
    """Return the schemas of all bodies by name. `names`: of the model."""
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1}
    model = {"model": {"enum": [*names, "", None]}}
    generation = _generation(served, token) | model
    beside = {name: _described(rule.kind, rule.words) for name, rule in CHAT_RULES.items()}
    several = {"type": "array", "items": {"anyOf": [TEXT, tokens]}, "minItems": 1, "maxItems": MOST_PROMPTS}
    completion = generation | {
        "prompt": {"anyOf": [TEXT, tokens, several, NULL]},
        "prompt_token_ids": {"anyOf": [tokens, NULL]},
        "echo": FLAG,
    }
    chat = generation | {
        "messages": _messages(TEXT_PART),
        **beside,
        "logprobs": FLAG,
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_TOP_LOGPROBS},
        "tool_choice": {"enum": ["auto", "none", None]},
        "echo": {"enum": [False, None]},
    }
    tokenize = {
        "prompt": {"anyOf": [TEXT, NULL]},
        "prompt_token_ids": {"anyOf": [tokens, NULL]},
        "messages": {"anyOf": [_messages({"type": "object"}), NULL]},
        **beside,
        "add_special_tokens": FLAG,
        **model,
    }
    detokenize = {"tokens": {"type": "array", "items": token, "maxItems": MOST_TOKENS}, **model}
    no_chat = {name: tuple(CHAT_RULES) for name in PROMPTS[:2]}
    return {
        "CompletionBody": _body(completion, oneOf=_exactly_one(PROMPTS[:2]), description=IN_WORDS),
        "ChatBody": _body(chat, required=["messages"], description=IN_WORDS),
        "TokenizeBody": _body(tokenize, oneOf=_exactly_one(PROMPTS, no_chat), description=IN_WORDS),
        "DetokenizeBody": _body(detokenize, required=["tokens"]),
    }


def _generation(served: Served, token: Schema) -> dict[str, Schema]:
    """Return the fields of every request that generates."""
    length = {"maximum": served.max_model_len}
    limits = dict.fromkeys(("max_tokens", "min_tokens"), length) | {"stop_token_ids": {"items": token}}
    engine = {name: _described(rule.kind, rule.words, limits.get(name)) for name, rule in RULES.items()}
    aliases = {alias: engine[name] for alias, name in ALIASES.items()}
    refused = {name: {"enum": [*neutral, None]} for name, neutral in REFUSED.items()}
    stop = {"anyOf": [*msgspec.json.schema(Stop)["anyOf"], NULL]}
    return {"stream": FLAG, "stream_options": STREAM_OPTIONS, "stop": stop} | engine | aliases | refused


def _described(kind: Any, words: str, limits: Schema | None = None) -> Schema:
    """Return the schema of a field that may be null. `limits`: those of the served model."""
    return {"description": words, "anyOf": [msgspec.json.schema(kind) | (limits or {}), NULL]}


def _messages(part: Schema) -> Schema:
    """Return the schema of messages, each with a text, parts or nothing. Other fields go to the chat template."""
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}, NULL]}
    message = {"type": "object", "properties": {"role": {"type": "string"}, "content": content}, "required": ["role"]}
    return {"type": "array", "items": message, "minItems": 1}


def _exactly_one(names: tuple[str, ...], never: dict[str, tuple[str, ...]] | None = None) -> list[Schema]:
    """Say that one of these fields is given and not null. `never`: fields that do not go with it."""
    cases = []
    for name in names:
        absent = [*(other for other in names if other != name), *(never or {}).get(name, ())]
        cases.append({"required": [name], "properties": {name: {"not": NULL}} | dict.fromkeys(absent, NULL)})
    return cases


def _body(properties: dict[str, Schema], **more: Any) -> Schema:
    return {"type": "object", "properties": properties, **more}
