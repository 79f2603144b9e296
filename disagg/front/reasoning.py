"""Reasoning: splits a chat answer into what the model thinks and what it says.

Models in the manner of R1 write their thoughts between two marks, which are tokens of their own. Some templates end the
prompt with the first mark, so that the answer begins inside. V3.1's without thinking ends it with the second one.
"""

from typing import NamedTuple

BEGIN, END = "<think>", "</think>"


class Piece(NamedTuple):
    """A piece of an answer's text, in order."""

    text: str
    is_mark: bool = False  # is the text one mark, made by its token? The same letters from other tokens are text


def starts_inside(prompt_tail: str) -> bool:
    """Does an answer behind this prompt begin inside the thoughts? `prompt_tail`: the end of the rendered prompt."""
    return prompt_tail.rstrip().endswith(BEGIN)


class Reasoning:
    """Says to which part each piece of an answer belongs. A mark that changes nothing is text."""

    def __init__(self, inside: bool) -> None:
        self.inside = inside

    def push(self, piece: Piece) -> str:
        """Return "reasoning", "content", or "mark" for a mark that begins or ends the reasoning."""
        if piece.is_mark and piece.text == (END if self.inside else BEGIN):
            self.inside = not self.inside
            return "mark"
        return "reasoning" if self.inside else "content"
