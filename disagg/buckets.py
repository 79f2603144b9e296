"""Buckets: the few sizes that a decode step can have."""

from collections.abc import Callable


def make_buckets(most: int, multiple: Callable[[int], int] = lambda rows: 1) -> list[int]:
    """Return the row counts of decode steps, ascending: 1, 2, 4, 8, then two per doubling, up to `most`.

    Each is rounded up to a multiple of `multiple(rows)`.
    """
    sizes = [2**i for i in range(most.bit_length())]
    sizes += [size * 3 // 2 for size in sizes if size >= 16]
    return sorted({-(-size // multiple(size)) * multiple(size) for size in [*(s for s in sizes if s < most), most]})
