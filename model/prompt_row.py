"""Prompt row: the log probabilities of one token of a prompt, as bytes.

A row has 2 x (k + 1) words of 32 bits: the ids (int32) in the order of `top_logprobs`, then their log probabilities
(float32). Behind the GPU, words are little-endian.
"""

import numpy as np

MAX_LOGPROBS = 20  # likeliest tokens that a request may ask for, per token
SLICE = 256  # rows of logits that `prompt_logprobs.py` makes at a time
WORD = 4  # bytes


def row_bytes(top: int, vocab_size: int) -> int:
    """Return the bytes of a row with the `top` likeliest of `vocab_size` tokens."""
    return 2 * (min(top, vocab_size) + 1) * WORD


def pack(words: np.ndarray, top: int) -> bytes:
    """Return rows [n, 2, K + 1] int32 as bytes. Each keeps its `top` likeliest tokens and its own."""
    if top < words.shape[2] - 1:
        words = np.concatenate((words[..., :top], words[..., -1:]), axis=2)
    return words.astype("<i4", copy=False).tobytes()


def unpack(data: bytes | bytearray, top: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [n, k + 1] int32 and log probabilities [n, k + 1] float32 of n whole rows."""
    words = np.frombuffer(data, "<i4").reshape(-1, 2, row_bytes(top, vocab_size) // (2 * WORD))
    return words[:, 0], words[:, 1].view("<f4")
