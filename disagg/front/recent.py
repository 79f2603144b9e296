"""Recent: the replicas that served a `session_id`, or a prefix of a prompt, last. Bounded: the oldest go first."""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from model.pages import PAGE

MOST_RECENT = 2**16  # entries, about 150 bytes each
MOST_PAGES = 64  # of a prompt's prefix; hashing them takes about 0.3 ms
DIGEST_BYTES = 16


def prefix_keys(prompt: list[int], salt: str = "") -> list[bytes]:
    """Return one key per whole page of a prompt, from its start, up to MOST_PAGES.

    A key covers its page, all pages before it, and the request's `cache_salt`. So equal keys mean equal prefixes.
    """
    keys, before = [], salt.encode()
    for end in range(PAGE, min(len(prompt), MOST_PAGES * PAGE) + 1, PAGE):
        page = array("I", prompt[end - PAGE : end]).tobytes()
        before = blake2b(before + page, digest_size=DIGEST_BYTES).digest()
        keys.append(before)
    return keys


def session_key(session_id: str) -> bytes:
    return blake2b(session_id.encode(), digest_size=DIGEST_BYTES, person=b"session").digest()


class Recent:
    """Replicas' ids by key."""

    def __init__(self, most: int = MOST_RECENT) -> None:
        self._most = most
        self._ids: OrderedDict[bytes, str] = OrderedDict()  # the oldest entry first

    def get(self, key: bytes) -> str | None:
        return self._ids.get(key)

    def put(self, key: bytes, id: str) -> None:
        self._ids[key] = id
        self._ids.move_to_end(key)
        if len(self._ids) > self._most:
            self._ids.popitem(last=False)
