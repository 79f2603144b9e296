"""Recent: the replica that served a session last. Bounded: the oldest sessions are forgotten first."""

from collections import OrderedDict
from hashlib import blake2b

MOST_RECENT = 2**16  # sessions


class Recent:
    """Replicas' ids by `session_id`."""

    def __init__(self, most: int = MOST_RECENT) -> None:
        self._most = most
        self._ids: OrderedDict[bytes, str] = OrderedDict()  # by the session's digest, the oldest one first

    def get(self, session_id: str) -> str | None:
        return self._ids.get(_key(session_id))

    def put(self, session_id: str, id: str) -> None:
        key = _key(session_id)
        self._ids[key] = id
        self._ids.move_to_end(key)
        if len(self._ids) > self._most:
            self._ids.popitem(last=False)


def _key(session_id: str) -> bytes:
    """Return something short, because a client's `session_id` may be long."""
    return blake2b(session_id.encode(), digest_size=16).digest()
