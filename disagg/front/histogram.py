"""Histogram: a distribution in bounded memory, whose percentiles are within 1 %.

    bucket   0            1                  2                        ...
    values   (0, LOW]     (LOW, LOW * g]     (LOW * g, LOW * g^2]     ...     g = 2^(1 / PER_DOUBLING), under 1.01

A serving run of any length costs the same memory, which a list of all values would not. Powers of two times a
millisecond are edges of buckets, so Prometheus' cumulative counts at these bounds are exact.
"""

import math
from collections.abc import Iterable

PER_DOUBLING = 70  # buckets; each is 2^(1/70) = 1.00995 times as wide as the one before
LOW = 2.0**-10 / 1000  # about a microsecond; what is smaller counts as this
LAST = 37 * PER_DOUBLING  # the last bucket
LARGEST = LOW * 2.0**37  # 134,218 s; what is larger counts as this
TIMES = tuple(2.0**i / 1000 for i in range(18))  # 1 ms to 131 s, in seconds: bounds for Prometheus


class Histogram:
    """Counts values, in seconds."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0
        self._least, self._largest = math.inf, 0.0
        self._counts = [0] * (LAST + 1)  # by bucket

    def add(self, value: float, times: int = 1) -> None:
        """Count a value `times` times.

        Other processes measure some values, so any float is taken: NaN and below 0 count as 0.
        """
        value = min(max(0.0, value), LARGEST)  # in this order NaN becomes 0
        self.count += times
        self.sum += times * value
        self._least, self._largest = min(self._least, value), max(self._largest, value)
        bucket = math.ceil(PER_DOUBLING * math.log2(value / LOW)) if value > LOW else 0
        self._counts[bucket] += times

    def percentile(self, share: float) -> float:
        """Return the nearest-rank percentile within 1 %, or nan if there are no values."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(share * self.count))
        for bucket, count in enumerate(self._counts):
            rank -= count
            if rank <= 0:
                return min(max(_edge(bucket), self._least), self._largest)
        raise AssertionError("the buckets hold fewer values than were counted")

    def up_to(self, bounds: Iterable[float]) -> list[int]:
        """Return how many values are at most each bound.

        Exact for TIMES. For another bound, values up to 1 % below it may be missing.
        """
        last = [math.floor(PER_DOUBLING * math.log2(max(bound, LOW) / LOW)) for bound in bounds]
        return [sum(self._counts[: bucket + 1]) for bucket in last]


def _edge(bucket: int) -> float:
    """Return the largest value of a bucket."""
    return LOW * 2.0 ** (bucket / PER_DOUBLING)
