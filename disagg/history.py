"""History: a sequence's tokens as arrays that grow with it, for its logits processors."""

import numpy as np

from disagg.request import Request

NONE = np.zeros(0, np.int64)


class History:
    """What the logits processors of one request need to know, all int64 but `bias`.

    Making it once per sequence keeps a step's work on the host small: a list of tokens becomes an array only once.
    """

    def __init__(self, request: Request, stop_tokens: frozenset[int]) -> None:
        self._prompt_len = len(request.prompt) - request.resumed
        self.biased = np.fromiter(request.logit_bias, np.int64)  # tokens
        self.bias = np.fromiter(request.logit_bias.values(), np.float32)
        self.prompt = NONE  # distinct tokens of the prompt, if repetition_penalty asks for them
        if request.repetition_penalty != 1:
            self.prompt = np.unique(np.array(request.prompt[: self._prompt_len], np.int64))
        self._generated = np.empty(request.resumed + request.max_tokens if request.has_penalties else 0, np.int64)
        self._count = 0
        self._stop_tokens, self._min_tokens = np.array(sorted(stop_tokens), np.int64), request.min_tokens

    def generated(self, tokens: list[int], end: int) -> np.ndarray:
        """Return those of the sequence's first `end` tokens that were generated, by this attempt or an earlier one.

        `tokens`: all that the host has seen, at least `end`.
        """
        count = end - self._prompt_len
        if count > self._count:
            self._generated[self._count : count] = tokens[self._prompt_len + self._count : end]
            self._count = count
        return self._generated[:count]

    def banned(self, position: int) -> np.ndarray:
        """Return the tokens that must not stand at this position."""
        return self._stop_tokens if position - self._prompt_len < self._min_tokens else NONE
