"""How a benchmark refuses values that only the program can check."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.launched import launched_local_rank


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the process with status 2 on a ValueError inside the block.

    The first rank of each machine prints the error.
    """
    try:
        yield
    except ValueError as error:
        if launched_local_rank() == 0:
            parser.error(str(error))
        sys.exit(2)
