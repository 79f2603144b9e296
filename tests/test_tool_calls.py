"""Tool calls come back as a template wrote them; whatever breaks the syntax is text, and no character is lost."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from disagg.front import tool_syntax
from disagg.front.chat_template import ChatTemplate
from disagg.front.chat_text import ChatFormat, ChatText, whole_message
from disagg.front.text_stream import TextStream
from disagg.front.tool_syntax import SYNTAXES, find_syntax

THINK = ["<think>", "</think>"]
DEEPSEEK, KIMI, GLM = SYNTAXES
# Each assistant's turn in the manner of the published template, from behind the prompt on.
TURN = "{% set m = messages[0] %}{{ m.content }}{% for c in m.tool_calls %}{% set f = c.function %}"
CALLS = {
    "v3": (
        DEEPSEEK,
        "{{ '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}<｜tool▁call▁begin｜>{{ c.type }}<｜tool▁sep｜>"
        "{{ f.name + '\n```json\n' + f.arguments + '\n```' }}<｜tool▁call▁end｜>"
        "{{ '<｜tool▁calls▁end｜>' if loop.last }}",
    ),
    "v3.1": (
        DEEPSEEK,
        "{{ '<｜tool▁calls▁begin｜>' if loop.first }}<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments }}"
        "<｜tool▁call▁end｜>{{ '<｜tool▁calls▁end｜>' if loop.last }}",
    ),
    "kimi": (
        KIMI,
        "{{ '<|tool_calls_section_begin|>' if loop.first }}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
        "{{ f.arguments }}<|tool_call_end|>{{ '<|tool_calls_section_end|>' if loop.last }}",
    ),
    "glm": (
        GLM,
        "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>"
        "{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>",
    ),
}
TYPES = {"city": "string", "days": "integer", "more": "object"}
TOOL = {"parameters": {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}}}
TOOLS = [{"type": "function", "function": TOOL | {"name": name}} for name in ("get_weather", "find-it", "a.b")]
STRINGS = st.text('ab5é\U0001f600\n"\\ {}<>`:', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | STRINGS, lambda inner: st.lists(inner, max_size=2)
)
ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"city": STRINGS, "days": st.integers(), "more": st.dictionaries(STRINGS, VALUES, max_size=2)}
)
ASKED = st.lists(st.tuples(st.sampled_from([tool["function"]["name"] for tool in TOOLS]), ARGUMENTS), max_size=3)
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=40)


def tokenizer_of(marks: list[str]) -> Tokenizer:
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_tokens([*marks, *THINK])
    return tokenizer


FORMS = {syntax.call[0]: ChatFormat(tokenizer_of(syntax.marks)) for syntax in SYNTAXES}


def encode(form: ChatFormat, text: str) -> list[int]:
    return form.tokenizer.encode(text, add_special_tokens=False).ids


def read(
    form: ChatFormat, tokens: list[int], prompt: str = "", tools: Any = TOOLS, stop: tuple[str, ...] = ()
) -> tuple[dict, dict, str]:
    """The message read at every token, the one read at once, and the whole text. Checks that no character is lost."""
    messages = []
    for streamed in (True, False):
        stream = TextStream(form.tokenizer, list(stop), form.marks(tools))
        chat, deltas = ChatText(form, stream, encode(form, prompt), tools), []
        parts = ChatText(form, stream, encode(form, prompt), tools)
        texts = []
        for token in tokens:
            stopped = stream.push(token)
            if streamed:
                deltas += chat.deltas()
                texts += [part.text for part in parts.parts()]
            if stopped:
                break
        stream.close()
        deltas += chat.deltas()
        texts += [part.text for part in parts.parts()]
        assert "".join(texts) == stream.text
        message = whole_message(deltas)
        assert (chat.finish_reason("stop") == "tool_calls") == ("tool_calls" in message)
        assert chat.finish_reason("length") == "length"
        messages.append(message)
    return messages[0], messages[1], stream.text


def without_ids(message: dict) -> dict:
    calls = [call | {"id": ""} for call in message.get("tool_calls", [])]
    return message | {"tool_calls": calls}


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {name: ChatTemplate({"default": TURN + body + "{% endfor %}"}, {}) for name, (_, body) in CALLS.items()}


@pytest.mark.parametrize("name", CALLS)
@given(asked=ASKED, content=st.sampled_from(["", "Let me see.", "a\n\nb {"]), think=st.booleans())
@PROPERTIES
def test_calls_come_back_as_a_template_wrote_them(
    templates: dict[str, ChatTemplate], name: str, asked: list, content: str, think: bool
) -> None:
    calls = []
    for at, (tool, arguments) in enumerate(asked):
        given = arguments if name == "glm" else json.dumps(arguments, ensure_ascii=False)
        function = {"name": tool, "arguments": given}
        calls.append({"id": f"functions.{tool}:{at}", "type": "function", "function": function})
    text = templates[name].render({"messages": [{"content": content, "tool_calls": calls}], "tools": None})
    form = FORMS[CALLS[name][0].call[0]]
    tokens = encode(form, "2 + 2\n</think>" + text if think else text)
    message, whole, _ = read(form, tokens, "x<think>\n" if think else "x</think>")
    assert without_ids(message) == without_ids(whole)
    assert message.get("content") == (content or (None if calls else ""))
    assert message.get("reasoning_content") == ("2 + 2\n" if think else None)
    found = message.get("tool_calls", [])
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found] == asked
    assert {call["type"] for call in found} <= {"function"}
    ids = [call["id"] for call in found]
    assert len(set(ids)) == len(ids) and (name != "kimi" or ids == [call["id"] for call in calls])


SCRAPS = ["{", "}", '"a": 1', '{"a": 1}', "get", "functions.get:0", "\n", " ", "function", "get\n```json\n{}\n```", "é"]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["deepseek", "kimi", "glm"])
@given(data=st.data())
@PROPERTIES
def test_broken_outputs_are_text_and_lose_no_character(syntax: tool_syntax.Syntax, data: st.DataObject) -> None:
    form = FORMS[syntax.call[0]]
    words = data.draw(st.lists(st.sampled_from([*SCRAPS, *THINK, *syntax.marks, *syntax.marks]), max_size=16))
    prompt = data.draw(st.sampled_from(["x", "x<think>\n"]))
    tools = data.draw(st.sampled_from([TOOLS, None, [{}], [{"function": {"name": "get", "parameters": 5}}]]))
    stop = data.draw(st.sampled_from([(), ("get",), ("</think>\n",), (" ", syntax.call[1])]))
    message, whole, text = read(form, encode(form, "".join(words)), prompt, tools, stop)
    assert without_ids(message) == without_ids(whole)
    assert tools is not None or "tool_calls" not in message
    for call in message.get("tool_calls", []):
        assert isinstance(json.loads(call["function"]["arguments"]), dict) and call["function"]["name"].strip()


def v3(body: str, form: ChatFormat = FORMS[DEEPSEEK.call[0]]) -> dict:
    """What comes of an output in which [ ] | ( ) stand for the five marks."""
    names = dict(zip("([|])", ("", "", "", "", ""), strict=True)) | {
        "(": DEEPSEEK.section[0],
        ")": DEEPSEEK.section[1],
        "[": DEEPSEEK.call[0],
        "]": DEEPSEEK.call[1],
        "|": DEEPSEEK.inner[0],
    }
    message, _, _ = read(form, encode(form, "".join(names.get(letter, letter) for letter in body)))
    calls = [call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", [])]
    content = message["content"]
    for letter, name in names.items():
        content = content and content.replace(name, letter)
    return {"content": content, "calls": calls}


@pytest.mark.parametrize(
    "body, content, calls",
    (
        ("hi\n([get|{}])\n", "hi", ["get{}"]),
        ("([get|{}]\n[put|{}])", None, ["get{}", "put{}"]),
        ("[get|{}]", None, ["get{}"]),  # no section, as V3's template ends without one
        ("([get|])", None, ["get{}"]),
        ("([get|{}", "([get|{}", []),
        ("([get|{]) x", "([get|{]) x", []),
        ("([get|[1]])", "([get|[1]])", []),
        ("([get|5])", "([get|5])", []),
        ('([get|{"a": NaN}])', '([get|{"a": NaN}])', []),
        ("([get{}])", "([get{}])", []),
        ("([ |{}])", "([ |{}])", []),
        ("([a|{}|{}])", "([a|{}|{}])", []),
        ("()", "()", []),
        ("([get|{[put|{}])", "([get|{", ["put{}"]),
        ("([bad|{] [get|{}])", "([bad|{]", ["get{}"]),
        ("([get|{}] and [put|{}])", " and", ["get{}", "put{}"]),
        ("([get|{}]) then", " then", ["get{}"]),
    ),
)
def test_what_a_broken_syntax_gives(body: str, content: str | None, calls: list[str]) -> None:
    assert v3(body) == {"content": content, "calls": calls}


def test_arguments_nested_deeply_are_text() -> None:
    deep = '{"a":' * 2_000 + "1" + "}" * 2_000
    assert v3(f"([get|{deep}])") == {"content": f"([get|{deep}])", "calls": []}


def test_only_the_declared_type_tells_a_string_from_a_number() -> None:
    form = FORMS[GLM.call[0]]
    pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>5</arg_value>" for k in ("city", "days", "other"))
    message, _, _ = read(form, encode(form, f"<tool_call>get_weather\n{pairs}</tool_call>"))
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "5", "days": 5, "other": 5}


def test_the_letters_of_a_mark_from_other_tokens_are_text() -> None:
    form = FORMS[GLM.call[0]]
    text = "<tool_call>get</tool_call></think>"
    tokens = [token for letter in text for token in encode(form, letter)]
    assert read(form, tokens, "x<think>")[0] == {"role": "assistant", "content": "", "reasoning_content": text}
    assert read(form, tokens)[0] == {"role": "assistant", "content": text}


def test_a_vocabulary_shows_its_syntax() -> None:
    for syntax in SYNTAXES:
        assert find_syntax({*syntax.marks, "<other>"}) is syntax
        assert find_syntax(set(syntax.marks[1:])) is None
    assert not ChatFormat(Tokenizer(BPE())).thinks
