"""Types of the benchmarks' flags for argparse."""

import argparse
import math
import os
from pathlib import Path

PHASES = {"decode": ("batch", "kv"), "prefill": ("tokens", "prompt")}
SIZES = {  # what a step of one rank is made of
    "batch": "sequences of a decode step",
    "kv": "tokens that each sequence attends to",
    "tokens": "prompt tokens of a prefill step",
    "prompt": "tokens per prompt",
}


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def fraction(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def probability(text: str) -> float:
    """Parse a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1]")
    return value


def positives(text: str) -> list[int]:
    """Parse whole numbers of at least 1, separated by commas."""
    return [positive(part) for part in text.split(",")]


def naturals(text: str) -> list[int]:
    """Parse whole numbers of at least 0, separated by commas."""
    return [natural(part) for part in text.split(",")]


def old_file(text: str) -> Path:
    """Parse the path of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return Path(text)


def new_file(text: str) -> Path:
    """Parse the path of a file that can be written, in folders that may not exist yet.

    Checked at the start, because a wrong name must not cost hours of measuring.
    """
    path = Path(text)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that can be written")
    return path


def new_png(text: str) -> Path:
    """Parse the path of a PNG that can be written."""
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return new_file(text)
