"""The description of the API at /openapi.json, made from the rules of the parser and from the structs of answers."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from disagg.front.http.chat import ChatChunk, ChatCompletion
from disagg.front.http.completions import Completion
from disagg.front.parse import ALIASES, field_rules

REFERENCE = "#/components/schemas/{name}"


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: Error


class Models(msgspec.Struct):
    object: str
    data: list[dict]


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct):
    prompt: str


class TokenizeBody(msgspec.Struct):
    prompt: str | None = None
    messages: list[dict] | None = None
    add_special_tokens: bool | None = None
    model: str | None = None


class DetokenizeBody(msgspec.Struct):
    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None


Field = tuple[str, Any] | tuple[str, Any, Any]
Prompt = str | list[int | str | list[int]]


def document() -> dict:
    """Return the OpenAPI document."""
    completion_body = _body("CompletionBody", ("prompt", Prompt), ("echo", bool | None, None))
    chat_body = _body(
        "ChatBody",
        ("messages", list[dict]),
        ("logprobs", bool | None, None),
        ("top_logprobs", Annotated[int | None, Meta(description="an integer in 0..20")], None),
        ("tool_choice", str | None, None),
    )
    kinds = {kind.__name__: kind for kind in (completion_body, chat_body, TokenizeBody, DetokenizeBody)}
    kinds |= {kind.__name__: kind for kind in (Completion, ChatCompletion, ChatChunk, Models, Tokens, Text, ErrorBody)}
    references, components = msgspec.json.schema_components(list(kinds.values()), ref_template=REFERENCE)
    schemas = dict(zip(kinds, references, strict=True))

    def path(method: str, answer: str, body: str | None = None, stream: str | None = None) -> dict:
        good: dict = {"application/json": {"schema": schemas[answer]}}
        if stream is not None:
            good["text/event-stream"] = {"schema": schemas[stream]}
        error = {"description": "an error", "content": {"application/json": {"schema": schemas["ErrorBody"]}}}
        operation: dict = {"responses": {"200": {"description": "an answer", "content": good}, "default": error}}
        if body is not None:
            content = {"application/json": {"schema": schemas[body]}}
            operation["requestBody"] = {"required": True, "content": content}
        return {method: operation}

    return {
        "openapi": "3.1.0",
        "info": {"title": "moesaic", "version": "0"},
        "components": {"schemas": components},
        "paths": {
            "/v1/completions": path("post", "Completion", "CompletionBody", "Completion"),
            "/v1/chat/completions": path("post", "ChatCompletion", "ChatBody", "ChatChunk"),
            "/v1/models": path("get", "Models"),
            "/tokenize": path("post", "Tokens", "TokenizeBody"),
            "/detokenize": path("post", "Text", "DetokenizeBody"),
        },
    }


def _body(name: str, *own: Field) -> type[msgspec.Struct]:
    """Return a struct of a path's own fields, of those that all share, and of the parser's rules, in this order."""
    shared: list[Field] = [
        ("model", str | None, None),
        ("stream", bool | None, None),
        ("stream_options", StreamOptions | None, None),
        ("stop", str | list[str] | None, None),
    ]
    rules = field_rules()
    for alias, field in ALIASES.items():
        rules[alias] = rules[field]
    taken = {field[0] for field in own}
    engine: list[Field] = [
        (field, Annotated[kind | None, Meta(description=rule)], None)
        for field, (kind, rule) in sorted(rules.items())
        if field not in taken
    ]
    return msgspec.defstruct(name, [*own, *shared, *engine])
