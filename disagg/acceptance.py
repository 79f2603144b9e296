"""Acceptance: how many of a replica's drafts were verified, and how many were right, by their place in a step."""


class Acceptance:
    """Counts the steps of sequences that decode. Tokens behind a request's end do not count."""

    def __init__(self, drafts: int) -> None:
        """`drafts`: N, at most per step and sequence; 0: there is nothing to count."""
        self._steps, self._verified, self._accepted = 0, [0] * drafts, [0] * drafts

    def add(self, verified: int, right: int) -> None:
        """Count one sequence's step, in which the first `right` of `verified` drafts were right."""
        self._steps += 1
        for place in range(verified):
            self._verified[place] += 1
            self._accepted[place] += place < right

    def counts(self) -> list[int]:
        """Return how many drafts were verified, N numbers by place, and behind them how many were right."""
        return [*self._verified, *self._accepted]

    def stats(self) -> dict[str, float]:
        """Return the statistics for the router, by name. Places begin at 1."""
        if not self._verified:
            return {}
        verified = {f"verified_drafts_{place}": count for place, count in enumerate(self._verified, 1)}
        accepted = {f"accepted_drafts_{place}": count for place, count in enumerate(self._accepted, 1)}
        return {"verifications": self._steps, **verified, **accepted}
