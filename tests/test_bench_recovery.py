"""scripts/bench/recovery: a killed job is replaced and serves, and the parts add up."""

import json
from pathlib import Path

import pytest

from scripts.bench.recovery import run
from tests.processes import ForkedPopen


def test_the_parts_of_a_recovery_add_up(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Popen", ForkedPopen)
    run.main(["--model", str(tiny), "--times", "1", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 2 * len(run.PARTS)
    for role, rows in (("decode", found[: len(run.PARTS)]), ("prefill", found[len(run.PARTS) :])):
        parts = {row["name"].split(": ")[1]: row["value"] for row in rows}
        assert all(role in row["name"] for row in rows) and tuple(parts) == run.PARTS
        assert all(0 <= value < run.LIMIT_S for value in parts.values()) and parts["first token"] > 0
        added = sum(parts[part] for part in run.PARTS[1:-1])
        assert added == pytest.approx(parts["total"], abs=0.01)
