"""Chat answers over HTTP: reasoning and tool calls in OpenAI's fields, streamed as whole."""

import json
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from disagg.control.messages import Submit, Update
from disagg.front.tool_syntax import SYNTAXES
from tests.conftest import ROOT
from tests.http_door import Door, open_door
from tests.test_tool_calls import THINK

CHAT = "/v1/chat/completions"
BEGIN, END = SYNTAXES[0].section
CALL = SYNTAXES[0].call[0] + 'get<｜tool▁sep｜>{"a": 1}' + SYNTAXES[0].call[1]
OUTPUT = f"2 + 2\n</think>Let me see. END{BEGIN}{CALL}{CALL}{END}"
TOOLS = [{"type": "function", "function": {"name": "get"}}]
CALLED = {"type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A model that thinks and calls; it always gives OUTPUT, a token at a time."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_file(str(ROOT / "model/tiny/tokenizer.json"))
    tokenizer.add_tokens([*THINK, *SYNTAXES[0].marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{{ messages[0].content }}{{ '<think>\n' if thinking is not defined else '</think>' }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    config = json.loads((ROOT / "model/tiny/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": tokenizer.get_vocab_size()}))
    tokens = tokenizer.encode(OUTPUT, add_special_tokens=False).ids

    def answers(submit: Submit) -> list[Update]:
        *others, last = tokens
        updates = [Update(submit.request.uid, [token]) for token in others]
        return [*updates, Update(submit.request.uid, [last], finish="stop")]

    with open_door(folder, answers) as made:
        yield made


def ask(door: Door, **fields: object) -> tuple[dict, str]:
    """The message and its finish reason, which must be equal in a stream."""
    status, _, body = door.post(CHAT, MESSAGES | fields)
    assert status == 200, body
    (choice,) = json.loads(body)["choices"]
    status, _, body = door.post(CHAT, MESSAGES | fields | {"stream": True})
    message: dict = {"content": ""}
    reasons = []
    for line in body.decode().split("data: ")[1:]:
        if not line.startswith("[DONE]"):
            (piece,) = json.loads(line)["choices"]
            reasons.append(piece.get("finish_reason"))
            for name, value in piece["delta"].items():
                message[name] = message[name] + value if name in message else value
    assert reasons[-1] == choice["finish_reason"] and set(reasons[:-1]) <= {None}
    whole = {name: value for name, value in choice["message"].items() if value is not None}
    assert without_ids(message) == without_ids({"content": ""} | whole)
    return whole, choice["finish_reason"]


def without_ids(message: dict) -> dict:
    calls = [{"type": call["type"], "function": call["function"]} for call in message.get("tool_calls", [])]
    return message | {"tool_calls": calls}


def test_reasoning_and_calls_have_their_fields(door: Door) -> None:
    message, reason = ask(door, tools=TOOLS)
    calls = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": "Let me see. END", "reasoning_content": "2 + 2\n"}
    assert [call | {"id": ""} for call in calls] == [CALLED | {"id": ""}] * 2 and reason == "tool_calls"
    assert calls[0]["id"] != calls[1]["id"]


def test_without_tools_calls_are_text(door: Door) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message, reason = ask(door, **fields)
        assert message["content"] == OUTPUT.split("</think>")[1] and reason == "stop" and "tool_calls" not in message


def test_a_prompt_that_ends_the_thoughts_gets_none(door: Door) -> None:
    message, _ = ask(door, chat_template_kwargs={"thinking": False})
    assert message["content"] == OUTPUT and "reasoning_content" not in message


def test_no_part_of_a_stop_string_is_shown(door: Door) -> None:
    assert ask(door, stop="END")[0]["content"] == "Let me see. "
    assert ask(door, stop="</think>Let")[0]["reasoning_content"] == "2 + 2\n"
    assert ask(door, stop="+ 2\nL")[0]["reasoning_content"] == "2 + 2\n"
