"""Pages of latent KV: their size, and who owns them. No sequence owns page NULL_PAGE: padding rows write there."""

PAGE = 64  # tokens per page
NULL_PAGE = 0  # padding rows write here; the allocator never hands it out


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


class PageAllocator:
    """Hands out pages 1 .. num_pages - 1. Deterministic: ranks that make the same calls get the same pages."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, f"{num_pages=}: one null page and at least one real page"
        self.capacity = num_pages - 1
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: the lowest page on top
        self._owned: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int] | None:
        """Take `count` pages. Returns None if there are not enough."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._owned.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        for page in pages:
            assert page in self._owned, f"{page=} is not allocated"
            self._owned.remove(page)
            self._free.append(page)
