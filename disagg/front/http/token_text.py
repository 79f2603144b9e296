"""TokenText: single tokens as OpenAI's log probabilities show them."""

from tokenizers import Tokenizer

from disagg.front.tiktoken_file import byte_letters


class TokenText:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.get_added_tokens_decoder() if tokenizer is not None else {}
        decoder = str(tokenizer.decoder) if tokenizer is not None else ""
        letters = byte_letters() if "ByteLevel" in decoder else []
        self._bytes = {letter: byte for byte, letter in enumerate(letters)}

    def bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for. A special token stands for its name."""
        word = self._tokenizer.id_to_token(token) if self._tokenizer is not None else None
        if word is None:
            return b""
        if token not in self._special and all(letter in self._bytes for letter in word):
            return bytes(self._bytes[letter] for letter in word)
        if token in self._special:
            return word.encode()
        assert self._tokenizer is not None
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def text(self, token: int) -> str:
        """Return a token's text. Bytes that are no text of their own are written out, as in `bytes:\\xe2\\x80`."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of all tokens together, special tokens written out."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False) if self._tokenizer is not None else ""
