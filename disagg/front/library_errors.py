"""Errors of the tokenizers library, turned into ValueErrors."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error into a ValueError: `what`, and the reason.

    The library raises bare Exceptions, and a BaseException if it panics. (It also prints panics.)
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from None
