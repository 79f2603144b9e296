"""TextStream: the text of one request, while its tokens arrive, up to a stop string."""

import math
import re
from collections.abc import Set
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from disagg.front.library_errors import refusing
from disagg.front.stop_search import StopSearch

IDS = range(2**32)  # token ids that the library accepts
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token that stands for one byte, in vocabularies with byte fallback


class Words(NamedTuple):
    """What a tokenizer says of its tokens, by id."""

    added: dict[int, str]
    special: dict[int, str]  # those of them that are no text
    bytes: frozenset[int]  # with byte fallback: tokens that stand for one byte


@lru_cache(maxsize=8)
def read_words(tokenizer: Tokenizer) -> Words:
    """Read once what every stream needs: the library takes 5 ms for it."""
    added = tokenizer.get_added_tokens_decoder()
    decoder = tokenizer.decoder
    falls_back = decoder is not None and b"ByteFallback" in decoder.__getstate__()
    byte_tokens = (id for word, id in tokenizer.get_vocab().items() if BYTE.fullmatch(word)) if falls_back else ()
    return Words(
        {token: word.content for token, word in added.items()},
        {token: word.content for token, word in added.items() if word.special},
        frozenset(byte_tokens),
    )


class TextStream:
    """One request's text as its tokens arrive, cut at its stop strings.

    `text[:shown]` may be shown: it never changes, and the final text begins with it. Held back is the end of the text
    that could still become a stop string or part of a character. With byte fallback, bytes wait for the next token
    that is none: until then, one wrong byte turns all of them into U+FFFD.

    Special tokens are not part of the text, but a stop string may name them. Without a tokenizer the text stays empty.
    If the library decodes all tokens at once into a text that begins otherwise than the shown one, the shown one stays.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: list[str],
        marks: Set[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """`marks`: added tokens that are kept in the text, special or not, and whose places are noted in `places`.

        A stop string may contain a whole mark. It never matches a part of one, or text that only a mark interrupts.
        The first `min_tokens` tokens complete no stop string.
        """
        self._tokenizer = tokenizer
        self._words = read_words(tokenizer) if tokenizer is not None else Words({}, {}, frozenset())
        self._marks = {token: self._words.added[token] for token in marks if token in self._words.added}
        self._stream = DecodeStream(skip_special_tokens=False)
        self._before: list[int] = []  # the tokens just before `_pending`, because decoding depends on them
        self._pending: list[int] = []  # tokens whose text is not there yet, or may still change
        self._settled = 0  # how much of the text cannot change any more
        self._torn = False  # may the streamed text differ from the text of all tokens decoded at once?
        self.closed = False
        self._stop = stop
        self._stops = StopSearch(stop)
        self._marked = MarkedText(self._words, self._marks, stop)
        self._min_tokens = min_tokens
        self.token_ids: list[int] = []
        self.places: list[tuple[int, int]] = []  # of marks: where in the text, token
        self.text = ""  # it is final once it is closed
        self.shown = 0  # characters

    def push(self, token: int) -> bool:
        """Add a token. Returns True if a stop string is complete; the text then ends just before it, and is closed.

        Never raises, whatever the token is.
        """
        self.token_ids.append(token)
        settled = self._settled
        if self._tokenizer is not None and token in IDS and not self._is_hidden(token):
            self._grow(self._tokenizer, token)
        mark = self._note(token, settled) if token in self._marks else None
        if not self._stop:
            self.shown = self._settled
        elif (end := self._search(token, settled, mark)) is not None:
            self._cut(end)
            return True
        return False

    def close(self) -> None:
        """End the text. An incomplete character becomes U+FFFD."""
        if self.closed:
            return
        self.closed = True
        rest = self._rest()
        if rest is not None:
            self.text = self.text[: self._settled] + rest
        if (whole := self._whole()) is not None:
            self.text = whole
        if (end := self._stops.find(self.text[self._settled :])) is not None:
            self.text = self.text[:end]
        self.shown = len(self.text)

    def _is_hidden(self, token: int) -> bool:
        return token in self._words.special and token not in self._marks

    def _grow(self, tokenizer: Tokenizer, token: int) -> None:
        """Add the text that this token adds. There is none if the token ends within a character."""
        self._pending.append(token)
        try:
            piece = self._stream.step(tokenizer, token)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            piece = self._begin_again()
        if not piece:
            return
        ends_bytes = len(self.text) > self._settled and token not in self._words.bytes
        if ends_bytes and (rest := self._rest()) is not None:  # what the library gave for the bytes may be wrong
            self.text, piece = self.text[: self._settled], rest
        text, self.text = self.text, ""  # a string with one reference grows in place, others are copied
        text += piece
        self.text = text
        if token not in self._words.bytes:
            self._settled = len(text)
            self._before, self._pending = self._pending, []

    def _begin_again(self) -> str:
        """Replace the library's stream, which has failed. Takes unsettled text back, and returns what replaces it.

        The stream fails if a token changes the text of earlier ones, for example if bytes turn out to be no character.
        """
        self._torn, piece = True, self._rest()
        self.text = self.text[: self._settled]
        if piece is None:  # later tokens would not make them decodable
            self._pending.clear()
        self._stream = DecodeStream(ids=self._pending, skip_special_tokens=False)
        return "" if piece is None or piece.endswith("\ufffd") else piece  # the new stream will give an incomplete one

    def _rest(self) -> str | None:
        """Decode the pending tokens behind those before them. Returns None if the library fails."""
        before, both = self._decode(self._before), self._decode(self._before + self._pending)
        if before is None or both is None or not both.startswith(before):
            return self._decode(self._pending)
        return both[len(before) :]

    def _whole(self) -> str | None:
        """Decode all tokens at once. Returns None if the library fails, or contradicts the shown text."""
        whole = self._decode(self.token_ids)
        return whole if whole is not None and whole.startswith(self.text[: self.shown]) else None

    def _decode(self, tokens: list[int]) -> str | None:
        """Decode tokens without the hidden ones. Returns None if the library fails, or there is none."""
        if self._tokenizer is None:
            return None
        visible = [token for token in tokens if token in IDS and not self._is_hidden(token)]
        try:
            with refusing("tokens"):
                return self._tokenizer.decode(visible, skip_special_tokens=False)
        except ValueError:
            return None

    def _note(self, token: int, start: int) -> int | None:
        """Return where a mark stands in the text from `start` on, and note it. None if the library has changed it."""
        at = self.text.rfind(self._marks[token], start)
        if at < 0:
            return None
        self.places.append((at, token))
        return at

    def _search(self, token: int, start: int, mark: int | None) -> int | None:
        """Search the text from `start` on. Returns where the first complete stop string begins, or None.

        Text that may still change is searched, too: if a stop string is complete, no later token can change it.
        """
        new, count = self.text[start:], self._settled - start
        if len(self.token_ids) <= self._min_tokens:
            self._stops.ignored = len(self.text)
            self._marked.ignore(token, new)
        visible = count if mark is None else mark - start
        ends = [self._stops.find(new if mark is None else new[:visible]), self._marked.find(token, new)]
        if found := [end for end in ends if end is not None]:
            return min(found)
        self._stops.push(new[:visible])
        if mark is not None:
            self._stops.skip(count - visible)
        self._marked.push(token, new[:count])
        self.shown = int(min(self._settled, self._stops.held, self._marked.held))
        return None

    def _cut(self, end: int) -> None:
        """Close the text at a stop string that begins at `end`."""
        self.text = self.text[:end]
        if self._torn and (whole := self._whole()) is not None:
            starts = ((stop, max(self.shown, self._stops.ignored - len(stop) + 1)) for stop in self._stop)
            ends = [end for stop, start in starts if (end := whole.find(stop, start)) >= 0]
            self.text = whole[: min(ends)] if ends else self.text
        self.closed, self.shown = True, len(self.text)


class MarkedText:
    """The text with hidden special tokens written out, to find those stop strings that contain a whole one or a mark.

    Positions that it returns are those in the visible text.
    """

    def __init__(self, words: Words, marks: dict[int, str], stop: list[str]) -> None:
        self._words, self._marks = words, marks
        written_out = [*words.special.values(), *marks.values()] if stop else []
        self._stop = [text for text in stop if any(word in text for word in written_out)]
        self._search = StopSearch(self._stop)
        self._hidden: list[tuple[int, int]] = []  # where hidden tokens begin and end, from `held` on
        self._length = 0
        self._gone = 0  # characters of hidden tokens before `held`

    @property
    def held(self) -> int | float:
        """From here on, the visible text could still become such a stop string."""
        return self._visible(self._search.held) if self._stop else math.inf

    def ignore(self, token: int, piece: str) -> None:
        """From now on, ignore stop strings that end at or before this token."""
        self._search.ignored = self._length + len(piece) + len(self._word(token))

    def find(self, token: int, piece: str) -> int | None:
        """Return where the first complete stop string begins after a token with its visible text, or None."""
        if not self._stop:
            return None
        at = self._search.find(piece + self._word(token))
        return None if at is None else self._visible(at)

    def push(self, token: int, piece: str) -> None:
        """Add a token and its visible text, in which `find` has found no stop string that counts."""
        if not self._stop:
            return
        self._length += len(piece)
        if word := self._word(token):
            self._hidden.append((self._length, self._length + len(word)))
            self._length += len(word)
        self._search.push(piece + word)
        while self._hidden and self._hidden[0][1] <= self._search.held:
            begin, end = self._hidden.pop(0)
            self._gone += end - begin

    def _word(self, token: int) -> str:
        return "" if token in self._marks else self._words.special.get(token, "")

    def _visible(self, at: int) -> int:
        """Turn a position at or behind `held` into one in the visible text."""
        return at - self._gone - sum(min(at, end) - begin for begin, end in self._hidden if begin < at)
