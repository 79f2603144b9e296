"""scripts/bench/front: all streams are served whole, and the figures fit together."""

from pathlib import Path

import pytest

from scripts.bench.front.run import Router, figures, measure, parse

STREAMS, TOKENS, RATE = 8, 12, 20


def test_its_figures_fit_together(tiny: Path) -> None:
    with Router.start(tiny) as router:
        paced, unpaced = (measure(router, STREAMS, TOKENS, rate) for rate in (RATE, None))
    for run in (paced, unpaced):
        assert run.tokens == STREAMS * TOKENS and run.cpu_s > 0
        assert 2 * STREAMS <= run.events <= STREAMS * (TOKENS + 2), (
            "at least a piece and the usage, at most one per token"
        )
    assert paced.seconds >= (TOKENS - 1) / RATE
    assert paced.events > unpaced.events, "tokens that wait share an event"
    found = figures(parse(["--streams", str(STREAMS), "--rate", str(RATE)]), paced, unpaced)
    names = [one.name.split(": ")[-1] for one in found]
    assert names == ["tokens per second", "share of a core", "CPU per token", "tokens per second", "CPU per token"]
    assert found[1].value == pytest.approx(found[0].value * found[2].value * 1e-6, rel=0.01)
    assert all("a double for the replica" in one.name for one in found)
