"""Digests: 64 bits that stand for a page's tokens, those of all pages before it, and the request's `cache_salt`.

Ranks tell the router with them what they have in their caches. Two pages with one digest cost a needless preference and
never a wrong token, because a cache finds its pages by their tokens.
"""

from array import array
from hashlib import blake2b

from model.pages import PAGE

DIGEST = array("Q").itemsize  # bytes
TOKEN = array("i").itemsize


def root(salt: str) -> bytes:
    """Return what stands before a prompt's first page."""
    return blake2b(salt.encode(), digest_size=DIGEST).digest()


def following(before: bytes, tokens: bytes) -> bytes:
    """Return the digest of a page with these tokens. `before`: that of the page before, or a root."""
    return blake2b(before + tokens, digest_size=DIGEST).digest()


def as_numbers(digests: bytes) -> array:
    """Raises ValueError if it is not a whole number of digests."""
    numbers = array("Q")
    numbers.frombytes(digests)
    return numbers


def page_digests(prompt: list[int], salt: str, most: int) -> array:
    """Return the digests of a prompt's first whole pages, up to `most` of them."""
    count = min(len(prompt) // PAGE, most)
    raw, size = array("i", prompt[: count * PAGE]).tobytes(), PAGE * TOKEN
    before, digests = root(salt), []
    for at in range(0, len(raw), size):
        before = following(before, raw[at : at + size])
        digests.append(before)
    return as_numbers(b"".join(digests))
