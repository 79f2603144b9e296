"""Catalogue: what a replica's cache has, by digest, and what of that the router has not been told yet.

The router is told changes, in order and once. When it is a new one, or starts a new session, it is told everything.
"""

from collections.abc import Hashable
from itertools import islice

from disagg.control.messages import MOST_DIGESTS, MOST_KEPT, Kept
from disagg.page_digest import following, root


class Catalogue:
    """Lists at most MOST_KEPT pages. Those that a larger cache has beyond are not told, nor is what follows on them."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._digests: dict[Hashable, bytes] = {}  # by the cache's node of a page
        self._changes: dict[bytes, bool] = {}  # since the last news: is the page there now?
        self._anew = False  # shall the next news be everything?

    def add(self, node: int, before: int | str, tokens: bytes) -> None:
        """List a page. `before`: the node of the page before it, or the salt."""
        known = root(before) if isinstance(before, str) else self._digests.get(before)
        if known is not None and len(self._digests) < self._most:
            self._digests[node] = digest = following(known, tokens)
            self._changes[digest] = True

    def drop(self, node: int) -> None:
        if (digest := self._digests.pop(node, None)) is not None:
            self._changes[digest] = False

    def clear(self) -> None:
        self._digests.clear()
        self.tell_all()

    def tell_all(self) -> None:
        """Begin with everything again, because the router knows nothing, or everything has changed."""
        self._anew = True

    def news(self) -> list[Kept]:
        """Return the messages that tell what has changed since the last call.

        What is lost comes first, so that the router never takes the cache to have more pages than it can hold.
        """
        changes = dict.fromkeys(self._digests.values(), True) if self._anew else self._changes
        anew, self._anew, self._changes = self._anew, False, {}
        rest, made = iter(sorted(changes.items(), key=lambda change: change[1])), []
        while part := list(islice(rest, MOST_DIGESTS)):
            got, lost = (b"".join(digest for digest, there in part if there == which) for which in (True, False))
            made.append(Kept(got, lost, anew and not made))
        return made or ([Kept(anew=True)] if anew else [])
