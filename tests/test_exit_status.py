"""disagg/front/exit_status.py: a user's error is told once per machine, and before torchrun ends whoever tells it."""

import pytest

from disagg.front import exit_status as module
from disagg.front.exit_status import exit_status


def refused() -> int:
    raise ValueError("ranks % --attn-tp must be 0")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_of_a_machine_says_what_is_wrong_and_the_others_end_later(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Torchrun ends all ranks as soon as one has ended."""
    waited: list[float] = []
    monkeypatch.setattr(module, "launched_local_rank", lambda: rank)
    monkeypatch.setattr(module.time, "sleep", waited.append)
    assert exit_status(refused) == 2
    assert capsys.readouterr().err == ("" if rank else "run.py: error: ranks % --attn-tp must be 0\n")
    assert waited == ([module.AFTER_THE_FIRST_S] if rank else [])
