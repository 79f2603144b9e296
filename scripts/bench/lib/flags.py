"""Flags of the benchmarks: their types, for argparse, and how a value is refused that only the program can judge."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.mesh import launched_local_rank


def positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """Zero, too."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def fraction(text: str) -> float:
    """Zero or more, and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def positives(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [positive(part) for part in text.split(",")]


def naturals(text: str) -> list[int]:
    return [natural(part) for part in text.split(",")]


def old_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return Path(text)


def new_file(text: str) -> Path:
    """A file that can be written, with the folders that it needs: hours of figures must not end at a wrong name."""
    path = Path(text)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that can be written")
    return path


def new_png(text: str) -> Path:
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return new_file(text)


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A ValueError inside ends the process with status 2; the first rank of each machine says which."""
    try:
        yield
    except ValueError as error:
        if launched_local_rank() == 0:
            parser.error(str(error))
        sys.exit(2)
