"""How many copies of tokens a rank groups at once in `dispatch.py`, and the rows that they take."""

IMBALANCE = 2  # above this ratio of received copies to their mean, a rank's experts take slices


def most_copies(tokens: int, top_k: int) -> int:
    """Return how many copies a rank groups at once: IMBALANCE times the mean.

    Each rank sends `tokens` tokens, which want `top_k` experts each. So a rank receives `tokens * top_k` on average.
    """
    return IMBALANCE * tokens * top_k


def grouped_rows(copies: int, groups: int, alignment: int) -> int:
    """Return the most rows that `copies` copies take in `groups` groups, each padded to `alignment`.

    In each group's last block, all rows but one may be padding.
    """
    groups = min(groups, copies)
    return (copies + groups * (alignment - 1)) // alignment * alignment
