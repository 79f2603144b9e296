"""Known: the pages that a replica has in its cache, as far as the router can know. By digest, see `page_digest.py`.

The replica reports them, about a second late. Those of requests that it was sent are not there yet, or not reported. So
they count as well, as long as the request is in the router's book, and then until the second report: the first one may
have been under way. Nothing here can make an answer wrong.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from disagg.control.messages import MOST_KEPT, Kept
from disagg.page_digest import as_numbers

REPORTS = 2  # after its request has ended, a page that is not reported counts until so many reports have come
MOST_LATELY = 2**13  # such pages, also if no report comes


class Known:
    def __init__(self, capacity: int) -> None:
        """`capacity`: pages of the replica's KV, 0 if it has no cache."""
        self._most = min(capacity, MOST_KEPT)
        self._reported: set[int] = set()
        self._coming: Counter[int] = Counter()  # by page: requests that bring it
        self._lately: dict[int, int] = {}  # pages of ended requests -> the number of the report that ends their time
        self._reports = 0

    def __contains__(self, page: int) -> bool:
        return page in self._reported or page in self._coming or page in self._lately

    def count(self, prefix: Sequence[int]) -> int:
        """Return how many of a prompt's first pages are here. No page is here without those before it."""
        return bisect_left(prefix, True, key=lambda page: page not in self)

    def bring(self, prefix: Sequence[int]) -> None:
        """A request with these pages has been sent there."""
        if self._most:
            self._coming.update(prefix)

    def brought(self, prefix: Sequence[int]) -> None:
        """The request is not in the book any more."""
        if not self._most:
            return
        for page in reversed(prefix):  # so that the first ones stay longest
            self._coming[page] -= 1
            if not self._coming[page]:
                del self._coming[page]
            self._lately.pop(page, None)
            self._lately[page] = self._reports + REPORTS
            if len(self._lately) > MOST_LATELY:
                del self._lately[next(iter(self._lately))]

    def hear(self, report: Kept) -> None:
        """Take a report. Raises ValueError if it cannot be true. Then nothing counts that was reported so far."""
        try:
            got, lost = as_numbers(report.got), as_numbers(report.lost)
        except ValueError:
            self._reported.clear()
            raise ValueError(f"{len(report.got)} and {len(report.lost)} bytes are no whole digests") from None
        if report.anew:
            self._reported.clear()
        self._reported.difference_update(lost)
        self._reported.update(got)
        for page in lost:  # whatever brought it, it is gone since: reports and the ends of requests come in order
            self._lately.pop(page, None)
        if len(self._reported) > self._most:
            count = len(self._reported)
            self._reported.clear()
            raise ValueError(f"{count} cached pages; there can be {self._most}")
        self._reports += 1
        while self._lately and self._lately[page := next(iter(self._lately))] <= self._reports:
            del self._lately[page]
