"""The warm-up's progress: lines where there is no terminal, and the time of its parts."""

from pathlib import Path

import pytest

from disagg.warm_up import run_beside, run_every_size
from disagg.warm_up_progress import EVERY_S, WarmUpProgress
from tests.test_speculation import make_engine


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_every_few_seconds_what_is_warmed_up() -> None:
    """Two seconds a size: a line with the first size that begins after five, and so on. Quick parts have none."""
    clock, lines = Clock(), []
    progress = WarmUpProgress(lines.append, bar=True, clock=clock)
    assert progress.summary == ""
    for what, sizes, each in (("prompts", [8, 4, 2, 1, 0], 2.0), ("decode steps", [4, 2], 0.5)):
        seen = []
        for size in progress(sizes, what):
            seen.append(size)
            clock.now += each
        assert seen == sizes
    assert EVERY_S == 5 and lines == ["warming up: prompts, 3 of 5 done"]
    assert progress.summary == "11.0 s: prompts 10.0, decode steps 1.0"
    clock.now += EVERY_S
    assert list(progress([7], "prompts")) == [7]
    assert lines[1:] == ["warming up: prompts, 0 of 1 done"]


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    clock, lines = Clock(), []
    progress = WarmUpProgress(lines.append, bar=True, clock=clock)
    for _ in progress([2, 1], "prompts"):
        clock.now += 100
    assert "warming up: prompts: 100%" in capsys.readouterr().err and not lines


@pytest.mark.parametrize("drafts", [0, 2])
def test_all_of_an_engines_sizes_are_shown(tiny: Path, drafts: int) -> None:
    engine, shown = make_engine(tiny, drafts), {}
    run_beside(engine, lambda sizes, what: shown.setdefault(what, list(sizes)))
    run_every_size(engine, lambda sizes, what: shown.setdefault(what, list(sizes)))
    buckets = engine.decode.buckets[::-1]
    wanted = {"decode steps"} | ({"prompts with drafts"} if drafts else set())
    assert set(shown) == wanted | {"prompts", "decodes beside prompts"}
    assert all(shown[what] == buckets for what in wanted)
    assert {1, 2, 64} <= set(shown["prompts"])
    assert shown["decodes beside prompts"] == [4, 2, 1]  # of five sequences, one is a prompt
