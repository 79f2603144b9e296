"""OpenAI's fields to those of a line of a batch, which `disagg/front/parse.py` checks.

Most fields have the same name and pass as they are. Fields that nobody here knows are ignored, because clients send
many. Those that would change the answer are refused by name instead: see REFUSED.
"""

from dataclasses import dataclass
from typing import Any

from disagg.front.http.errors import HttpError
from disagg.front.parse import known_fields
from disagg.front.rules import CHAT_RULES

MOST_PROMPTS = 1_000  # of one request
MOST_TOP_LOGPROBS = 20
OWN = {"id", "prompt", "prompt_token_ids", "messages", "logprobs"}  # not passed as they are
# name -> the values with which it changes nothing; all others are refused
REFUSED: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "grammar": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "logits_processors": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "lora_path": (),
    "lora_request": (),
}


@dataclass(frozen=True)
class Asked:
    """What a body asks for. `lines`: the fields of each prompt, as a line of a batch has them."""

    lines: list[dict[str, Any]]
    stream: bool
    include_usage: bool
    top_logprobs: int | None  # alternatives per token; None: no log probabilities
    echo: bool = False


def completion(body: dict[str, Any]) -> Asked:
    """Read the body of /v1/completions. Raises HttpError or ValueError."""
    common, echo = _common(body, {*CHAT_RULES, "messages"}), _flag(body, "echo")
    top = body.get("logprobs")
    if top is not None:
        _check_top("logprobs", top)
        common["logprobs"] = max(top, 1)
    if echo and top is not None:
        if "prompt_logprobs" in common:
            raise ValueError("prompt_logprobs is for answers without echo and logprobs, which have them")
        common["prompt_logprobs"] = max(top, 1)
    elif echo and _is_zero(body.get("max_tokens")):
        common.setdefault("prompt_logprobs", 0)  # with them a request need not generate
    lines = [common | prompt for prompt in _prompts(body)]
    return Asked(lines, *_stream(body), top, echo)


def chat(body: dict[str, Any]) -> Asked:
    """Read the body of /v1/chat/completions. Raises HttpError or ValueError."""
    common, top = _common(body, set()), body.get("top_logprobs")
    if top is not None:
        _check_top("top_logprobs", top)
    if _flag(body, "logprobs"):
        top = top or 0
        common["logprobs"] = max(top, 1)
    elif top:
        raise ValueError(f"top_logprobs is {top}; it needs logprobs: true")
    else:
        top = None
    if _flag(body, "echo"):
        raise ValueError("echo is True; it is for /v1/completions")
    match body.get("tool_choice"):
        case None | "auto":
            pass
        case "none":
            common.pop("tools", None)
        case other:
            raise ValueError(f"tool_choice is {other!r:.60}; it must be 'auto' or 'none'")
    messages = body.get("messages")
    if messages is None:
        raise ValueError("messages is None; it must be a non-empty list")
    _check_parts(messages)
    return Asked([common | {"messages": messages}], *_stream(body), top)


def check_body_model(body: dict[str, Any], names: list[str]) -> None:
    """Raise HttpError if the body names another model than the served one. It may name none."""
    if (model := body.get("model")) not in (None, ""):
        check_model(model, names)


def check_model(model: Any, names: list[str]) -> None:
    """Raise HttpError if this is not a name of the served model."""
    if model not in names:
        raise HttpError(404, f"model is {model!r:.60}; it must be {names[0]!r}", "model", "model_not_found")


def _common(body: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
    """Return the fields that pass as they are, without those that are `ignored`."""
    known = known_fields()
    for name, neutral in REFUSED.items():
        value = body.get(name)
        if value is None or any(_same(value, one) for one in neutral):
            continue
        rule = f"it must be {' or '.join(map(repr, neutral))}" if neutral else "it is not supported, leave it out"
        raise ValueError(f"{name} is {value!r:.60}; {rule}")
    return {name: body[name] for name in body.keys() & known - OWN - ignored if body[name] is not None}


def _same(value: Any, neutral: Any) -> bool:
    """Are they equal, and is neither of them a truth value in place of a number?"""
    return value == neutral and (type(value) is bool) == (type(neutral) is bool)


def _is_zero(value: Any) -> bool:
    return type(value) is int and value == 0


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{name} is {value!r:.60}; it must be true or false")
    return bool(value)


def _check_top(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= MOST_TOP_LOGPROBS:
        raise ValueError(f"{name} is {value!r:.60}; it must be an integer in 0..{MOST_TOP_LOGPROBS}")


def _stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether to stream, and whether the stream ends with the usage."""
    stream, options = _flag(body, "stream"), body.get("stream_options")
    if options is None:
        return stream, False
    if not isinstance(options, dict):
        raise ValueError(f"stream_options is {options!r:.60}; it must be an object")
    return stream, _flag(options, "include_usage")


def _prompts(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one field per prompt: a text, or token ids."""
    prompt, ids = body.get("prompt"), body.get("prompt_token_ids")
    if (prompt is None) == (ids is None):
        raise ValueError("prompt or prompt_token_ids must be given, and not both")
    if ids is not None:
        return [{"prompt_token_ids": ids}]
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt is {prompt!r:.60}; it must be a text, token ids, or a non-empty list of these")
    if all(type(token) is int for token in prompt):
        return [{"prompt_token_ids": prompt}]
    if len(prompt) > MOST_PROMPTS:
        raise ValueError(f"prompt has {len(prompt)} prompts; it must have at most {MOST_PROMPTS}")
    for one in prompt:
        if not isinstance(one, str | list):
            raise ValueError(f"prompt holds {one!r:.60}; each must be a text or a list of token ids")
    return [{"prompt" if isinstance(one, str) else "prompt_token_ids": one} for one in prompt]


def _check_parts(messages: Any) -> None:
    """Raise ValueError for a part of a content that is no text. A template might leave it out in silence."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"messages has a part of type {kind!r:.60}; each part must be a text")
