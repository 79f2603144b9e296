"""TextStream: the text of one request, while its tokens arrive, up to a stop string."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from disagg.front.library_errors import refusing

IDS = range(2**32)  # token ids that the library accepts


class TextStream:
    """One request's text as its tokens arrive, cut at its stop strings.

    Special tokens are not part of the text, but a stop string may name them. Without a tokenizer the text stays empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: list[str], min_tokens: int = 0) -> None:
        """The first `min_tokens` tokens complete no stop string."""
        self._tokenizer, self._stop, self._min_tokens = tokenizer, stop, min_tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._unchecked = 0  # length of the text of the first min_tokens tokens
        self._unshown: list[int] = []  # tokens since the text last grew
        self._torn = False  # may the streamed text differ from the text of all tokens decoded at once?
        self._marked = MarkedText(tokenizer, stop) if tokenizer is not None else None
        self.token_ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> bool:
        """Add a token. Returns True if a stop string is complete; the text then ends just before it.

        Never raises, whatever the token is.
        """
        self.token_ids.append(token)
        piece = self._step(token)
        if len(self.token_ids) <= self._min_tokens:
            self.text += piece
            self._unchecked = len(self.text)
            if self._marked is not None:
                self._marked.skip(token, piece)
            return False
        ends = []
        if self._marked is not None and (at := self._marked.push(token, piece)) is not None:
            ends.append(at)
        if piece:
            longest = max(map(len, self._stop), default=0)
            start = max(0, len(self.text) - longest)
            self.text += piece
            if (at := self._end(self.text, start)) is not None:
                ends.append(at)
        if not ends:
            return False
        end, whole = min(ends), self._decode(self.token_ids) if self._torn else None
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
        if token not in IDS or self._tokenizer is None:
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
        """Decode tokens. Returns None if the library fails, or there is none."""
        if self._tokenizer is None:
            return None
        try:
            with refusing("tokens"):
                return self._tokenizer.decode([token for token in tokens if token in IDS], skip_special_tokens=True)
        except ValueError:
            return None

    def _end(self, text: str, start: int = 0) -> int | None:
        """Return where the first stop string begins, if one ends behind the unchecked text."""
        starts = ((stop, max(start, self._unchecked - len(stop) + 1)) for stop in self._stop)
        return min((at for stop, start in starts if (at := text.find(stop, start)) >= 0), default=None)


class MarkedText:
    """The text with its special tokens written out, to find those stop strings that contain one."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        added = tokenizer.get_added_tokens_decoder() if stop else {}
        self._special = {token: word.content for token, word in added.items() if word.special}
        self._stop = [text for text in stop if any(word in text for word in self._special.values())]
        self._longest = max(map(len, self._stop), default=0)
        self._text = ""
        self._unchecked = 0  # length of the text that was skipped
        self._hidden: list[tuple[int, int]] = []  # where special tokens begin and end in `_text`

    def push(self, token: int, piece: str) -> int | None:
        """Add a token and its visible text.

        Returns None, or the place in the visible text where a complete stop string begins.
        """
        if not self._stop:
            return None
        start = max(0, len(self._text) - self._longest)
        self._add(token, piece)
        starts = ((stop, max(start, self._unchecked - len(stop) + 1)) for stop in self._stop)
        ends = [at for stop, start in starts if (at := self._text.find(stop, start)) >= 0]
        return self._visible(min(ends)) if ends else None

    def skip(self, token: int, piece: str) -> None:
        """Add a token that completes no stop string, whatever its text."""
        if self._stop:
            self._add(token, piece)
            self._unchecked = len(self._text)

    def _add(self, token: int, piece: str) -> None:
        self._text += piece
        if word := self._special.get(token):
            self._hidden.append((len(self._text), len(self._text) + len(word)))
            self._text += word

    def _visible(self, at: int) -> int:
        """Turn a place in `_text` into one in the visible text."""
        return at - sum(min(at, end) - begin for begin, end in self._hidden if begin < at)
