"""scripts/bench/start: a real job is timed until its first token, and what it says about its kernels is found."""

import json
from pathlib import Path

import pytest

from disagg.warm_up import COMPILED
from scripts.bench.start.run import Start, figures, main, start

# Stands before `run.py`: a job that warms up as one on a GPU does. Its caches tell it whether it has done so before.
REHEARSES = f"""
import json, os, pathlib, sys, time
cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
print("   warm-up: 3.1 s:" + ("" if cache.exists() else " kernels 2.0,") + " prompts 1.1", file=sys.stderr)
request = json.loads(sys.stdin.readline())
print(json.dumps({{"text": "w1"}}), flush=True)
time.sleep(0.3)
if not cache.exists():
    cache.mkdir(parents=True)
    print("{COMPILED}", file=sys.stderr, flush=True)
sys.exit(0 if sys.stdin.read() == "" else "there was more input")
"""


def test_a_start_is_timed_until_its_first_token(tmp_path: Path) -> None:
    """On a CPU: nothing is compiled there."""
    main(["--shape", "tiny", "--repeat", "1", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    names = ["first token, empty caches", "first token, warm caches"]
    assert [row["name"] for row in found] == [f"start of tiny in bf16: {name}" for name in names]
    assert all(0.1 < row["value"] < 100 and row["unit"] == "s" for row in found)


def test_a_first_start_lasts_until_all_kernels_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.py").write_text(REHEARSES)
    (tmp_path / "request.jsonl").write_text("{}\n")
    monkeypatch.setattr("scripts.bench.start.run.ROOT", tmp_path)
    first, second = (start(tmp_path, tmp_path / "caches") for _ in range(2))
    assert first.warm_up == "warm-up: 3.1 s: kernels 2.0, prompts 1.1" and first.compiled > first.served + 0.2
    assert second.warm_up == "warm-up: 3.1 s: prompts 1.1" and second.compiled is None
    made = figures("it", first, [second, Start(9, None, ""), Start(100, None, "")])
    assert [one.value for one in made] == [round(first.served, 2), round(first.compiled, 2), 9]


@pytest.mark.parametrize(
    ("job", "said"),
    [("import sys; sys.exit('no GPU')", "no GPU"), ('print(\'{"error": "too long"}\')', "too long")],
)
def test_a_job_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, said: str) -> None:
    (tmp_path / "run.py").write_text(job)
    (tmp_path / "request.jsonl").write_text("{}\n")
    monkeypatch.setattr("scripts.bench.start.run.ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=said):
        start(tmp_path, tmp_path / "caches")
