"""Parse a user's request, and check all rules about it. Errors name the field, the value and the rule.

This is the one place that does so: a line of a batch and the body of an HTTP request become the same dict of fields.
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec

from disagg.front.rules import ALIASES, CHAT_RULES, LEAST_TOKENS, MAX_STOPS, PROMPTS, RULES, is_unicode
from disagg.front.tokenizer import NO_TOKENIZER, PromptEncoder
from disagg.request import Request


class UserRequest(msgspec.Struct, frozen=True):
    """One parsed request, and the fields that only the router needs."""

    id: str | int
    request: Request
    stop: list[str]
    marks: frozenset[int] = frozenset()  # tokens that structure its text: see `TextStream` and `ChatFormat.marks`
    session_id: str | None = None
    limited: bool = True  # has it a max_tokens of its own? Otherwise it may be cut to the KV of the largest replica


@dataclass(frozen=True)
class Served:
    """What the rules must know of the model that is served."""

    encoder: PromptEncoder
    vocab_size: int
    max_model_len: int
    defaults: dict[str, Any] = field(default_factory=dict)  # of `read_defaults`: for fields that a request leaves out


def parse_line(line: str, uid: int, served: Served) -> UserRequest:
    """Parse one JSON object. Raises ValueError."""
    return parse_request(read_object(line), uid, served)


def parse_request(raw: dict[str, Any], uid: int, served: Served) -> UserRequest:
    """Turn a request's fields into a request that the engine can run. Raises ValueError.

    `uid`: stands for an `id` that is not given. A field that is None counts as not given.
    """
    raw = {name: value for name, value in raw.items() if value is not None}
    known = known_fields()
    if unknown := sorted(raw.keys() - known):
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if not is_id(raw.get("id", uid)):
        raise ValueError(f"id is {raw['id']!r:.60}; it must be a string of Unicode or an integer")
    source = _source(raw)
    fields: dict[str, Any] = {name: rule.check(name, raw[name]) for name, rule in RULES.items() if name in raw}
    for alias, name in ALIASES.items():
        if alias in raw:
            RULES[name].check(alias, raw[alias])
            if fields.setdefault(name, raw[alias]) != raw[alias]:
                raise ValueError(f"{alias} is {raw[alias]!r:.60}, but {name} is {fields[name]!r:.60}; give one of them")
    session_id = fields.pop("session_id", None)
    fields = {"seed": secrets.randbits(31)} | served.defaults | fields
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    for name in ("logit_bias", "stop_token_ids"):
        if (largest := max(fields.get(name, ()), default=0)) >= served.vocab_size:
            raise ValueError(f"{name}: token {largest} is not in the model's vocabulary of {served.vocab_size}")
    if fields.get("max_tokens") == 0 and "prompt_logprobs" not in fields:
        name = next(name for name in ("max_tokens", *ALIASES) if name in raw)
        raise ValueError(f"{name} is 0; it must be {LEAST_TOKENS}")
    stop = raw.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop is {raw['stop']!r:.60}; it must be a non-empty string or a list of them")
    if len(stop) > MAX_STOPS:
        raise ValueError(f"stop is {raw['stop']!r:.60}; it must have at most {MAX_STOPS} strings")
    if stop and served.encoder.tokenizer is None:
        raise ValueError(f"stop: {NO_TOKENIZER}, so its answers have no text")
    prompt = _tokens(source, raw, served)
    room = served.max_model_len - len(prompt)
    if "max_tokens" not in fields and room < 1:
        raise ValueError(
            f"prompt ({len(prompt)} tokens) leaves no room for a token: max_model_len is {served.max_model_len}"
        )
    limited = "max_tokens" in fields
    fields.setdefault("max_tokens", room)
    request = Request(uid, prompt, **fields)
    if request.min_tokens > request.max_tokens:
        raise ValueError(f"min_tokens ({request.min_tokens}) is over max_tokens ({request.max_tokens})")
    if request.most_tokens > served.max_model_len:
        raise ValueError(
            f"prompt ({len(prompt)} tokens) + max_tokens ({request.max_tokens}) = {request.most_tokens} is over "
            f"max_model_len ({served.max_model_len})"
        )
    return UserRequest(raw.get("id", uid), request, stop, session_id=session_id, limited=limited)


def parse_prompt(raw: dict[str, Any], served: Served, add_special_tokens: bool = True) -> list[int]:
    """Return the tokens of a request's prompt or messages; other fields are ignored. Raises ValueError.

    `add_special_tokens`: does a `prompt` get those that the tokenizer adds?
    """
    raw = {name: value for name, value in raw.items() if value is not None}
    return _tokens(_source(raw), raw, served, add_special_tokens)


def known_fields() -> frozenset[str]:
    """Return the names of all fields that a request may have."""
    return frozenset({"id", *PROMPTS, *CHAT_RULES, *ALIASES, *RULES, "stop"})


def is_id(value: Any) -> bool:
    return type(value) is int or type(value) is str and is_unicode(value)


def read_object(line: str) -> dict:
    """Parse a JSON object. Bytes that are not UTF-8 are surrogates in `line` (PEP 383). Raises ValueError."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8: byte {ord(line[error.start]) - 0xDC00:#x}, character {error.start + 1}") from None
    try:
        raw = json.loads(line)
    except ValueError as error:  # also integers of thousands of digits
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError(f"a line must be a JSON object, not {type(raw).__name__}")
    return raw


def _source(raw: dict) -> str:
    """Return the name of the field that has the prompt."""
    given = [name for name in PROMPTS if name in raw]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(PROMPTS)} must be given, not {' and '.join(given) or 'none'}")
    return given[0]


def _tokens(name: str, raw: dict, served: Served, add_special_tokens: bool = True) -> list[int]:
    """Return the prompt's tokens. `name`: of the field that has the prompt."""
    if name == "messages":
        prompt = _chat(raw, served.encoder)
    elif beside := [other for other in CHAT_RULES if other in raw]:
        raise ValueError(f"{beside[0]} goes with messages, not with {name}")
    else:
        prompt = _prompt(name, raw[name], served.encoder, served.vocab_size, add_special_tokens)
    if max(prompt) >= served.vocab_size:
        raise ValueError(f"{name}: token {max(prompt)} is not in the model's vocabulary of {served.vocab_size}")
    return prompt


def _prompt(name: str, value: Any, encoder: PromptEncoder, vocab_size: int, add_special_tokens: bool) -> list[int]:
    if name == "prompt":
        if not isinstance(value, str) or not value:
            raise ValueError(f"prompt is {value!r:.60}; it must be a non-empty string")
        return encoder.text(value, add_special_tokens)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {value!r:.60}; it must be a non-empty list")
    for token in value:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"prompt_token_ids holds {token!r:.60}; each must be an integer in 0..{vocab_size - 1}")
    return value


def _chat(raw: dict, encoder: PromptEncoder) -> list[int]:
    messages = raw["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {messages!r:.60}; it must be a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages holds {message!r:.60}; each must be an object with a string role")
        content = message.get("content")
        if not (content is None or isinstance(content, str) or _are_objects(content)):
            raise ValueError(f"messages has the content {content!r:.60}; it must be a string, a list of parts or null")
    beside = {name: rule.check(name, raw[name]) for name, rule in CHAT_RULES.items() if name in raw}
    return encoder.chat(messages, *map(beside.get, CHAT_RULES))


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
