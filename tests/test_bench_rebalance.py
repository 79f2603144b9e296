"""The benchmark of moving experts, on a CPU with the tiny shape: it fills all slots again, and labels its figures."""

import json
from pathlib import Path

from tests.processes import run_module


def test_every_slot_is_filled_anew(tmp_path: Path) -> None:
    flags = "--shape tiny --ep 4 --redundant 4 --batch 4 --kv 100 --experts 3 --repeat 3 --device cpu"
    module = "scripts.bench.one_rank.rebalance"
    done = run_module(module, *flags.split(), "--out", str(tmp_path / "r.json"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert "every slot anew: " in done.stdout and " 36 experts, " in done.stdout  # 4 layers of 9 slots
    records = json.loads((tmp_path / "r.json").read_text())
    assert all("simulated arrivals" in record["name"] and record["kind"] == "measured" for record in records)
    values = {record["name"].split(": ")[1]: record["value"] for record in records if "anew" in record["name"]}
    assert values["until all have moved"] > 0
    assert values["the longest step over the median of others"] > 0
