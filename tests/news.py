"""A replica's news, as a test reads it."""

from collections.abc import Iterable, Iterator

from disagg.control.messages import Tokens, Update


def singly(updates: Iterable[Update | Tokens]) -> Iterator[Update]:
    """Yield one Update per request and message, in order."""
    for one in updates:
        if isinstance(one, Tokens):
            yield from (Update(uid, [token]) for uid, token in one.by_uid.items())
        else:
            yield one
