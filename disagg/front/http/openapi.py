"""The description of the API at /openapi.json, made from the rules of the parser and from the structs of answers.

It is OpenAPI 3.2, the first that describes the events of a stream.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from disagg.front.http.bodies import request_bodies
from disagg.front.http.chat import ChatChunk, ChatCompletion
from disagg.front.http.completions import Completion
from disagg.front.http.deployment import Picture
from disagg.front.http.errors import ErrorBody
from disagg.front.http.information import Health, Model, Models, Text, Tokens
from disagg.front.parse import Served

REFERENCE = "#/components/schemas/{name}"
ANSWERS = (Completion, ChatCompletion, ChatChunk, Models, Model, Tokens, Text, Health, Picture, ErrorBody)
# status -> when. A path names those of its own; the others are in EVERYWHERE and WITH_BODY.
ERRORS = {
    400: "a rule is broken; the message has the field, the value and the rule",
    401: "the request has no key of this server",
    404: "there is no such model",
    408: "the headers or the body took too long",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too many requests are waiting for a replica",
    431: "the headers are too large",
    500: "the server failed",
    503: "a role is missing, or a replica was lost and no other one came, or the server ends",
    504: "the request took too long",
}
EVERYWHERE = (408, 431, 500)
WITH_BODY = (400, 404, 413, 415)
GENERATING = (429, 503, 504)
LATER = (429, 503)  # have retry-after


def document(served: Served, names: list[str], has_keys: bool) -> dict[str, Any]:
    """Return the OpenAPI document. `names`: of the model. `has_keys`: must clients have a key?"""
    _, answers = msgspec.json.schema_components(ANSWERS, ref_template=REFERENCE)
    components: dict[str, Any] = {"schemas": answers | request_bodies(served, names)}
    keys = [401] if has_keys else []
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}

    def get(answer: dict[str, Any], *errors: int, open_to_all: bool = False, **more: Any) -> dict[str, Any]:
        security = [{"key": []}] if has_keys and not open_to_all else []
        found = _responses(answer, (*errors, *([] if open_to_all else keys)))
        return {"get": {"responses": found, "security": security, **more}}

    def post(body: str, answer: dict[str, Any], *errors: int) -> dict[str, Any]:
        operation = get(answer, *WITH_BODY, *errors)["get"]
        content = {"application/json": {"schema": _reference(body)}}
        return {"post": operation | {"requestBody": {"required": True, "content": content}}}

    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    request = {"name": "request", "in": "query", "description": "an x-request-id", "schema": {"type": "string"}}
    text = {"schema": {"type": "string"}}
    return {
        "openapi": "3.2.0",
        "info": {"title": "moesaic", "version": "0"},
        "components": components,
        "paths": {
            "/v1/completions": post("CompletionBody", _json(Completion) | _events(Completion), *GENERATING),
            "/v1/chat/completions": post("ChatBody", _json(ChatCompletion) | _events(ChatChunk), *GENERATING),
            "/tokenize": post("TokenizeBody", _json(Tokens)),
            "/detokenize": post("DetokenizeBody", _json(Text)),
            "/v1/models": get(_json(Models)),
            "/v1/models/{name}": get(_json(Model), 404, parameters=[name]),
            "/health": get(_json(Health), 503, open_to_all=True),
            "/deployment": get(_json(Picture), parameters=[request]),
            "/metrics": get({"text/plain": text}),
            "/": get({"text/html": text}, open_to_all=True),
            "/openapi.json": get({"application/json": {"schema": {"type": "object"}}}),
        },
    }


def _responses(answer: dict[str, Any], errors: Iterable[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"200": {"description": "an answer", "content": answer}}
    for status in sorted({*errors, *EVERYWHERE}):
        found[str(status)] = {"description": ERRORS[status], "content": _json(ErrorBody)}
        if status in LATER:
            seconds = {"description": "seconds", "required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}
            found[str(status)]["headers"] = {"retry-after": seconds}
    return found


def _json(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(kind.__name__)}}


def _events(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return a stream of events: pieces of the answer, or an error as the last of them, and [DONE]."""
    piece = {"anyOf": [_reference(kind.__name__), _reference(ErrorBody.__name__)]}
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": piece}
    event = {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, text]}}, "required": ["data"]}
    return {"text/event-stream": {"itemSchema": event}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": REFERENCE.format(name=name)}
