"""The committed figures are complete, and docs/measurements.md is rendered from them."""

import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from scripts.bench.lib.measurements import KINDS, Measurement, load, merge, save
from scripts.bench.lib.report import render
from scripts.bench.lib.store import STORE

ENVIRONMENT = {"machine": "m", "versions": {"torch": "2"}, "command": "c", "commit": "abc", "date": "2026-01-01"}


def test_every_committed_record_says_where_it_comes_from() -> None:
    records = load()
    assert len({record.name for record in records}) == len(records)
    for record in records:
        assert record.kind in KINDS and math.isfinite(record.value), record
        assert record.machine and record.versions and record.command and record.commit and record.date, record
        assert (record.reference is None) == (record.source == ""), record


def test_the_page_is_up_to_date() -> None:
    assert STORE.with_suffix(".md").read_text() == render(load())


def test_ratio_points_the_same_way_for_rates_and_times() -> None:
    assert Measurement("rate", 90, "tok/s", "higher", 100, "s", **ENVIRONMENT).ratio == 0.9
    assert Measurement("time", 50, "us", "lower", 100, "s", **ENVIRONMENT).ratio == 2.0
    assert Measurement("alone", 50, "us", **ENVIRONMENT).ratio is None


def test_a_figure_of_zero_has_no_ratio() -> None:
    assert Measurement("time", 0.0, "us", "lower", 100, "s", **ENVIRONMENT).ratio is None
    assert Measurement("rate", 0.0, "tok/s", "higher", 100, "s", **ENVIRONMENT).ratio == 0


@pytest.mark.parametrize("text", ["", "# Words", '{"a": 1}', '[{"name": "x"}]', "[1]"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: not a benchmark's records"):
        load(path)


def test_records_survive_the_file_and_newer_ones_win(tmp_path: Path) -> None:
    path = tmp_path / "some" / "file.json"
    old = [Measurement("a", 1, "s", **ENVIRONMENT), Measurement("b", 2, "s", "lower", 4, "them", **ENVIRONMENT)]
    save(old, path)
    assert load(path) == old
    assert [r.value for r in merge([Measurement("a", 3, "s", **ENVIRONMENT)], old)] == [3, 2]


def test_a_command_does_not_say_where_things_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "/x/b/__main__.py --out /x/y.json --shape tiny --peer-python=/x/python --peer vllm"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("b.__main__", None))
    assert Measurement("a", 1, "s").command == "python -m b --shape tiny --peer vllm"


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'guessed'; it must be one of measured, simulated, modelled"):
        Measurement("a", 1, "s", kind="guessed", **ENVIRONMENT)


def test_what_a_run_gave_stands_together() -> None:
    commits = {"a": "abc", "b": "def", "c": "abc"}
    page = render([Measurement(name, 1, "s", **ENVIRONMENT | {"commit": commits[name]}) for name in commits])
    assert page.count("## `c`") == 2 and page.index("| a |") < page.index("| c |") < page.index("| b |")


def test_a_simulated_figure_says_so_on_the_page() -> None:
    assert "| simulated |" in render([Measurement("a", 1, "s", kind="simulated", **ENVIRONMENT)])
