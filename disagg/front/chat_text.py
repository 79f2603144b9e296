"""ChatText: the answer to messages as OpenAI's API has it: content, reasoning_content and tool_calls.

The one place through which the text of a chat answer passes, streamed or whole.
"""

from collections.abc import Iterator

from tokenizers import Tokenizer

from disagg.front.library_errors import refusing
from disagg.front.reasoning import BEGIN, END, Piece, Reasoning, starts_inside
from disagg.front.text_stream import TextStream, read_words
from disagg.front.tool_calls import Part, ToolCalls
from disagg.front.tool_syntax import find_syntax

TAIL = 8  # tokens at a prompt's end that may show where the answer begins


class ChatFormat:
    """What a model's vocabulary says of its answers: whether it thinks, and how it writes calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.words = read_words(tokenizer).added
        self.tokens = {word: token for token, word in self.words.items()}
        self.thinks = BEGIN in self.tokens and END in self.tokens
        self.syntax = find_syntax(self.tokens)

    def marks(self, tools: list[dict] | None) -> frozenset[int]:
        """Return the marks that an answer's `TextStream` must keep. `tools`: the request's, if it may call them."""
        words = [BEGIN, END] if self.thinks else []
        if tools and self.syntax is not None:
            words += self.syntax.marks
        return frozenset(self.tokens[word] for word in words)

    def starts_inside(self, prompt: list[int]) -> bool:
        """Does the answer to this prompt begin with reasoning?"""
        if not self.thinks:
            return False
        try:
            with refusing("prompt"):
                return starts_inside(self.tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False))
        except ValueError:  # the library fails
            return False


class ChatText:
    """Reads the shown text of one answer in deltas. The whole message is their concatenation (`whole_message`)."""

    def __init__(self, form: ChatFormat, stream: TextStream, prompt: list[int], tools: list[dict] | None) -> None:
        """`stream`: made with `form.marks(tools)`. `tools`: the request's; None or empty if it may call none."""
        self._form, self._stream = form, stream
        self._reasoning = Reasoning(form.starts_inside(prompt))
        self._calls = ToolCalls(form.syntax if tools else None, tools or [])
        self._read = 0  # characters of the stream's text
        self._places = 0  # marks of the stream

    def deltas(self) -> list[dict]:
        """Return what was shown since the last call: each delta has one of the three fields.

        A delta of `tool_calls` has one complete call. Call this once more after the stream has closed.
        """
        first = self._calls.count
        made: list[dict] = []
        for part in self.parts():
            if part.call is not None:
                id, name, arguments = part.call
                function = {"name": name, "arguments": arguments}
                made.append({"tool_calls": [{"index": first, "id": id, "type": "function", "function": function}]})
                first += 1
            elif part.kind != "syntax":
                field = "content" if part.kind == "content" else "reasoning_content"
                if made and field in made[-1]:
                    made[-1][field] += part.text
                else:
                    made.append({field: part.text})
        return made

    def finish_reason(self, reason: str) -> str:
        """Return OpenAI's reason: an answer that stopped by itself, and has calls, stopped for them."""
        return "tool_calls" if reason == "stop" and self._calls.count else reason

    def parts(self) -> Iterator[Part]:
        """Yield what was shown since the last call. In order, the texts of all parts are the stream's text."""
        for piece in self._pieces():
            kind = self._reasoning.push(piece)
            if kind == "content":
                yield from self._calls.push(piece)
            elif kind == "mark":
                yield from self._calls.close()
                yield Part("syntax", piece.text)
            else:
                yield Part(kind, piece.text)
        if self._stream.closed:
            yield from self._calls.close()

    def _pieces(self) -> Iterator[Piece]:
        """Cut the newly shown text at the marks. A mark that is shown in part waits for the rest of it."""
        text, shown = self._stream.text, self._stream.shown
        while self._places < len(self._stream.places):
            at, token = self._stream.places[self._places]
            end = at + len(self._form.words[token])
            if end > shown:
                if not self._stream.closed:
                    shown = min(shown, at)
                break
            self._places += 1
            if text.startswith(self._form.words[token], at):  # else the library has changed it
                if at > self._read:
                    yield Piece(text[self._read : at])
                yield Piece(text[at:end], True)
                self._read = end
        if shown > self._read:
            yield Piece(text[self._read : shown])
            self._read = shown


def whole_message(deltas: list[dict]) -> dict:
    """Concatenate the deltas of an answer into its message. Content is None beside calls without any."""
    message: dict = {"role": "assistant", "content": ""}
    for delta in deltas:
        for field, value in delta.items():
            message[field] = message[field] + value if field in message else value
    if "tool_calls" in message:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in message["tool_calls"]
        ]
    return message
