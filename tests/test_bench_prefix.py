"""scripts/bench/prefix: what talks share is computed once, and where nothing is shared nothing is found."""

from pathlib import Path

import pytest

from model.pages import PAGE
from parallel.mesh import Mesh
from scripts.bench.prefix import cost
from scripts.bench.prefix.run import Bench, Found, figures, parse
from scripts.bench.prefix.talks import Seen

SIZES = ("--shape", "tiny", "--layers", "2", "--device", "cpu", "--talks", "2", "--turns", "2")
LENGTHS = ("--system", str(2 * PAGE + 7), "--message", "9", "--answer", "4", "--step-tokens", "512")


def test_the_talks_are_served_and_what_they_share_is_computed_once(tmp_path: Path) -> None:
    bench = Bench(parse([*SIZES, *LENGTHS]), tmp_path)
    found = bench.ours(apart=False, cache="auto")
    first, later = 2 * PAGE + 16, 2 * PAGE + 16 + 4 + 9
    assert found.seen.prompt_tokens == 2 * (first + later) and [len(turn) for turn in found.seen.ttft] == [2, 2]
    assert found.computed == first + (first - 2 * PAGE) + 2 * (later - 2 * PAGE) and found.moved == 0


def test_its_figures_compare_with_the_cache_off_and_with_vllm() -> None:
    args = parse([*SIZES])
    found = {
        (apart, cache): Found(Seen([[0.1 * n], [0.01 * n, 0.03 * n]]), 10 * n, 20 * n)
        for apart in (False, True)
        for cache, n in (("auto", 1), ("off", 3))
    }
    made = figures(args, found, Found(Seen([[0.2], [0.04]])))
    rows = [(one.name.partition(" tokens, ")[2], one.value, one.reference) for one in made]
    assert rows == [
        ("one job: prompt tokens computed", 10, 30),
        ("one job: TTFT, median, first turn", 100, 300),
        ("one job: TTFT, median, later turns", 20, 60),
        ("one job: TTFT, median, first turn, against vLLM", 100, 200),
        ("one job: TTFT, median, later turns, against vLLM", 20, 40),
        ("prefill and decode apart: prompt tokens computed", 10, 30),
        ("prefill and decode apart: KV received", 20, 60),
        ("prefill and decode apart: TTFT, median, first turn", 100, 300),
        ("prefill and decode apart: TTFT, median, later turns", 20, 60),
    ]
    assert {one.better for one in made} == {"lower"}


def test_a_talk_of_one_turn_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--turns", "1"])
    assert "--turns is 1; it must be at least 2" in capsys.readouterr().err


def test_the_cost_is_measured_with_a_cache_that_finds_nothing_and_evicts() -> None:
    sizes = ["--shape", "tiny", "--device", "cpu", "--batch", "2", "--prompt", "70", "--output", "3", "--repeat", "3"]
    _, args = cost.parse(sizes)
    records = cost.run(args, Mesh())
    names = [
        f"tiny, 2 x 70 + 3 tokens, nothing shared: {phase} with the prefix cache" for phase in ("prefill", "decode")
    ]
    assert [one.name for one in records] == names and all(one.value > 0 and one.reference > 0 for one in records)
