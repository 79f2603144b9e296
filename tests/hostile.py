"""Hostile bodies for the HTTP door. `python -m tests.hostile 2000` sends that many to a door with the shipped model."""

import json
import sys
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.front.http.fields import REFUSED
from disagg.front.parse import known_fields
from tests.http_door import Door, error_of, open_door

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
OWN = ("prompt", "messages", "model", "stream", "stream_options", "echo", "top_logprobs", "tool_choice", "tokens")
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from((-1, 0, 1))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("user", "system", "assistant", "tool", "odd")), "content": VALUES},
        optional={"tool_calls": VALUES, "name": VALUES},
    ),
    max_size=3,
)
LIKELY = {  # values near those that are right, so that a body passes the first rules
    "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 4097), max_size=5) | st.lists(st.text(max_size=3)),
    "messages": MESSAGES,
    "max_tokens": st.integers(-1, 5),
    "temperature": st.floats(-1, 2),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "tokens": st.lists(st.integers(-1, 4097), max_size=5),
}
NAMES = sorted({*known_fields(), *REFUSED, *OWN} - LIKELY.keys())
OBJECTS = st.builds(
    lambda likely, odd: {**likely, **odd},
    st.fixed_dictionaries({}, optional=LIKELY),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), VALUES, max_size=3),
)


def mutate(body: bytes, at: int, what: bytes, cut: bool) -> bytes:
    """Replace some bytes, or cut the body off there."""
    at %= len(body) + 1
    return body[:at] if cut else body[:at] + what + body[at + len(what) :]


def nest(depth: int, kind: int) -> bytes:
    """Nest lists or objects as the value of a field."""
    opened, closed = ((b"[", b"]"), (b'{"a":', b"}"))[kind]
    return b'{"prompt": "x", "messages": ' + opened * depth + b"1" + closed * depth + b"}"


ENCODED = OBJECTS.map(lambda value: json.dumps(value).encode())
BODIES = (
    ENCODED
    | st.builds(mutate, ENCODED, st.integers(0, 1000), st.binary(min_size=1, max_size=3), st.booleans())
    | st.builds(nest, st.sampled_from((10, 1000, 10_000)), st.integers(0, 1))
    | st.binary(max_size=40)
)


def check(door: Door, path: str, body: bytes) -> int:
    """Send a body. It must be answered, or refused with a reason. Returns the status."""
    status, headers, answer = door.post(path, body)
    assert status == 200 or 400 <= status < 500, (path, body, status, answer)
    if status != 200:
        error_of(answer)
    elif headers["content-type"].startswith("text/event-stream"):
        assert answer.endswith(b"data: [DONE]\n\n") and b'"error"' not in answer
    else:
        json.loads(answer)
    return status


def attack(door: Door, examples: int) -> dict[int, int]:
    """Send so many bodies, and a good one at the end. Returns the number of answers by status."""
    seen: dict[int, int] = {}

    @given(st.sampled_from(PATHS), BODIES)
    @settings(deadline=None, derandomize=True, max_examples=examples, database=None)
    def send(path: str, body: Any) -> None:
        status = check(door, path, body)
        seen[status] = seen.get(status, 0) + 1

    send()
    assert door.post("/v1/completions", {"prompt": "In"})[0] == 200
    return seen


if __name__ == "__main__":
    with open_door(Path("model/tiny")) as the_door:
        print(attack(the_door, int(sys.argv[1])))
