"""What is wrong with a script's flags, found after argparse is through: said as it does, and once a job."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.mesh import launched_local_rank


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A ValueError inside ends the process with status 2; the first rank of each machine says which."""
    try:
        yield
    except ValueError as error:
        if launched_local_rank() == 0:
            parser.error(str(error))
        sys.exit(2)
