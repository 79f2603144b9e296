"""How many copies of tokens a rank groups at once, in `dispatch.py`."""

IMBALANCE = 2  # above this ratio of received copies to their mean, a rank's experts take slices


def most_copies(tokens: int, top_k: int) -> int:
    """Return how many copies a rank groups at once: IMBALANCE times the mean.

    Each rank sends `tokens` tokens, which want `top_k` experts each. So a rank receives `tokens * top_k` on average.
    """
    return IMBALANCE * tokens * top_k
