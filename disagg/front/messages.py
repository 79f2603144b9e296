"""Messages, made ready for a chat template as transformers' `apply_chat_template` does it, and for more templates.

Clients write messages for OpenAI's API, and templates read them in several ways. These rules bring them together:

- Fields that are null are left out. Reasoning gets the names `reasoning_content` and `thinking`, whichever of three
  names the client used. Both are as in transformers.
- Content in parts goes to a template that reads parts. For any other template the texts are joined by line breaks.
- If the template refuses the messages, other spellings are tried: a null content for a message that has none, and a
  tool call's arguments as an object instead of a JSON text, or the other way round. DeepSeek-V3's templates ask for
  the null and the text, GLM's for the object.
"""

import json
from typing import Any, Protocol

from disagg.front.chat_template import TemplateOverrun

REASONING = ("reasoning_content", "thinking", "reasoning")
MARK = "a text that no template writes by itself"


class Template(Protocol):
    def render(self, given: dict[str, Any], /) -> str:
        """Return the prompt's text. Raises an exception if the template refuses the variables `given`."""
        ...


def render(template: Template, messages: list[dict], given: dict) -> str:
    """Render messages. `given`: the other variables.

    Raises what `template.render` raises for the first spelling, and ValueError for a part that is no text.
    """
    if any(isinstance(message.get("content"), list) for message in messages) and not reads_parts(template, given):
        messages = list(map(join_parts, messages))
    refused = []
    for spelling in spellings(messages):
        try:
            return template.render(given | {"messages": spelling})
        except TemplateOverrun:
            raise
        except Exception as error:
            refused.append(error)
    raise refused[0]


def spellings(messages: list[dict]) -> list[list[dict]]:
    """Return the different spellings of messages, in the order in which they are tried. The first is transformers'."""
    clean = [name_reasoning(drop_nulls(message)) for message in messages]
    ways = [clean, [{"content": None} | message for message in clean]]
    ways += [list(map(switch_arguments, way)) for way in ways]
    return [way for at, way in enumerate(ways) if way not in ways[:at]]


def drop_nulls(message: dict) -> dict:
    return {name: value for name, value in message.items() if value is not None}


def name_reasoning(message: dict) -> dict:
    """Return the message with its reasoning, if any, as `reasoning_content` and `thinking`."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def switch_arguments(message: dict) -> dict:
    """Return the message with its tool calls' arguments as objects instead of JSON texts, and the other way round."""
    calls = message.get("tool_calls")
    return message | {"tool_calls": list(map(_switch, calls))} if isinstance(calls, list) else message


def _switch(call: Any) -> Any:
    match call:
        case {"function": {"arguments": str(text)}}:
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                return call
            return call | {"function": call["function"] | {"arguments": arguments}}
        case {"function": {"arguments": dict(arguments)}}:
            text = json.dumps(arguments, ensure_ascii=False)
            return call | {"function": call["function"] | {"arguments": text}}
    return call


def reads_parts(template: Template, given: dict) -> bool:
    """Does the template write the text of a part, rather than fail, leave it out, or print the list?"""
    probe = {"role": "user", "content": [{"type": "text", "text": MARK}]}
    try:
        text = template.render(given | {"messages": [probe]})
    except TemplateOverrun:
        raise
    except Exception:
        return False
    return MARK in text and f"'{MARK}'" not in text and f'"{MARK}"' not in text


def join_parts(message: dict) -> dict:
    """Return the message with its parts joined. Raises ValueError for a part that is no text."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"it takes texts only, and a content has a part of type {part.get('type')!r:.60}")
    return message | {"content": "\n".join(part["text"] for part in parts)}
