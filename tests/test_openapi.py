"""The description at /openapi.json says what the door does: its limits are those that are checked."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disagg.front.http.openapi import document
from disagg.front.parse import Served
from disagg.front.rules import ALIASES, RULES
from disagg.front.tokenizer import PromptEncoder
from tests.http_door import Door, events, open_door

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {COMPLETIONS: {"prompt": "In"}, CHAT: {"messages": [{"role": "user", "content": "river"}]}}
# Rules in words: these depend on other fields, so what their schema allows may be refused.
WITH_OTHERS = {"max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs"}


@pytest.fixture(scope="module")
def door(tiny: Path) -> Iterator[Door]:
    with open_door(tiny) as one:
        yield one


@pytest.fixture(scope="module")
def described(door: Door) -> dict[str, Any]:
    return json.loads(door.get("/openapi.json")[2])


def resolved(described: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def body_of(described: dict[str, Any], path: str) -> dict[str, Any]:
    return resolved(described, described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


def edges(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Values at the limits of a schema: is each allowed?"""
    if "enum" in schema:
        yield from ((value, True) for value in schema["enum"])
        yield {"odd": "value"}, False
    for one in schema.get("anyOf", [schema]):
        step = 1 if "integer" in one.get("type", "") else 2**-20
        yield from ((one[name] + sign * step, False) for name, sign in (("minimum", -1), ("maximum", 1)) if name in one)
        yield from ((one[name], True) for name in ("minimum", "maximum") if name in one)
        if "exclusiveMinimum" in one:
            yield from ((one["exclusiveMinimum"], False), (one["exclusiveMinimum"] + step, True))
        if "boolean" in one.get("type", ""):
            yield from ((True, True), (False, True), (1, False), ("yes", False))
        if "minLength" in one:
            yield from (("x" * one["minLength"], True), ("", False))
        if "maxLength" in one:
            yield from (("x" * one["maxLength"], True), ("x" * (one["maxLength"] + 1), False))
        if "maxItems" in one:
            item = next(value for value, allowed in edges(one["items"]) if allowed)
            yield from (([item] * one["maxItems"], True), ([item] * (one["maxItems"] + 1), False))
            yield from (([value], allowed) for value, allowed in edges(one["items"]))
        if "maxProperties" in one:
            names = [str(i) for i in range(one["maxProperties"] + 1)]
            yield from ((dict.fromkeys(names[:-1], 0), True), (dict.fromkeys(names, 0), False), ({"x": 0}, False))
            yield from (({"7": value}, allowed) for value, allowed in edges(one["additionalProperties"]))


@pytest.mark.parametrize("path", GOOD)
def test_the_described_limits_are_those_that_are_checked(path: str, door: Door, described: dict[str, Any]) -> None:
    responses, checked = described["paths"][path]["post"]["responses"], set()
    for field, schema in body_of(described, path)["properties"].items():
        for value, allowed in () if field in GOOD[path] else edges(schema):
            status = door.post(path, GOOD[path] | {field: value})[0]
            assert str(status) in responses, (field, value, status)
            if allowed and field not in WITH_OTHERS:
                assert status not in (400, 404), (field, value)
            elif not allowed:
                assert status in (400, 404), (field, value)
                checked.add(field)
    assert checked >= {*RULES, *ALIASES, "stream", "stop", "n", "response_format", "model"}


def test_exactly_one_prompt_is_asked_for(door: Door, described: dict[str, Any]) -> None:
    for path in (COMPLETIONS, "/tokenize"):
        cases = body_of(described, path)["oneOf"]
        names = [case["required"][0] for case in cases]
        good = {"prompt": "In", "prompt_token_ids": [5], "messages": GOOD[CHAT]["messages"]}
        assert door.post(path, {})[0] == 400
        for case, name in zip(cases, names, strict=True):
            assert door.post(path, {name: good[name]} | {other: None for other in names if other != name})[0] == 200
            for other in case["properties"].keys() - {name}:
                assert door.post(path, {name: good[name], other: good.get(other, [{}])})[0] == 400, (name, other)
    assert body_of(described, CHAT)["required"] == ["messages"]


def test_every_path_is_described_and_its_answer_has_the_fields(door: Door, described: dict[str, Any]) -> None:
    for path, operations in described["paths"].items():
        (method,) = operations
        path = path.replace("{name}", "tiny")
        body = {"tokens": [5]} if path == "/detokenize" else GOOD.get(path, {"prompt": "In"})
        status, headers, answer = door.get(path) if method == "get" else door.post(path, body)
        (content,) = (
            schema["schema"]
            for media, schema in operations[method]["responses"]["200"]["content"].items()
            if media == headers["content-type"].partition(";")[0]
        )
        assert status == 200
        if "$ref" in content:
            schema, found = resolved(described, content), json.loads(answer)
            assert set(schema["required"]) <= found.keys() <= schema["properties"].keys(), path
    app = Path("disagg/front/http/app.py").read_text()
    routes = [re.sub(":path", "", route) for route in re.findall(r'Route\("([^"]+)"', app)]
    assert sorted(routes) == sorted(described["paths"])


def test_the_events_of_a_stream_are_described(door: Door, described: dict[str, Any]) -> None:
    for path, body in GOOD.items():
        content = described["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        done, text = content["itemSchema"]["properties"]["data"]["anyOf"]
        schema = resolved(described, text["contentSchema"]["anyOf"][0])
        answer = door.post(path, body | {"stream": True})[2]
        for event in events(answer):
            assert set(schema["required"]) <= event.keys() <= schema["properties"].keys()
        assert answer.endswith(f"data: {done['const']}\n\n".encode())


def test_a_key_is_described_where_it_is_needed() -> None:
    with_keys = document(Served(PromptEncoder(None, None), 10, 10), ["m"], True)
    for path, operations in with_keys["paths"].items():
        (operation,) = operations.values()
        needed = path not in ("/", "/health")
        assert ("401" in operation["responses"], bool(operation["security"])) == (needed, needed)
