"""disagg/front/process.py: a router that never serves is ended, and what keeps it from serving is told."""

import os
from argparse import Namespace
from pathlib import Path

import pytest

from disagg.front import process
from disagg.front.process import RouterProcess


def test_a_router_that_does_not_serve_yet_is_ended() -> None:
    """As when rank 0 refuses a flag: nothing is left that could still open a file or a port."""
    front = RouterProcess(Namespace())
    front.abandon()
    with pytest.raises(ChildProcessError):
        os.waitpid(front._pid, 0)


def test_what_the_system_refuses_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(process, "FrontDoor", refused)
    front = RouterProcess(Namespace())
    front.open(str(tiny), "127.0.0.1")
    with pytest.raises(ValueError, match="too many open files"):
        front.address()
    front.abandon()
