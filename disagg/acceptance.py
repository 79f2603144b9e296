"""Acceptance: how many of a replica's drafts were right, by their place in a step."""


class Acceptance:
    """Counts the steps of sequences that verified drafts. Tokens behind a request's end do not count."""

    def __init__(self, drafts: int) -> None:
        """`drafts`: per step and sequence; 0: there is nothing to count."""
        self.verifications, self._accepted = 0, [0] * drafts

    def add(self, count: int) -> None:
        """Count one sequence's step, in which the first `count` drafts were right."""
        self.verifications += 1
        for place in range(count):
            self._accepted[place] += 1

    def stats(self) -> dict[str, float]:
        """Return the statistics for the router, by name. Places begin at 1."""
        if not self._accepted:
            return {}
        places = {f"accepted_drafts_{place}": count for place, count in enumerate(self._accepted, 1)}
        return {"verifications": self.verifications, **places}
