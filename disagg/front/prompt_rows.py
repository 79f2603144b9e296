"""PromptRows: log probabilities of one request's prompt, as its replica sends them before the first token."""

import numpy as np

from disagg.request import Request
from model.prompt_row import row_bytes, unpack
from model.sampling import logprob_pairs

Pairs = list[tuple[int, float]]  # (token, log probability): the k likeliest, and the prompt's own token


class PromptRows:
    """The bytes received so far: rows of `model/prompt_logprobs.py` for all tokens but the first, cut anywhere."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self._prompt, self._top, self._vocab_size = request.prompt, request.prompt_logprobs, vocab_size
        per_row = row_bytes(self._top, vocab_size) if self._top is not None else 0
        self._size = (len(self._prompt) - 1) * per_row
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        """Append more rows. Raises ValueError if there are too many, and keeps none of them."""
        if len(self._data) + len(data) > self._size:
            raise ValueError(f"sent over {self._size} bytes of prompt log probabilities")
        self._data += data

    def clear(self) -> None:
        """Forget the rows of an attempt that failed before its first token: the next attempt sends all again."""
        self._data.clear()

    def check_complete(self) -> None:
        """Raise ValueError if rows are missing. All must be here before the first token."""
        if len(self._data) != self._size:
            raise ValueError(f"sent {len(self._data)} bytes of prompt log probabilities, not {self._size}")

    def encode(self) -> list[Pairs | None]:
        """Return the answer's field: None for the first token, then pairs per token.

        Raises ValueError if the rows are not those of this prompt.
        """
        assert self._top is not None, "the request did not ask"
        self.check_complete()
        ids, values = unpack(self._data, self._top, self._vocab_size)
        if ids[:, -1].tolist() != self._prompt[1:] or ((ids < 0) | (ids >= self._vocab_size)).any():
            raise ValueError("sent log probabilities of other tokens than the prompt's")
        if not ((values <= 0) & np.isfinite(values)).all():
            raise ValueError("sent prompt log probabilities that are not finite numbers up to 0")
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        return [None, *(logprob_pairs(row_ids, row_values, self._top) for row_ids, row_values in rows)]
