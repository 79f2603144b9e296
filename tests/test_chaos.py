"""Whatever happens to the jobs of a deployment, every request has the tokens of one process, and nothing is left.

Here each fault once, with short limits, and some aborts. `python -m tests.chaos --seconds 600` goes on for longer, with
the limits of the product.
"""

from pathlib import Path

from disagg.handoff.endpoints import TRANSPORTS
from tests.chaos import cut
from tests.chaos.aborts import abort_storm
from tests.chaos.quick import LIMITS, TIMES
from tests.chaos.run import chaos, problems, summary
from tests.test_handoff import obstacle

KINDS = 18 if cut.obstacle() is None else 15


def test_every_request_survives_what_happens_to_the_jobs(small: Path, tmp_path: Path) -> None:
    figures = chaos(tmp_path, small, 0, 1, TIMES, LIMITS, 60, say=print)
    assert not problems(figures), (tmp_path / "said.txt").read_text()
    assert len(figures.faults) == KINDS and figures.right > 100 and figures.left > 0, summary(figures)


def test_aborts_amid_transfers_corrupt_nothing_and_leave_no_page_behind(small: Path, tmp_path: Path) -> None:
    libraries = [library for library in TRANSPORTS if obstacle(library) is None]
    found = abort_storm(tmp_path, small, libraries, 50, 1, 100)
    print(found)
    for library in libraries:
        rooms = found[library]["rooms"]
        assert found[library]["aborted"] >= 50 and found[library]["corrupt"] == 0 and found[library]["right"] > 0
        assert sum(count for state, count in rooms.items() if state.startswith("transferring")) >= 20, rooms
