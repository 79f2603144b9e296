"""The exit status of a process, and the line about an error that its user can mend."""

import sys
import time
from collections.abc import Callable

from disagg.front.streams import discard_stdout
from parallel.launched import launched_local_rank

AFTER_THE_FIRST_S = 2.0


def exit_status(work: Callable[[], int]) -> int:
    """Do the work of a process. Returns its exit status: what `work` returns, 1 or 2.

    It is 1 if nobody reads stdout, and 2 for a ValueError, the user's error. Raises all other exceptions.
    """
    try:
        return work()
    except BrokenPipeError:
        discard_stdout()
        print("run.py: error: nobody reads what it prints", file=sys.stderr)
        return 1
    except ValueError as error:
        if launched_local_rank() == 0:  # the other ranks of this machine would print the same
            print(f"run.py: error: {error}", file=sys.stderr)
        else:
            time.sleep(AFTER_THE_FIRST_S)  # torchrun ends all ranks as soon as one has ended: the first says why
        return 2
