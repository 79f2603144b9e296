"""StopSearch: finds stop strings in a text that grows, and says which end of it could still become one."""


class StopSearch:
    """Keeps only the end of the text that could still become a stop string.

    A position in the text is refuted at most once per stop string, so the cost per character does not grow.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._tail = ""  # the text from `held` on
        self._begins = [0] * len(stops)  # per stop string: where in `_tail` it could begin
        self.held = 0  # from here on, the text could still become a stop string; its length if it could not
        self.ignored = 0  # a stop string that ends at or before this place does not count

    def find(self, more: str = "") -> int | None:
        """Return where the first complete stop string begins in the text plus `more`, or None.

        The text is searched from `held` on: a stop string that is not complete before `more` begins there or later.
        """
        text = self._tail + more
        starts = ((stop, max(0, self.ignored - self.held - len(stop) + 1)) for stop in self._stops)
        found = [at for stop, start in starts if (at := text.find(stop, start)) >= 0]
        return self.held + min(found) if found else None

    def push(self, piece: str) -> None:
        """Add text in which `find` has found no stop string that counts."""
        text = self._tail + piece
        for i, stop in enumerate(self._stops):
            at = max(self._begins[i], len(text) - len(stop) + 1)
            while at < len(text) and not (len(stop) > len(text) - at and stop.startswith(text[at:])):
                at = text.find(stop[0], at + 1)
                if at < 0:
                    at = len(text)
            self._begins[i] = at
        first = min(self._begins, default=len(text))
        self._begins = [at - first for at in self._begins]
        self._tail = text[first:]
        self.held += first

    def skip(self, length: int) -> None:
        """Add `length` characters that no stop string may contain or cross."""
        self.held += len(self._tail) + length
        self._tail = ""
        self._begins = [0] * len(self._stops)
