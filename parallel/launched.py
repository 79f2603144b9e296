"""Launched: what torchrun says about this process, in its environment. No other module reads it. Imports nothing slow.

Without torchrun a process is a job of one rank.
"""

import os
import socket

from parallel.interface import LOOPBACK


def launched_size() -> int:
    """Return the number of ranks in the job."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """Return this rank's number in the job, known before there is a mesh."""
    return int(os.environ.get("RANK", 0))


def launched_local_rank() -> int:
    """Return this rank's number on its machine, known before there is a mesh."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched_first_host() -> str:
    """Return where a job's ranks reach rank 0: on this machine alone, if torchrun says that all are here."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == launched_size()
    return LOOPBACK if here else os.environ["MASTER_ADDR"]


def launched_name() -> str:
    """Return what tells this process from its job's other ranks, for people: host and rank; "" if it is alone."""
    return f"{socket.gethostname()} rank {launched_rank()}" if launched_size() > 1 else ""
