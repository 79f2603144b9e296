"""disagg/front/process.py: a router that never serves is ended, and its end is told."""

import os
from argparse import Namespace

import pytest

from disagg.front.process import RouterProcess


def test_a_router_that_does_not_serve_yet_is_ended() -> None:
    """As when rank 0 refuses a flag: nothing is left that could still open a file or a port."""
    front = RouterProcess(Namespace())
    front.abandon()
    with pytest.raises(ChildProcessError):
        os.waitpid(front._pid, 0)


def test_what_the_system_refuses_is_told(tmp_path: pytest.TempPathFactory) -> None:
    front = RouterProcess(Namespace(existing="refuse", output=None))
    front.open(str(tmp_path / "no model"), "127.0.0.1")
    with pytest.raises(ValueError, match="no model"):
        front.address()
    front.abandon()
