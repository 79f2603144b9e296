"""Prompts and messages to token ids, with the tokenizer and the chat template of a model folder.

The texts are not trusted. A text that is certainly too long is refused before tokenising, which takes a second and
200 MB per megabyte. An error or panic in the tokenizers library fails only one request.
"""

import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from disagg.front.chat_template import ChatTemplate
from disagg.front.library_errors import refusing
from disagg.front.messages import Template, render
from disagg.front.tokenizer_files import (
    longest_token,
    missing_bos,
    read_added_tokens,
    read_settings,
    read_templates,
    read_tokenizer,
)

NO_CHAT = "this model has no chat template"
NO_TOKENIZER = "this model has neither tokenizer.json nor tiktoken.model"
CHARACTER_BYTES = 4  # per character, at most; a normalizer may turn them into one byte
ON_TRIAL = 2**20  # characters; a longer text is first tokenised in pieces, to see whether it may fit
PIECE = 2**16  # characters per piece


class PromptEncoder:
    """Turns text or messages into token ids, with a `tokenizers.Tokenizer` and a chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        chat_template: Template | None,
        max_tokens: int | None = None,
        no_chat: str = NO_CHAT,
        bos: int | None = None,
        sorts_tools: bool = False,
    ) -> None:
        """`tokenizer`: None if the model has none; then every text is refused.

        `max_tokens`: limit per prompt (None: no limit). `no_chat`: why `chat_template` is None, for the error.
        `bos`: the token that each prompt must begin with, if the tokenizer does not add it. `sorts_tools`: are the keys
        of `tools` sorted before they are rendered?
        """
        self.tokenizer, self.chat_template, self.no_chat = tokenizer, chat_template, no_chat
        self.max_tokens, self.bos, self.sorts_tools = max_tokens, bos, sorts_tools
        self.longest = CHARACTER_BYTES  # bytes that a token stands for, at most
        if tokenizer is not None:
            self.longest = max(longest_token(tokenizer), CHARACTER_BYTES)
            if tokenizer.normalizer is not None:
                self.longest *= CHARACTER_BYTES

    def text(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenise a prompt. Raises ValueError if it cannot be tokenised, or is too long."""
        tokens = self._encode("prompt", prompt, add_special_tokens)
        if not add_special_tokens or self.bos is None or tokens[0] == self.bos:
            return tokens
        return [self.bos, *tokens]

    def chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        variables: dict | None = None,
    ) -> list[int]:
        """Render messages with the chat template, and tokenise the result. Raises ValueError as `text` does.

        `variables`: more variables for the template; `add_generation_prompt` is true unless it is one of them.
        """
        if self.tokenizer is None:
            raise ValueError(f"messages: {NO_TOKENIZER}; give prompt_token_ids")
        if self.chat_template is None:
            raise ValueError(f"messages: {self.no_chat}; give a prompt")
        with refusing("messages"):
            self._check_size(characters(messages), "characters")
        with refusing("messages: the chat template refuses them"):
            tools = sort_keys(tools) if self.sorts_tools else tools
            given = {"tools": tools, "documents": documents, "add_generation_prompt": True} | (variables or {})
            text = render(self.chat_template, messages, given)
        return self._encode("messages", text, add_special_tokens=False)  # the template adds them itself

    def _encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(f"{field}: {NO_TOKENIZER}; give prompt_token_ids")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"{field}: not Unicode, {error.reason} at character {error.start}") from None
        with refusing(field):
            self._check_size(size, "bytes")
            self._try_pieces(self.tokenizer, text)
        with refusing(f"{field}: the tokenizer refuses it"):
            ids = encode(self.tokenizer, text, add_special_tokens)
        if not ids:
            raise ValueError(f"{field}: the tokenizer makes no token of it")
        return ids

    def _check_size(self, size: int, unit: str) -> None:
        """Raise ValueError if the text has more bytes than `max_tokens` tokens can stand for.

        Characters that a tokenizer drops, such as white space, count too.
        """
        if self.max_tokens is not None and size > self.max_tokens * self.longest:
            raise ValueError(
                f"its {size:,} {unit} are over max_model_len ({self.max_tokens}) x {self.longest}, the most bytes that "
                "a token of this model stands for"
            )

    def _try_pieces(self, tokenizer: Tokenizer, text: str) -> None:
        """Raise ValueError if the first pieces of a long text already have too many tokens.

        A text may pass `_check_size` and still be much too long. Pieces show that in less time and memory. The limit is
        generous: twice `max_tokens`, plus, per cut, as many tokens as the cut token has bytes.
        """
        if self.max_tokens is None or len(text) <= ON_TRIAL:
            return
        count, limit = 0, 2 * self.max_tokens
        for start in range(0, len(text), PIECE):
            count += len(encode(tokenizer, text[start : start + PIECE], add_special_tokens=False))
            limit += self.longest
            if count > limit:
                raise ValueError(
                    f"its first {start + PIECE:,} of {len(text):,} characters make about {count:,} tokens; "
                    f"max_model_len is {self.max_tokens}"
                )


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Tokenise a text. Other threads go on meanwhile: `encode_batch` releases Python's lock, and `encode` does not."""
    return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids


def characters(value: Any) -> int:
    """Count the characters of all strings in a JSON value, except keys."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return sum(map(characters, value))


def sort_keys(value: Any) -> Any:
    """Sort the keys of all objects in a JSON value."""
    if isinstance(value, dict):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    return list(map(sort_keys, value)) if isinstance(value, list) else value


def load_tokenizer(folder: str | Path, max_tokens: int | None = None, vocab_size: int | None = None) -> PromptEncoder:
    """Load the tokenizer and the chat template of a folder. Raises ValueError if its tokenizer cannot be used.

    A folder without a tokenizer gives an encoder that refuses every text. If there is no usable chat template, only
    `messages` are refused. An unusable one also causes a warning on stderr. `max_tokens`: as in `PromptEncoder`.
    `vocab_size`: the model's; the tokenizer's ids must be below it.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    tokenizer, sorts_tools = read_tokenizer(folder, read_added_tokens(folder, settings), vocab_size)
    if tokenizer is None:
        return PromptEncoder(None, None, max_tokens)
    bos = missing_bos(folder, settings, tokenizer)
    template, no_chat = None, NO_CHAT
    try:
        path, sources, words = read_templates(folder, settings)
        if any(sources.values()):
            with refusing(f"{path}: the chat template cannot be compiled"):
                template = ChatTemplate(sources, words)
    except ValueError as error:
        no_chat = f"this model's chat template cannot be used ({error})"
        print(f"warning: {error}; requests with messages are refused", file=sys.stderr, flush=True)
    return PromptEncoder(tokenizer, template, max_tokens, no_chat, bos, sorts_tools)
