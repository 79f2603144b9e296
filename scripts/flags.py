"""Types of the scripts' flags, for argparse: what is out of range is its kind of error, with the flag's name.

Imports nothing of the project: it is also read in a peer's environment.
"""

import argparse


def positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """Zero, too."""
    return 0 if text == "0" else positive(text)


def positives(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [positive(part) for part in text.split(",")]


def naturals(text: str) -> list[int]:
    return [natural(part) for part in text.split(",")]
