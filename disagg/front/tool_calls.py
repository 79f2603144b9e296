"""ToolCalls: finds the tool calls in an answer while its pieces arrive.

A call is given when it is complete. Everything that breaks the syntax is text: no character of an answer is lost.
"""

from collections.abc import Iterator
from typing import NamedTuple

from disagg.front.reasoning import Piece
from disagg.front.tool_syntax import Call, Syntax


class Part(NamedTuple):
    """A part of an answer: in order, their texts are the whole output of the model."""

    kind: str  # "reasoning", "content", or "syntax": marks and calls
    text: str
    call: Call | None = None  # that this text is


class ToolCalls:
    """Turns pieces into content and calls.

    White space before a call, and around the marks of calls, belongs to the syntax. So it waits for what follows.
    """

    def __init__(self, syntax: Syntax | None, tools: list[dict]) -> None:
        """`syntax`: the model's; None if it writes no calls, or must not. `tools`: the request's."""
        self._syntax, self._tools = syntax, tools
        self._held = ""  # text that may be syntax
        self._body: list[Piece] | None = None  # of the call that has begun
        self._between = False  # have only marks, calls and white space come since a call or a section began?
        self._called = False  # has a call come since then?
        self.count = 0  # calls so far

    def push(self, piece: Piece) -> Iterator[Part]:
        if self._syntax is None:
            yield Part("content", piece.text)
        elif self._body is not None:
            yield from self._in_call(self._syntax, self._body, piece)
        else:
            yield from self._outside(self._syntax, piece)

    def close(self) -> Iterator[Part]:
        """End the answer, or this part of it. A call that is not complete is text."""
        if self._body is not None:
            yield from self._break(self._body)
        if self._held:
            yield Part("syntax" if self._called and self._held.isspace() else "content", self._held)
        self._held, self._between, self._called = "", False, False

    def _in_call(self, syntax: Syntax, body: list[Piece], piece: Piece) -> Iterator[Part]:
        if not piece.is_mark or piece.text in syntax.inner:
            body.append(piece)
        elif piece.text == syntax.call[1]:
            try:
                call = self._read(syntax, body)
            except ValueError:
                body.append(Piece(piece.text))
                yield from self._break(body)
                return
            yield Part("syntax", self._held + "".join(inner.text for inner in body) + piece.text, call)
            self._held, self._body, self._between, self._called = "", None, True, True
            self.count += 1
        else:  # another call begins, or a mark that no call has
            yield from self._break(body)
            yield from self._outside(syntax, piece)

    def _read(self, syntax: Syntax, body: list[Piece]) -> Call:
        """Read a complete call. Raises ValueError if it breaks the syntax."""
        marks = [piece.text for piece in body if piece.is_mark]
        texts: list[list[str]] = [[]]
        for piece in body:
            if piece.is_mark:
                texts.append([])
            else:
                texts[-1].append(piece.text)
        return syntax.read(["".join(text) for text in texts], marks, self._tools)

    def _break(self, body: list[Piece]) -> Iterator[Part]:
        """Give a call up, whose syntax is broken."""
        self._body = None
        yield from self._text("".join(piece.text for piece in body))

    def _outside(self, syntax: Syntax, piece: Piece) -> Iterator[Part]:
        begin, end = syntax.section or (None, None)
        mark = piece.text if piece.is_mark else None
        if mark == syntax.call[0]:
            self._held, self._body, self._between = self._held + piece.text, [], True
        elif mark is not None and mark == begin:
            self._held, self._between = self._held + piece.text, True
        elif mark is not None and mark == end and self._called:
            yield Part("syntax", self._held + piece.text)
            self._held = ""
        elif self._between and mark is None and piece.text.isspace():
            self._held += piece.text
        else:
            yield from self._text(piece.text)

    def _text(self, text: str) -> Iterator[Part]:
        """Give text, but hold white space at its end: a call may follow."""
        text, self._between, self._called = self._held + text, False, False
        content = text.rstrip()
        self._held = text[len(content) :]
        if content:
            yield Part("content", content)
