"""Messages, made ready for a chat template as transformers' `apply_chat_template` does it.

Clients write messages for OpenAI's API, and templates read them in several ways. Three rules bring them together:

- Fields that are null are left out. Templates of DeepSeek-V3's time need the null content of a tool call instead. So
  if the template refuses such messages, they are rendered once more, with `content` null where there is none.
- Reasoning is there under the names `reasoning_content` and `thinking`, whichever of three names the client used.
- Content in parts goes to a template that reads parts. For any other template the texts are joined by line breaks.
"""

from typing import Any, Protocol

from disagg.front.chat_template import TemplateOverrun

REASONING = ("reasoning_content", "thinking", "reasoning")
MARK = "a text that no template writes by itself"


class Template(Protocol):
    def render(self, given: dict[str, Any], /) -> str:
        """Return the prompt's text. Raises an exception if the template refuses the variables `given`."""
        ...


def render(template: Template, messages: list[dict], given: dict) -> str:
    """Render messages. `given`: the other variables. Raises what `template.render` does, or ValueError for parts."""
    if any(isinstance(message.get("content"), list) for message in messages) and not reads_parts(template, given):
        messages = list(map(join_parts, messages))
    clean = [name_reasoning(drop_nulls(message)) for message in messages]
    try:
        return template.render(given | {"messages": clean})
    except TemplateOverrun:
        raise
    except Exception as refused:
        if all("content" in message for message in clean):
            raise
        try:
            return template.render(given | {"messages": [{"content": None} | message for message in clean]})
        except Exception:
            raise refused from None


def drop_nulls(message: dict) -> dict:
    return {name: value for name, value in message.items() if value is not None}


def name_reasoning(message: dict) -> dict:
    """Return the message with its reasoning, if any, as `reasoning_content` and `thinking`."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


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
