"""The HTTP door over real sockets: who is served, who is refused and why, and what is left of a client that leaves."""

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg.control.messages import Submit, Update, Updates
from disagg.front.http import body as body_module
from disagg.front.http import fields, protocol
from disagg.front.http.exchange import Exchange
from disagg.front.http.limits import Keys, Timeouts
from disagg.front.http.server import bind, model_names
from tests.conftest import eventually
from tests.http_door import TOKEN, Door, error_of, events, first_token, never, open_door, read_answer, request_bytes

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"prompt": "In the beginning"}
MESSAGES = {"messages": [{"role": "user", "content": "river"}]}


@pytest.fixture(scope="module")
def door(tiny: Path) -> Iterator[Door]:
    with open_door(tiny) as one:
        yield one


def refused(door: Door, path: str, body: dict | bytes, status: int = 400, **headers: str) -> dict:
    got, _, answer = door.post(path, body, **headers)
    assert got == status, answer
    return error_of(answer)


# ---- what is refused


BAD = {
    "temperature": (COMPLETIONS, {"temperature": -1}, "temperature is -1; it must be a number in 0..1000"),
    "unparsable seed": (COMPLETIONS, {"seed": 1e30}, "seed is 1e+30; it must be an integer in 0..2**63 - 1"),
    "n": (COMPLETIONS, {"n": 2}, "n is 2; it must be 1"),
    "n as a truth value": (CHAT, {"n": True}, "n is True; it must be 1"),
    "best_of": (COMPLETIONS, {"best_of": 3}, "best_of is 3; it must be 1"),
    "stop": (CHAT, {"stop": [""]}, "stop is ['']; it must be a non-empty string or a list of them"),
    "stream": (CHAT, {"stream": "yes"}, "stream is 'yes'; it must be true or false"),
    "stream_options": (CHAT, {"stream": True, "stream_options": 1}, "stream_options is 1; it must be an object"),
    "top_logprobs": (CHAT, {"top_logprobs": 3}, "top_logprobs is 3; it needs logprobs: true"),
    "top_logprobs as a text": (CHAT, {"top_logprobs": ""}, "top_logprobs is ''; it must be an integer in 0..20"),
    "logprobs of a chat": (CHAT, {"logprobs": 3}, "logprobs is 3; it must be true or false"),
    "logprobs": (COMPLETIONS, {"logprobs": 21}, "logprobs is 21; it must be an integer in 0..20"),
    "tool_choice": (CHAT, {"tool_choice": "required"}, "tool_choice is 'required'; it must be 'auto' or 'none'"),
    "response_format": (
        CHAT,
        {"response_format": {"type": "json_object"}},
        "response_format is {'type': 'json_object'}; it must be {'type': 'text'}",
    ),
    "max_tokens": (COMPLETIONS, {"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
    "length": (COMPLETIONS, {"max_tokens": 2048}, "is over max_model_len (2048)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_field_is_named_with_its_value_and_the_rule(case: str, door: Door) -> None:
    path, more, message = BAD[case]
    error = refused(door, path, (PROMPT if path == COMPLETIONS else MESSAGES) | more)
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == ("prompt" if case == "length" else list(more)[-1])


@pytest.mark.parametrize("name", fields.REFUSED)
def test_a_field_that_would_change_the_answer_is_refused_by_name(name: str, door: Door) -> None:
    """Unless it has a value with which it changes nothing."""
    for path, body in ((COMPLETIONS, PROMPT), (CHAT, MESSAGES)):
        error = refused(door, path, body | {name: {"odd": "value"}})
        assert error["message"].startswith(f"{name} is {{'odd': 'value'}}; it ") and error["param"] == name
        for neutral in (None, *fields.REFUSED[name]):
            assert door.post(path, body | {name: neutral})[0] == 200


def test_other_fields_are_ignored(door: Door) -> None:
    more = {
        "user": "me",
        "store": True,
        "metadata": {},
        "nonsense": [1],
        "stream_options": {"continuous_usage_stats": 1},
    }
    assert door.post(COMPLETIONS, PROMPT | more)[0] == 200


PROMPTS = {
    "none": ({}, "prompt or prompt_token_ids must be given, and not both"),
    "both": ({"prompt": "x", "prompt_token_ids": [1]}, "prompt or prompt_token_ids must be given, and not both"),
    "empty": ({"prompt": []}, "prompt is []; it must be a text, token ids, or a non-empty list of these"),
    "number": ({"prompt": 5}, "prompt is 5; it must be a text, token ids, or a non-empty list of these"),
    "odd item": ({"prompt": ["x", 5.5]}, "prompt holds 5.5; each must be a text or a list of token ids"),
    "empty item": ({"prompt": ["x", ""]}, "prompt 1: prompt is ''; it must be a non-empty string"),
    "foreign token": (
        {"prompt": [[1], [4096]]},
        "prompt 1: prompt_token_ids holds 4096; each must be an integer in 0..",
    ),
    "truth values": ({"prompt": [True]}, "prompt holds True; each must be a text or a list of token ids"),
    "too many": ({"prompt": ["x"] * 1001}, "prompt has 1001 prompts; it must have at most 1000"),
    "too long": ({"prompt": "x" * 10_000_000}, "prompt: its 10,000,000 bytes are over max_model_len (2048) x"),
    "no messages": (None, "messages is None; it must be a non-empty list"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_bad_prompt_says_which_and_why(case: str, door: Door) -> None:
    body, message = PROMPTS[case]
    path = CHAT if body is None else COMPLETIONS
    assert message in refused(door, path, body or {})["message"]


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}], ["x"]])
def test_a_content_has_parts_of_text_only(content: list, door: Door) -> None:
    error = refused(door, CHAT, {"messages": [{"role": "user", "content": content}]})
    assert re.search("messages has (a part of type|the content)", error["message"]) and error["param"] == "messages"


BODIES = {
    "no JSON": (b"{", 400, "the body is not JSON: "),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', 400, "the body is not JSON: "),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "the body is not "),
    "half a pair": (b'{"prompt": "\\ud800"}', 400, "the body is not "),
    "a list": (b"[]", 400, "the body must be a JSON object, not list"),
    "nothing": (b"", 400, "the body is not JSON: "),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "it is nested too deeply"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_must_be_an_object_of_json(case: str, door: Door) -> None:
    body, status, message = BODIES[case]
    assert message in refused(door, COMPLETIONS, body, status)["message"]


def test_a_body_must_say_that_it_is_json(door: Door) -> None:
    """A form of another origin's page can be sent to this one, but not as JSON."""
    error = refused(door, COMPLETIONS, PROMPT, 415, content_type="text/plain")
    assert error["message"] == "content-type is 'text/plain'; it must be application/json"
    assert door.post(COMPLETIONS, PROMPT, content_type="application/json; charset=utf-8")[0] == 200


def test_a_large_body_is_refused_before_and_while_it_comes(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "MOST_BYTES", 1000)
    rule = "the body is too large; it must have at most 1,000 bytes"
    assert refused(door, COMPLETIONS, {"prompt": "x" * 1000}, 413)["message"] == rule
    with door.connect() as sock:
        head = request_bytes(COMPLETIONS, b"", transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
        sock.sendall(head + b"3e8\r\n" + b" " * 1000 + b"\r\n")
        sock.sendall(b"1\r\n \r\n")  # and never an end
        status, _, body = read_answer(sock)
    assert status == 413 and error_of(body)["message"] == rule


def test_slow_senders_are_sent_home(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_S", 0.2)
    monkeypatch.setattr(protocol, "HEADERS_S", 0.2)
    whole = request_bytes(COMPLETIONS, PROMPT)
    for sent, what in (
        (b"", "headers"),
        (b"POST /v1", "headers"),
        (whole[:60], "headers"),
        (whole[:-1], "the body"),
    ):
        with door.connect() as sock:
            sock.sendall(sent)
            status, _, body = read_answer(sock)
        assert status == 408 and f"{what} did not arrive within 0.2 s" in error_of(body)["message"]


def test_headers_have_a_limit(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_HEADER_BYTES", 1000)
    with door.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nx: " + b"x" * 2000)
        status, _, body = read_answer(sock)
    assert status == 431 and error_of(body)["message"] == "its headers are over 1,000 bytes"


def test_paths_methods_and_models_that_do_not_exist(door: Door) -> None:
    status, _, body = door.get("/v2")
    assert status == 404 and error_of(body)["message"] == "there is no path /v2"
    status, headers, body = door.get(COMPLETIONS)
    assert status == 405 and headers["allow"] == "post" and "GET is not for" in error_of(body)["message"]
    error = refused(door, CHAT, MESSAGES | {"model": "gpt-4"}, 404)
    assert error["message"] == "model is 'gpt-4'; it must be 'tiny'" and error["code"] == "model_not_found"
    assert refused(door, CHAT, MESSAGES | {"model": ["tiny"]}, 404)["param"] == "model"
    assert [door.get(f"/v1/models/{name}")[0] for name in ("gpt-4", "")] == [404, 404]
    assert door.get("/v1/models/tiny")[0] == 200


# ---- what it says of itself


def test_tokens_there_and_back(door: Door) -> None:
    count, tokens = (json.loads(door.post("/tokenize", PROMPT)[2])[name] for name in ("count", "tokens"))
    assert count == len(tokens) > 1
    bare = json.loads(door.post("/tokenize", PROMPT | {"add_special_tokens": False})[2])["tokens"]
    assert json.loads(door.post("/detokenize", {"tokens": bare})[2]) == {"prompt": PROMPT["prompt"]}
    chat = json.loads(door.post("/tokenize", MESSAGES)[2])["tokens"]
    assert "river" in json.loads(door.post("/detokenize", {"tokens": chat})[2])["prompt"]
    assert refused(door, "/detokenize", {"tokens": [4096]})["param"] == "tokens"
    assert refused(door, "/detokenize", {"tokens": 5})["param"] == "tokens"
    assert refused(door, "/tokenize", {})["message"].startswith("exactly one of prompt, ")


def test_health_says_what_is_missing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does a request."""
    monkeypatch.setattr("disagg.front.fleet.FAREWELL_S", 0.1)
    with open_door(tiny, None) as door:
        status, headers, body = door.get("/health")
        assert status == 503 and error_of(body)["message"] == "no unified replica" and headers["retry-after"]
        error = refused(door, COMPLETIONS, PROMPT, 503)
        assert error["message"] == "no request can be served: no unified replica"


def test_names_of_a_model(tiny: Path, tmp_path: Path) -> None:
    assert model_names(str(tiny)) == ["tiny", str(tiny)]
    assert model_names("org/Name@main") == ["org/Name", "org/Name@main", "Name"]


# ---- keys and limits


def test_only_clients_with_a_key_come_in(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\n\n second \n")
    with open_door(tiny, lambda submit: [Update(submit.request.uid, [9], finish="length")], "--api-key-file",
                   str(tmp_path / "keys")) as door:  # fmt: skip
        for given in ({}, {"authorization": "Bearer third"}, {"authorization": "first"}, {"authorization": "Bearer "}):
            status, headers, body = door.post(COMPLETIONS, PROMPT, **given)
            assert status == 401 and headers["www-authenticate"] == "bearer"
            assert error_of(body)["type"] == "authentication_error"
        for key in ("first", "second"):
            assert door.post(COMPLETIONS, PROMPT, authorization=f"Bearer {key}")[0] == 200
        assert door.get("/metrics")[0] == 401 and door.get("/health")[0] == 200


def test_a_file_of_keys_must_have_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--api-key-file none: cannot be read \(No such file or directory\)"):
        Keys.read("none")
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(ValueError, match="it has no key; it must have one per line"):
        Keys.read(str(tmp_path / "keys"))


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1,0", "1,2,3", "inf", "nan", "1,"])
def test_time_limits_are_numbers_above_zero(text: str) -> None:
    with pytest.raises(ValueError, match=f"--request-timeout is '{text}'; it must be S or S,F, both of them seconds"):
        Timeouts.parse(text)


def test_requests_that_take_too_long_are_ended(tiny: Path) -> None:
    """To the first token, and in all; before the answer has begun with a status, and later within the stream."""

    def answers(submit: Submit) -> list[Update]:
        return first_token(submit) if submit.request.seed == 1 else []

    with open_door(tiny, answers, "--request-timeout", "0.6,0.2") as door:
        assert Timeouts.parse("0.6,0.2") == Timeouts(0.6, 0.2)
        for stream in (True, False):
            began = time.monotonic()
            error = refused(door, CHAT, MESSAGES | {"seed": 2, "stream": stream}, 504)
            assert time.monotonic() - began >= 0.2 and "over 0.2 s to its first token" in error["message"]
        assert "over 0.6 s in all" in refused(door, CHAT, MESSAGES | {"seed": 1}, 504)["message"]
        status, _, body = door.post(CHAT, MESSAGES | {"seed": 1, "stream": True})
        assert status == 200 and "over 0.6 s in all" in events(body)[-1]["error"]["message"]
        assert eventually(lambda: len(door.actor.aborts) == 4 and not door.front.router._tracked)


def test_only_a_stream_wakes_for_single_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, news = [], Exchange.news

    async def counted(exchange: Exchange) -> list:
        ready = await news(exchange)
        looks.append(len(ready))
        return ready

    monkeypatch.setattr(Exchange, "news", counted)
    with open_door(tiny, first_token) as door:
        for stream in (True, False):
            looks.clear()
            with door.connect() as sock:
                sock.sendall(request_bytes(CHAT, MESSAGES | {"stream": stream}))
                assert eventually(lambda: door.front.router.tracked)
                (tracked,) = door.front.router.tracked
                assert eventually(lambda tracked=tracked: tracked.latest is not None)
                door.actor.worker.send(Updates([Update(tracked.uid, [TOKEN], finish="length")]))
                status, _, body = read_answer(sock)
            assert status == 200 and len(tracked.stream.token_ids) == 2 and body
            assert len(looks) == (2 if stream else 1)


def test_a_full_queue_asks_to_come_later(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.front.http.generate.MOST_WAITING", 2)
    monkeypatch.setattr("disagg.front.routing.LEAST_AHEAD", 1)
    monkeypatch.setattr("disagg.front.routing.STEPS_AHEAD", 0)
    with open_door(tiny, never) as door:
        socks = []
        for waiting in (0, 1, 2):  # one runs, two wait
            socks.append(door.connect())
            socks[-1].sendall(request_bytes(COMPLETIONS, PROMPT))
            assert eventually(lambda waiting=waiting: door.front.router.num_waiting == waiting
                              and len(door.front.router._tracked) == waiting + 1)  # fmt: skip
        status, headers, body = door.post(COMPLETIONS, PROMPT)
        assert status == 429 and headers["retry-after"] == "1"
        assert error_of(body)["message"] == "2 requests are waiting; at most 2 may wait"
        for sock in socks:
            sock.close()
        assert eventually(lambda: not door.front.router._tracked and not door.front.router.num_waiting)


# ---- clients that leave, and the end


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(stream: bool, tiny: Path) -> None:
    """64 of them, half before their first token; however many prompts a request has."""

    def answers(submit: Submit) -> list[Update]:
        return first_token(submit) if submit.request.seed else []

    with open_door(tiny, answers, "--max-batch", "64") as door:
        socks = [door.connect() for _ in range(64)]
        for i, sock in enumerate(socks):
            prompt = ["a", "b"] if i % 4 == 0 else "a"
            body = {"prompt": prompt, "seed": i % 2, "stream": stream}
            sock.sendall(request_bytes(COMPLETIONS, body))
        assert eventually(lambda: len(door.actor.submits) == 80)
        if stream:
            assert all(sock.recv(1) for sock in socks[1::2])
        began = time.monotonic()
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as if killed
            sock.close()
        assert eventually(lambda: len(door.actor.aborts) == 80, 2), len(door.actor.aborts)
        assert time.monotonic() - began < 2 and not door.front.router._tracked
        assert sorted(door.actor.aborts) == sorted(submit.request.uid for submit in door.actor.submits)
        assert door.get("/health")[0] == 200


def test_ctrl_c_ends_requests_with_an_error_and_the_door_with_them(tiny: Path) -> None:
    with open_door(tiny, first_token) as door:
        streamed, whole, idle = (door.connect() for _ in range(3))
        streamed.sendall(request_bytes(CHAT, MESSAGES | {"stream": True}))
        first = streamed.recv(1)
        whole.sendall(request_bytes(CHAT, MESSAGES))
        assert eventually(lambda: len(door.actor.submits) == 2)
        began = time.monotonic()
        door.end()
        assert time.monotonic() - began < 5
        status, _, body = read_answer(whole)
        assert status == 503 and error_of(body)["message"] == "interrupted"
        rest = b""
        while piece := streamed.recv(2**16):
            rest += piece
        assert b'"message":"interrupted"' in first + rest and b"[DONE]" in rest
        for sock in (streamed, whole, idle):
            sock.close()
        with pytest.raises(ConnectionRefusedError):
            door.connect()


def test_a_taken_port_is_one_line(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"^--http: cannot listen on {address}: Address already in use$"):
            Door(tiny, None, "--http", address)
    with pytest.raises(ValueError, match="^--http: cannot listen on 999.1.1.1:1: no such host"):
        bind("999.1.1.1", 1)
