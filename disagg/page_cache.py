"""The prefix cache: pages keep their KV when their requests have ended, until others need the memory.

    free --reserve--> held by 1, 2, ... requests --the last lets go--> free, or idle if it is published
                           ^                                                    |
                           +---------- reserve, by the same tokens -------------+--> evicted, the oldest first

A published page can be found by its tokens. The key is exact, with no hash that could collide: the tokens of this page,
and the node of the page before. A node is a number that is never used again, so a key dies with the page before it. The
first page of a prompt comes after a root, the request's `cache_salt`. Requests with other salts find nothing of it.

Nobody holds a published page without the pages before it, and they are let go of from the last to the first. So pages
are evicted before those that they need. A published page is never written again: its tokens are a whole page.

A page whose KV is still on its way can be *promised*. Only those find it who say that they will await it. It is held
until the promise is kept, or taken back.
"""

from collections.abc import Callable, Sequence

from disagg.catalogue import Catalogue
from model.pages import PAGE, PageAllocator

Node = int | str  # of a published page, or a root
Key = tuple[Node, bytes]  # the page before, and this page's tokens


def never(page: int) -> bool:
    """Await no page that is promised."""
    return False


class PageCache:
    """Deterministic, like its allocator: ranks that make the same calls get the same pages."""

    def __init__(self, num_pages: int, keeps: bool = True) -> None:
        """`num_pages` with the null page. `keeps`: False if a page is free as soon as nobody holds it."""
        self.keeps = keeps
        self.allocator = PageAllocator(num_pages)
        self._holders: dict[int, int] = {}  # page -> requests that hold it, at least one
        self._published: dict[Key, int] = {}  # key -> page
        self._places: dict[int, tuple[Key, int]] = {}  # published page -> its key and its node
        self._idle: dict[int, None] = {}  # published pages that nobody holds, the oldest first
        self._next_node = 0
        self._promised: set[int] = set()  # published pages whose KV is not there yet
        self._doubtful: set[int] = set()  # pages that are held, and are never published
        self.catalogue: Catalogue | None = None  # which is told of all published pages
        self.hits = self.evictions = 0  # pages

    @property
    def capacity(self) -> int:
        return self.allocator.capacity

    @property
    def num_free(self) -> int:
        """Pages that a request can get: idle ones too."""
        return self.allocator.num_free + len(self._idle)

    def stats(self) -> dict[str, float]:
        return {
            "cache_hit_tokens": self.hits * PAGE,
            "cache_evictions": self.evictions,
            "cache_idle_pages": len(self._idle),
        }

    def reserve(
        self,
        count: int,
        salt: str = "",
        prefix: Sequence[bytes] = (),
        may_await: Callable[[int], bool] = never,
    ) -> tuple[list[int], int] | None:
        """Take `count` pages, of which the first may be published ones with the tokens of `prefix`.

        Among these are promised ones for which may_await(page) is true. Returns the pages, and how many of them are
        published. Returns None if there are not enough.
        """
        hits = self._find(salt, prefix, may_await)
        fresh = count - len(hits)
        if fresh > self.num_free - sum(page in self._idle for page in hits):
            return None
        self.hits += len(hits)
        for page in hits:
            self._hold(page)
        while self.allocator.num_free < fresh:
            self._evict()
        pages = self.allocator.alloc(fresh)
        assert pages is not None
        self._holders.update(dict.fromkeys(pages, 1))
        return hits + pages, len(hits)

    def publish(self, pages: Sequence[int], salt: str, written: Sequence[bytes]) -> None:
        """Let others find the first pages of a request, whose tokens are `written`.

        Their KV must be there before anybody who finds them reads it. Where another page was first with the same
        tokens, this request does not hold what is before its later pages. So those wait for `free`.
        """
        self._publish(pages, salt, written)

    def promise(self, pages: Sequence[int], salt: str, tokens: Sequence[bytes]) -> list[int]:
        """As `publish`, for pages whose KV is on its way. Returns those that can be found from now on.

        They must be held until `fulfil` or `retract`.
        """
        promised = self._publish(pages, salt, tokens)
        self._promised.update(promised)
        return promised

    def fulfil(self, promised: Sequence[int]) -> None:
        """The KV of these pages is there."""
        self._promised.difference_update(promised)

    def retract(self, promised: Sequence[int]) -> None:
        """The KV of these pages will not come. Whoever found them must let go of them unread."""
        for page in promised:
            if page in self._promised:
                self._promised.remove(page)
                self._unpublish(page)

    def free(self, pages: Sequence[int], salt: str = "", written: Sequence[bytes] = ()) -> None:
        """Let go of a request's pages. The first ones, with the tokens `written`, have their KV, and are published.

        The request reads them no more. So where another page was first with the same tokens, it takes that one's place
        in what the request holds.
        """
        held = list(pages)
        begin, node = self._known(held, salt)
        for i in range(begin, len(written) if self.keeps else 0):
            page, key = held[i], (node, written[i])
            if page in self._doubtful:
                break
            first = self._published.get(key)
            if first in self._promised:
                break
            if first is None:
                node = self._add(page, key)
            else:
                self._hold(first)
                self._let_go(page)
                held[i], node = first, self._places[first][1]
        for page in reversed(held):
            self._let_go(page)

    def distrust(self) -> None:
        """Publish nothing of what is there now, because some of it may be damaged. Idle pages become free."""
        self.allocator.free(list(self._idle))
        for known in (self._idle, self._published, self._places, self._promised):
            known.clear()
        if self.catalogue is not None:
            self.catalogue.clear()
        self._doubtful.update(self._holders)

    def _find(self, salt: str, prefix: Sequence[bytes], may_await: Callable[[int], bool] = never) -> list[int]:
        """Return the published pages of the longest part of `prefix`."""
        pages, node = [], salt
        for tokens in prefix:
            page = self._published.get((node, tokens))
            if page is None or (page in self._promised and not may_await(page)):
                break
            pages.append(page)
            node = self._places[page][1]
        return pages

    def _known(self, pages: Sequence[int], salt: str) -> tuple[int, Node]:
        """Return how many of a request's first pages are published already, and the node of the last of them."""
        known, places = 0, self._places
        for page in pages:
            if page not in places:
                break
            known += 1
        return known, places[pages[known - 1]][1] if known else salt

    def _publish(self, pages: Sequence[int], salt: str, tokens: Sequence[bytes]) -> list[int]:
        """Publish the first pages with these tokens, but for those that are known. Returns what is new."""
        new: list[int] = []
        begin, node = self._known(pages, salt)
        for page, its_tokens in zip(pages[begin:], tokens[begin:], strict=False):
            key = node, its_tokens
            if page in self._doubtful or key in self._published or not self.keeps:
                break
            node = self._add(page, key)
            new.append(page)
        return new

    def _add(self, page: int, key: Key) -> int:
        """Publish a page. Returns its node."""
        node = self._next_node
        self._next_node += 1
        self._published[key] = page
        self._places[page] = key, node
        if self.catalogue is not None:
            self.catalogue.add(node, *key)
        return node

    def _unpublish(self, page: int) -> None:
        key, node = self._places.pop(page)
        del self._published[key]
        if self.catalogue is not None:
            self.catalogue.drop(node)

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def _let_go(self, page: int) -> None:
        assert self._holders.get(page), f"{page=} is not held"
        self._holders[page] -= 1
        if self._holders[page]:
            return
        assert page not in self._promised, f"{page=} is promised"
        del self._holders[page]
        self._doubtful.discard(page)
        if page in self._places:
            self._idle[page] = None
        else:
            self.allocator.free([page])

    def _evict(self) -> None:
        """Free the oldest idle page. Pages that came after it would be older, so there are none."""
        page = next(iter(self._idle))
        del self._idle[page]
        self._unpublish(page)
        self.allocator.free([page])
        self.evictions += 1
