"""scripts/bench/start: a real job is timed until its first token, and what it says about its kernels is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from disagg.warm_up import COMPILED
from scripts.bench.start import run
from scripts.bench.start.run import Start, figures, start

# Stands in for `run.py`: a job that warms up as one on a GPU does. Its caches tell it whether it has done so before.
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


def test_a_start_is_timed_until_its_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where nothing is compiled. The first is a real one."""
    made: list[Start] = []

    def started(folder: Path, caches: Path) -> Start:
        made.append(replace(made[0], served=1.5) if made else start(folder, caches))
        return made[-1]

    monkeypatch.setattr(run, "start", started)
    run.main(["--shape", "tiny", "--fp8", "--experts", "8", "--repeat", "2", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    names = [f"start of tiny with 8 experts in fp8: first token, {which} caches" for which in ("empty", "warm")]
    assert [row["name"] for row in found] == names and len(made) == 3
    assert 0.1 < found[0]["value"] < 100 and found[1]["value"] == 1.5 and {row["unit"] for row in found} == {"s"}


def test_a_first_start_lasts_until_all_kernels_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.py").write_text(REHEARSES)
    (tmp_path / "request.jsonl").write_text("{}\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
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
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=said):
        start(tmp_path, tmp_path / "caches")
