"""How models write tool calls: which marks frame them, and how what is between the marks is read.

The syntaxes are those of the published chat templates. A mark is a token of its own, so a vocabulary shows which syntax
its model writes:

    V3, R1    <calls begin> <call begin>function<sep>NAME\\n```json\\nARGUMENTS\\n```<call end> ... <calls end>
    V3.1      <calls begin> <call begin>NAME<sep>ARGUMENTS<call end> ... <calls end>
    Kimi-K2   <section begin> <call begin>functions.NAME:INDEX<argument begin>ARGUMENTS<call end> ... <section end>
    GLM-4.7   <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value> ... </tool_call>
"""

import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

WITH_TYPE = re.compile(r"\s*([^\n]+)\n```json\n(.*)\n```\s*", re.DOTALL)  # V3's, behind the separator
KIMI_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?", re.DOTALL)


class Call(NamedTuple):
    """One tool call, as OpenAI's API has it."""

    id: str
    name: str
    arguments: str  # the JSON text of an object


@dataclass(frozen=True)
class Syntax:
    """The marks of one syntax, and `read(texts, marks, tools)`, which reads what is between the marks of one call.

    `marks` are the inner marks of the call, `texts` what is before, between and behind them: one more than marks.
    `tools`: the request's. Raises ValueError if they are no call.
    """

    call: tuple[str, str]  # begin, end
    section: tuple[str, str] | None  # around all calls; None: there are no such marks
    inner: tuple[str, ...]
    read: Callable[[list[str], list[str], list[dict]], Call]

    @property
    def marks(self) -> list[str]:
        return [*self.call, *(self.section or ()), *self.inner]


def find_syntax(words: Collection[str]) -> Syntax | None:
    """Return the syntax whose marks are all among a vocabulary's added tokens, or None."""
    return next((syntax for syntax in SYNTAXES if all(mark in words for mark in syntax.marks)), None)


def read_deepseek(texts: list[str], marks: list[str], tools: list[dict]) -> Call:
    """Read a call of V3, whose first text is the tool's type, or of V3.1, whose first text is the name."""
    before, after = _two(texts, marks)
    if match := WITH_TYPE.fullmatch(after):
        before, after = match.groups()
    return Call(new_id(), check_name(before), check_arguments(after))


def read_kimi(texts: list[str], marks: list[str], tools: list[dict]) -> Call:
    """Read a call of Kimi-K2. The id stays as the model wrote it, because its template writes it back."""
    before, after = _two(texts, marks)
    id = before.strip()
    match = KIMI_ID.fullmatch(id)
    if match is None:
        raise ValueError("the call has no name")
    return Call(id, check_name(match[1]), check_arguments(after))


def read_glm(texts: list[str], marks: list[str], tools: list[dict]) -> Call:
    """Read a call of GLM-4.7, whose arguments are pairs of a key and a value."""
    count = len(marks) // len(GLM_INNER)
    keys, gaps, values, ends = (texts[at::4] for at in range(1, 5))
    if marks != [*GLM_INNER] * count or "".join(gaps + ends).strip():
        raise ValueError("keys and values do not alternate")
    name = check_name(texts[0])
    arguments = {
        key.strip(): read_value(value, parameter_type(tools, name, key.strip()))
        for key, value in zip(keys, values, strict=True)
    }
    return Call(new_id(), name, msgspec.json.encode(arguments).decode())


def read_value(text: str, kind: Any) -> Any:
    """Return an argument's value. `kind`: the type that the tool declares for it, None if it declares none.

    The template writes a string as it is, and anything else as JSON. Only the declared type tells "5" from 5.
    """
    if kind == "string":
        return text
    try:
        return _decode(text)
    except ValueError:
        return text


def parameter_type(tools: list[dict], name: str, key: str) -> Any:
    """Return the type that the request's tool `name` declares for an argument. None if there is none."""
    for tool in tools:
        match tool:
            case {"function": {"name": declared, "parameters": {"properties": dict(properties)}}} if declared == name:
                declared = properties.get(key)
                return declared.get("type") if isinstance(declared, dict) else None
    return None


def check_name(text: str) -> str:
    """Return a tool's name. Raises ValueError if it is none."""
    name = text.strip()
    if not name or not name.isprintable():
        raise ValueError("the call has no name")
    return name


def check_arguments(text: str) -> str:
    """Return a call's arguments as the model wrote them. Raises ValueError if they are not a JSON object."""
    text = text.strip() or "{}"
    if not isinstance(_decode(text), dict):
        raise ValueError("the arguments are not a JSON object")
    return text


def new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _two(texts: list[str], marks: list[str]) -> tuple[str, str]:
    """Return what is before and behind the one separator."""
    if len(marks) != 1:
        raise ValueError("the call must have one separator")
    return texts[0], texts[1]


def _decode(text: str) -> Any:
    """Decode JSON. Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(str(error)) from None


GLM_INNER = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
SYNTAXES = (
    Syntax(
        ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ("<｜tool▁sep｜>",),
        read_deepseek,
    ),
    Syntax(
        ("<|tool_call_begin|>", "<|tool_call_end|>"),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ("<|tool_call_argument_begin|>",),
        read_kimi,
    ),
    Syntax(("<tool_call>", "</tool_call>"), None, GLM_INNER, read_glm),
)
