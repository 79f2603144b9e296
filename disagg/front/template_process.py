"""The process that renders a chat template for `chat_template.py`. It is run, never imported, and needs only jinja.

Its standard input and output are one socket. Each line is a JSON object. The first line it receives has the templates,
and each later one the name of a template, and the values to render it with. It answers each with a line:
`{"text": ...}`, `{"error": ...}`, or `{"overrun": ...}` if it took too much memory.

The environment is that of transformers' `apply_chat_template`, for which people write their templates.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_MEMORY = 2**30  # bytes, of this process
MOST_TEXT = 2**25  # characters
MOST_REASON = 500  # characters of an error


class Generation(Extension):
    """{% generation %} marks the assistant's text, for training. Here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_templates(sources: dict[str, str], words: dict[str, str]) -> dict[str, Template]:
    """Compile templates by name. `words`: variables for them, name -> special token."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now, **words}
    return {name: environment.from_string(source) for name, source in sources.items()}


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace jinja's own filter, which is for HTML: it would escape < > & and quotes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(how: str) -> str:
    return datetime.now().strftime(how)


def refuse(message: str) -> None:
    raise TemplateError(message)


def answer(asked: dict, templates: dict[str, Template]) -> tuple[dict, dict[str, Template]]:
    """Compile the templates, if there are none yet, or render one. Returns the answer and the templates."""
    if not templates:
        return {"text": ""}, compile_templates(**asked)
    text = templates[asked["name"]].render(asked["given"])
    if len(text) > MOST_TEXT:
        raise ValueError(f"it makes {len(text):,} characters of them; at most {MOST_TEXT:,} are taken")
    return {"text": text}, templates


def main() -> None:
    most_seconds, templates = float(sys.argv[1]), {}
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    print("{}", flush=True)  # ready
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, most_seconds)  # SIGALRM ends this process, whatever it does
        try:
            said, templates = answer(json.loads(line), templates)
            said = json.dumps(said)
        except MemoryError:
            said = json.dumps({"overrun": f"it takes over {MOST_MEMORY:,} bytes of memory"})
        except Exception as error:  # a template may raise anything about its input
            said = json.dumps({"error": f"{error or type(error).__name__}"[:MOST_REASON]})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(said, flush=True)


if __name__ == "__main__":
    main()
