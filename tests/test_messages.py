"""Messages give the tokens that transformers' apply_chat_template gives, and more templates take them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from disagg.front.chat_template import TemplateOverrun
from disagg.front.messages import render
from disagg.front.tokenizer import PromptEncoder, load_tokenizer
from tests.test_text import make_tokenizer

FIRST = (  # in the manner of DeepSeek's: a null content, arguments as text
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for call in m['tool_calls'] %}<call>{{ call['function']['name'] + ' ' + call['function']['arguments'] }}"
    "{% endfor %}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)
SECOND = """{%- macro words(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools is not none %}
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{% for document in documents or [] %}[{{ document.title }}: {{ document.text | trim }}]{% endfor %}
{%- for m in messages %}
<{{ m.role }}>{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif -%}
  {{- words(m.content) if m.content is defined -}}
  {%- for call in m.tool_calls or [] -%}
    {%- for name, value in call.function.arguments.items() -%}
      {{ name }}={{ value if value is string else value | tojson(separators=(',', ':')) }};
    {%- endfor -%}
  {%- endfor -%}
  {%- if loop.last %}{% break %}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<assistant>
{{- '<think>' if enable_thinking is not defined or enable_thinking }}{% endif %}"""
NAMED = [
    {"name": "default", "template": "plain {{ messages | tojson }}{{ eos_token }}"},
    {
        "name": "tool_use",
        "template": "{{ image_token }}{{ tools | tojson(indent=1) }}{{ messages | tojson(sort_keys=true) }}",
    },
    {"name": "rag", "template": "{{ broken"},
]
MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}{% endfor %}"
TEMPLATES = {"first": FIRST, "second": SECOND, "named": NAMED, "marked": MARKED}
USER = {"role": "user", "content": "a<b> & 'c' \"d\" Zürich\n"}
TOOL = {"type": "function", "function": {"name": "get", "description": "é < 5", "parameters": {"type": "object"}}}
ANSWER = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}


def call(arguments: Any, **fields: Any) -> dict:
    function = {"name": "get", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **fields}


TALKS = {
    "one turn": ([USER], {}),
    "a system": ([{"role": "system", "content": "Be brief."}, USER], {}),
    "turns": ([USER, {"role": "assistant", "content": "hm"}, USER], {}),
    "no assistant's turn": ([USER], {"chat_template_kwargs": {"add_generation_prompt": False}}),
    "thinking": ([USER], {"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}),
    "another bos": ([USER], {"chat_template_kwargs": {"bos_token": "<?>"}}),
    "reasoning_content": ([USER, {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, USER], {}),
    "reasoning": ([USER, {"role": "assistant", "content": "4", "reasoning": "2 + 2", "thinking": None}, USER], {}),
    "thinking of a message": ([USER, {"role": "assistant", "content": "4", "thinking": "2 + 2"}, USER], {}),
    "tools": ([USER], {"tools": [TOOL]}),
    "no tools": ([USER], {"tools": []}),
    "documents": ([USER], {"documents": [{"title": "one", "text": " x "}]}),
    "a call": ([USER, call({"city": "Köln", "n": [1, 2.5]}, content="ok"), ANSWER], {"tools": [TOOL]}),
    "a call with null": ([USER, call({"city": "Köln"}, content=None, name=None), ANSWER], {}),
    "a call as text": ([USER, call('{"city": "Köln"}', content="ok"), ANSWER], {}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
}


def make_folder(folder: Path, template: Any) -> Path:
    make_tokenizer().save(str(folder / "tokenizer.json"))
    about = {
        "chat_template": template,
        "bos_token": "<eos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>"},
        "image_token": "<eos>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PromptEncoder, PreTrainedTokenizerFast]]:
    made = {}
    for name, template in TEMPLATES.items():
        folder = make_folder(tmp_path_factory.mktemp(name), template)
        made[name] = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    return made


def chat(encoder: PromptEncoder, messages: list[dict], fields: dict) -> list[int]:
    return encoder.chat(messages, fields.get("tools"), fields.get("documents"), fields.get("chat_template_kwargs"))


# What transformers refuses, or writes as Python's list, and what is made of it here.
OURS = {
    "first, a call with null": ('<eos><user>a<b> & \'c\' "d" Zürich\n<call>get {"city": "Köln"}<tool>sunny<assistant>'),
    "first, parts": "<eos><user>a\nb<assistant>",
    "second, a call as text": "<user>a<b> & 'c' \"d\" Zürich\n<assistant>okcity=Köln;<tool>sunny<assistant><think>",
    "named, parts": 'plain [{"role": "user", "content": "a\\nb"}]<eos>',
    "marked, parts": "a\nb",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_tokens_are_those_of_transformers(both: dict, template: str, talk: str) -> None:
    ours, theirs = both[template]
    messages, fields = TALKS[talk]
    tokens = chat(ours, messages, fields)
    if f"{template}, {talk}" in OURS:
        assert ours.tokenizer.decode(tokens, skip_special_tokens=False) == OURS[f"{template}, {talk}"]
        return
    given = {"add_generation_prompt": True} | fields.get("chat_template_kwargs", {})
    given |= {name: fields[name] for name in ("tools", "documents") if name in fields}
    assert tokens == theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **given)


class Recorder:
    """A template that refuses everything, and remembers what it was asked."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind, self.asked = kind, []

    def render(self, given: dict) -> str:
        self.asked.append(given["messages"])
        raise self.kind(f"refusal {len(self.asked)}")


def test_the_refusal_of_the_first_spelling_is_the_one_that_is_told() -> None:
    template = Recorder(ValueError)
    with pytest.raises(ValueError, match="^refusal 1$"):
        render(template, [USER, call('{"a": 1}')], {})
    arguments = [[m["tool_calls"][0]["function"]["arguments"] for m in messages[1:]] for messages in template.asked]
    assert arguments == [['{"a": 1}'], ['{"a": 1}'], [{"a": 1}], [{"a": 1}]]
    assert ["content" in messages[1] for messages in template.asked] == [False, True, False, True]
    template = Recorder(ValueError)
    with pytest.raises(ValueError, match="^refusal 1$"):
        render(template, [USER], {})
    assert template.asked == [[USER]]


def test_a_template_that_overruns_is_not_asked_again() -> None:
    template = Recorder(TemplateOverrun)
    with pytest.raises(TemplateOverrun):
        render(template, [{"role": "user", "content": [{"type": "text", "text": "a"}]}], {})
    with pytest.raises(TemplateOverrun):
        render(template, [call('{"a": 1}')], {})
    assert len(template.asked) == 2


@pytest.mark.parametrize(
    "calls", [5, [5], [{}], [{"function": 5}], [{"function": {"arguments": "{"}}], [None], {"a": 1}]
)
def test_odd_calls_are_no_worse_than_a_refusal(calls: Any) -> None:
    with pytest.raises(ValueError, match="^refusal 1$"):
        render(Recorder(ValueError), [{"role": "assistant", "tool_calls": calls}], {})


def test_a_part_that_is_no_text_is_refused_by_a_template_for_texts(both: dict) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(
        ValueError, match="^messages: .* takes texts only, and a content has a part of type 'image_url'"
    ):
        both["first"][0].chat([{"role": "user", "content": picture}])
    assert both["second"][0].chat([{"role": "user", "content": picture}])
