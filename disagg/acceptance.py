"""Acceptance: how many of a replica's drafts were verified, and how many were right, by their place in a step.

Only drafts that can give their request a token more count. Its last token comes in any case, and nothing behind it. So
a limit does not change the rates, however short requests are. A stop token does, because nobody knows it before its
step: drafts behind it were verified in the steps that ended earlier, by a wrong draft, and count as wrong.
"""


class Acceptance:
    """Counts the steps of sequences that verify drafts."""

    def __init__(self, drafts: int) -> None:
        """`drafts`: N, at most per step and sequence; 0: there is nothing to count."""
        self._steps = 0
        self._verified, self._judged, self._accepted = [0] * drafts, [0] * drafts, [0] * drafts

    def add(self, verified: int, right: int, most: int) -> int:
        """Count one sequence's step, in which the first `right` of `verified` drafts gave a token more.

        `most`: how many drafts could have, before its request's end. Returns how many drafts count.
        """
        self._steps += verified > 0
        for place in range(min(verified, most)):
            self._verified[place] += 1
            self._judged[place] += place <= right
            self._accepted[place] += place < right
        return min(verified, most)

    def counts(self) -> list[int]:
        """Return how many drafts came after right ones only, N numbers by place, and how many of them were right."""
        return [*self._judged, *self._accepted]

    def stats(self) -> dict[str, float]:
        """Return the statistics for the router, by name. Places begin at 1."""
        if not self._verified:
            return {}
        verified = {f"verified_drafts_{place}": count for place, count in enumerate(self._verified, 1)}
        accepted = {f"accepted_drafts_{place}": count for place, count in enumerate(self._accepted, 1)}
        return {"verifications": self._steps, **verified, **accepted}
