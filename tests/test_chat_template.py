"""A chat template gives the same text as in transformers, and its time and memory are bounded."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from disagg.front import chat_template
from disagg.front.chat_template import ChatTemplate
from tests.conftest import ROOT, eventually

WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "a<b> & 'c' \"d\" Zürich\n"},
    {"role": "assistant", "content": " the 😀 </s>", "more": {"z": [1, 2.5, None, True], "a": "é"}},
    {"role": "user", "content": "\ud800 half a pair"},
]
FOR = "{% for m in messages %}"
AGREED = {
    "plain": "{{ bos_token }}" + FOR + "[{{ m.role }}]{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "white space": FOR + "\n  {%- if m.role == 'user' %}\n  {{ m.content | trim }}\n  {% endif -%}\n x{% endfor %}\n",
    "json": "{{ messages[1] | tojson }}",
    "json beside text": FOR + "{{ '<u>' + (m.content | tojson) + '</u>' }}{% endfor %}",
    "json in ASCII": "{{ messages[1] | tojson(ensure_ascii=True) }}",
    "json with its options": "{{ messages[1] | tojson(indent=2, separators=(',', ':'), sort_keys=true) }}",
    "generation": FOR + "{% generation %}\n{{ m.content }}{{ loop.index }}\n{% endgeneration %}{% endfor %}",
    "generation, cut": FOR + "{%- generation -%} {{ m.content }} {%- endgeneration -%} {% endfor %}",
    "break": FOR + "{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": FOR + "{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ nothing is defined }}",
    "the assistant's turn": "{% if add_generation_prompt %}go{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}" + FOR + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) %}<{{ m.content }}>{% endmacro %}{{ turn(messages[0]) }}",
    "what is missing": "{{ messages[0].nothing }}{{ messages[0].get('nothing', 5) }}",
}


def render(template: ChatTemplate, messages: list[dict] = TALK) -> str:
    return template.render({"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True})


def compiled(source: str, words: dict[str, str] | None = None, **limits: float) -> ChatTemplate:
    return ChatTemplate({"default": source}, words or {}, **limits)


@pytest.mark.parametrize("name", AGREED)
def test_it_gives_what_transformers_gives(name: str) -> None:
    source = AGREED[name]
    theirs, _ = render_jinja_template([TALK], chat_template=source, add_generation_prompt=True, **WORDS)
    assert render(compiled(source, WORDS)) == theirs[0]


def test_it_knows_the_day() -> None:
    before = date.today()
    said = render(compiled("{{ strftime_now('%Y-%m-%d') }}"))
    assert said in (str(before), str(date.today()))


REFUSED = {
    "its own word": ("{{ raise_exception('no ' + messages[0].role) }}", "no user"),
    "undefined": ("{{ nope.x.y }}", "'nope' is undefined"),
    "Python behind it": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "change": ("{{ messages.append(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "no end of calls": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_refuses_is_an_error(case: str) -> None:
    source, why = REFUSED[case]
    template = compiled(source)
    for _ in range(5):  # again and again: it is not an overrun
        with pytest.raises(ValueError, match=why):
            render(template)


BOMBS = {
    "time": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * messages | length * 10**10 }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "text": "{{ 'a' * messages | length * 2**26 }}",
    "one operation": "{{ (messages | length + 9) ** (10 ** 9) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_overruns_costs_one_request(bomb: str) -> None:
    source = "{% if messages[0].role == 'bomb' %}" + BOMBS[bomb] + "{% endif %}{{ messages[0].content }}"
    template = compiled(source, render_s=0.5)
    assert render(template) == TALK[0]["content"]
    for _ in range(chat_template.MOST_OVERRUNS + 1):  # a template that has worked is tried again each time
        begun = time.monotonic()
        with pytest.raises(ValueError, match="it takes over 0.5 s|bytes of memory|it makes 67,108,8.. characters"):
            render(template, [{"role": "bomb", "content": ""}])
        assert time.monotonic() - begun < 10
        assert render(template) == TALK[0]["content"]


@pytest.mark.parametrize("bomb", ["time", "product"])
def test_a_template_that_never_works_is_not_tried_for_ever(bomb: str) -> None:
    template = compiled(BOMBS[bomb], render_s=0.5)
    for _ in range(chat_template.MOST_OVERRUNS):
        with pytest.raises(ValueError, match="it takes over"):
            render(template)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="it has taken too much time or memory 3 times, and is not tried any more"):
        render(template)
    assert time.monotonic() - begun < 0.1


BROKEN = {
    "brackets 3000 deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "blocks 500 deep": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "an unknown tag": "{% trans %}",
    "no end": "{% for m in messages %}",
    "a constant without end": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_compiled_is_a_value_error(case: str) -> None:
    with pytest.raises(ValueError):
        compiled(BROKEN[case], render_s=1.0)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """Those that templates start in this test."""
    started, popen = [], subprocess.Popen

    def noting(*args: Any, **kwargs: Any) -> subprocess.Popen:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(chat_template.subprocess, "Popen", noting)
    return started


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_frozen_costs_one_request(
    number: signal.Signals, processes: list[subprocess.Popen]
) -> None:
    template = compiled("{{ messages[0].role }}", render_s=1.0)
    assert render(template) == "user"
    processes[0].send_signal(number)
    with pytest.raises(ValueError, match="its process has ended|Broken pipe|reset|it takes over 1 s"):
        render(template)
    assert render(template) == "user"
    assert len(processes) == 2 and processes[0].poll() is not None


def test_the_process_ends_with_its_template(processes: list[subprocess.Popen]) -> None:
    template = compiled("x")
    assert processes[0].poll() is None and os.getsid(processes[0].pid) != os.getsid(0)  # Ctrl-C does not reach it
    del template
    assert processes[0].poll() is not None


def test_the_process_does_not_outlive_a_killed_owner() -> None:
    """Even amid a loop without end."""
    code = (
        "from disagg.front.chat_template import ChatTemplate\n"
        f"template = ChatTemplate({{'default': {BOMBS['time']!r}}}, {{}}, render_s=1.0)\n"
        "print(template._end.peek()[2][0].pid, flush=True)\n"
        "template.render({'messages': []})\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process = Path("/proc", owner.stdout.readline().strip())
    time.sleep(0.3)
    assert re.search(r"template_process", (process / "cmdline").read_text())
    owner.kill()
    owner.communicate()
    assert eventually(lambda: not process.exists() or "\nState:\tZ" in (process / "status").read_text(), 10)
