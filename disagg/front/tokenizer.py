"""The tokenizer of a Hugging Face folder: prompts and messages to token ids, and token ids to text.

Neither the folder nor the texts are trusted. A text that is certainly too long is refused before tokenising, which
takes a second and 200 MB per megabyte. An error or panic in the tokenizers library fails only one request.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from disagg.front.chat_template import ChatTemplate
from model.config import read_json, read_text, shown

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NO_CHAT = "this model has no chat template"
MOST_EXPANSION = 64  # characters that a normalizer or a decoder may make from one
MOST_ADDED = 64  # tokens that a post-processor may add to a text
MOST_TOKEN_BYTES = 2**16
CHARACTER_BYTES = 4  # per character, at most; a normalizer may turn them into one byte
ON_TRIAL = 2**20  # characters; a longer text is first tokenised in pieces, to see whether it may fit
PIECE = 2**16  # characters per piece
IDS = range(2**32)  # token ids that the library accepts


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error into a ValueError: `what`, and the reason.

    The library raises bare Exceptions, and a BaseException if it panics. (It also prints panics.)
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from None


class PromptEncoder:
    """Turns text or messages into token ids, with a `tokenizers.Tokenizer` and a chat template."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: Any, max_tokens: int | None = None, no_chat: str = NO_CHAT
    ) -> None:
        """`max_tokens`: limit per prompt (None: no limit). `no_chat`: why `chat_template` is None, for the error."""
        self.tokenizer, self.chat_template, self.no_chat = tokenizer, chat_template, no_chat
        self.max_tokens, self.longest = max_tokens, max(longest_token(tokenizer), CHARACTER_BYTES)
        if tokenizer.normalizer is not None:
            self.longest *= CHARACTER_BYTES

    def text(self, prompt: str) -> list[int]:
        """Tokenise a prompt. Raises ValueError if it cannot be tokenised, or is too long."""
        return self._encode("prompt", prompt, add_special_tokens=True)

    def chat(self, messages: list[dict]) -> list[int]:
        """Render messages with the chat template, and tokenise the result. Raises ValueError as `text` does."""
        if self.chat_template is None:
            raise ValueError(f"messages: {self.no_chat}; give a prompt")
        with refusing("messages"):
            self._check_size(characters(messages), "characters")
        with refusing("messages: the chat template refuses them"):
            text = self.chat_template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        return self._encode("messages", text, add_special_tokens=False)  # the template adds them itself

    def _encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"{field}: not Unicode, {error.reason} at character {error.start}") from None
        with refusing(field):
            self._check_size(size, "bytes")
            self._try_pieces(text)
        with refusing(f"{field}: the tokenizer refuses it"):
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
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

    def _try_pieces(self, text: str) -> None:
        """Raise ValueError if the first pieces of a long text already have too many tokens.

        A text may pass `_check_size` and still be much too long. Pieces show that in less time and memory. The limit is
        generous: twice `max_tokens`, plus, per cut, as many tokens as the cut token has bytes.
        """
        if self.max_tokens is None or len(text) <= ON_TRIAL:
            return
        count, limit = 0, 2 * self.max_tokens
        for start in range(0, len(text), PIECE):
            count += len(self.tokenizer.encode(text[start : start + PIECE], add_special_tokens=False).ids)
            limit += self.longest
            if count > limit:
                raise ValueError(
                    f"its first {start + PIECE:,} of {len(text):,} characters make about {count:,} tokens; "
                    f"max_model_len is {self.max_tokens}"
                )


def characters(value: Any) -> int:
    """Count the characters of all strings in a JSON value, except keys."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return sum(map(characters, value))


def longest_token(tokenizer: Tokenizer) -> int:
    """Return the bytes of the longest token, or more: some vocabularies spell a byte with two."""
    return max((len(token.encode()) for token in tokenizer.get_vocab()), default=0)


def load_tokenizer(folder: str | Path, max_tokens: int | None = None, stand_in: bool = False) -> PromptEncoder:
    """Load the tokenizer and the chat template of a folder. Raises ValueError if tokenizer.json cannot be used.

    If there is no usable chat template, only `messages` are refused. An unusable one also causes a warning on stderr.
    `max_tokens`: as in `PromptEncoder`. `stand_in`: if there is no tokenizer, take one whose tokens 0..255 are bytes.
    """
    folder = Path(folder)
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file() and stand_in:
        return PromptEncoder(_byte_tokenizer(), None, max_tokens)
    if not path.is_file():
        raise ValueError(f"--model {folder}: it has no tokenizer.json")
    text = read_text(path)
    with refusing(str(path)):
        tokenizer = Tokenizer.from_str(text)
        _check_bounds(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()  # prompts that are too long are refused, not cut
    about = read_json(settings) if settings.is_file() else {}
    try:
        template, no_chat = _chat_template(folder, about), NO_CHAT
    except ValueError as error:
        template, no_chat = None, f"this model's chat template cannot be used ({error})"
        print(f"warning: {error}; requests with messages are refused", file=sys.stderr, flush=True)
    return PromptEncoder(tokenizer, template, max_tokens, no_chat)


def _byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token for each byte, for models without weights of their own."""
    spelled = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(spelled)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _check_bounds(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer can turn a short text into a very long one."""
    for what, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        if part is not None and (most := _expansion(json.loads(part.__getstate__()))) > MOST_EXPANSION:
            raise ValueError(f"its {what} can make {most:,} characters of one; at most {MOST_EXPANSION} are taken")
    if (added := tokenizer.num_special_tokens_to_add(False)) > MOST_ADDED:
        raise ValueError(f"its post_processor adds {added:,} tokens to a text; at most {MOST_ADDED} are taken")
    if (longest := longest_token(tokenizer)) > MOST_TOKEN_BYTES:
        raise ValueError(f"its longest token has {longest:,} bytes; at most {MOST_TOKEN_BYTES:,} are taken")


def _expansion(part: dict) -> int:
    """Return the most characters that a part of a tokenizer makes from one. Unicode normalization is not counted."""
    match part:
        case {"normalizers": parts} | {"decoders": parts}:
            return math.prod(map(_expansion, parts))
        case {"type": "Prepend", "prepend": text} | {"type": "Replace", "pattern": {"Regex": _}, "content": text}:
            return 1 + len(text)  # a regex may match the empty string before every character
        case {"type": "Replace", "content": text}:
            return max(1, len(text))
    return 1


def _chat_template(folder: Path, settings: dict) -> ChatTemplate | None:
    path, source = folder / "tokenizer_config.json", settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        path = folder / "chat_template.jinja"
        source = read_text(path)
    if not source:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{path}: chat_template is {shown(source)}; it must be a text")
    words = {}
    for name in SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:  # otherwise the template would write "None"
            words[name] = token
    with refusing(f"{path}: the chat template cannot be compiled"):
        return ChatTemplate(source, words)


class TextStream:
    """One request's text as its tokens arrive, cut at its stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._unshown: list[int] = []  # tokens since the text last grew
        self._torn = False  # may the streamed text differ from the text of all tokens decoded at once?
        self.token_ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> bool:
        """Add a token. Returns True if a stop string is complete; the text then ends just before it.

        Never raises, whatever the token is.
        """
        self.token_ids.append(token)
        piece = self._step(token)
        if not piece:
            return False
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += piece
        end = self._end(self.text, start)
        if end is None:
            return False
        whole = self._decode(self.token_ids) if self._torn else None
        if whole is not None and (at := self._end(whole)) is not None:
            self.text, end = whole, at
        self.text = self.text[:end]
        return True

    def close(self) -> None:
        """End the text. An incomplete character becomes U+FFFD."""
        whole = self._decode(self.token_ids)
        if whole is not None:
            self.text = whole

    def _step(self, token: int) -> str:
        """Return the text that this token adds. It is empty if the token ends within a character."""
        if token not in IDS:
            return ""
        self._unshown.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            piece = self._begin_again()
        if piece:
            self._unshown.clear()
        return piece or ""

    def _begin_again(self) -> str:
        """Replace the library's stream, which has failed. Returns the text of the tokens that were not shown yet.

        The stream fails if a token changes the text of earlier ones, for example if bytes turn out to be no character.
        The text shown so far stays until all tokens are decoded at once. Later tokens are decoded without it.
        """
        self._torn, piece = True, self._decode(self._unshown)
        if piece is None:  # later tokens would not make them decodable
            self._unshown.clear()
        self._stream = DecodeStream(ids=self._unshown, skip_special_tokens=True)
        return "" if piece is None or piece.endswith("\ufffd") else piece  # the new stream will give an incomplete one

    def _decode(self, tokens: list[int]) -> str | None:
        """Decode tokens. Returns None if the library fails."""
        try:
            with refusing("tokens"):
                return self._tokenizer.decode([token for token in tokens if token in IDS], skip_special_tokens=True)
        except ValueError:
            return None

    def _end(self, text: str, start: int = 0) -> int | None:
        """Return where the first stop string begins, if there is one."""
        return min((at for stop in self._stop if (at := text.find(stop, start)) >= 0), default=None)
