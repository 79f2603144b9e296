"""Scripts refuse numbers that make no sense as argparse does: a line that names the flag, status 2, no traceback."""

import subprocess
import sys

import pytest

from scripts import bench_engine, roofline
from tests.conftest import ROOT

MAIN = {"bench_engine.py": bench_engine.main, "roofline.py": roofline.main}
ENGINE = "bench_engine.py --shape tiny"
DECODE = "roofline.py decode --shape v3 --ceilings 798,1400,3.0 --batch 4 --kv 10"
PREFILL = "roofline.py prefill --ceilings 798,-,3.0 --tokens 4"
BAD = [
    *(f"{ENGINE} --{flag} {value}: argument --{flag}: '{value}' is not a whole number of at least 1"
      for flag in ("prompt", "output", "repeat", "layers", "prefill-batch", "step-tokens") for value in ("0",)),
    f"{ENGINE} --batch 0: argument --batch: '0' is not",
    f"{ENGINE} --batch 1,-3: argument --batch: '-3' is not",
    f"{ENGINE} --batch 1,,2: argument --batch: '' is not",
    f"{ENGINE} --batch 1.5: argument --batch: '1.5' is not",
    f"{ENGINE} --layers 6: argument --layers: tiny has 5, not 6",
    f"{ENGINE} --batch 1 --prompt 4000: --prompt and --output make requests of 4132 tokens; tiny takes 2048",
    f"{DECODE} --ep 0: argument --ep: '0' is not",
    f"{DECODE} --local 0: argument --local: '0' is not",
    f"{DECODE} --ep 2 --local 1: --ep x --local must be at least the 256 experts, not 2 x 1 = 2",
    f"{DECODE} --batch 0: argument --batch: '0' is not",
    f"{DECODE} --kv -1: argument --kv: '-1' is not",
    f"{PREFILL} --prompt 5: --prompt must be at most --tokens (4), not 5",
    *(f"{DECODE} --ceilings {given}: argument --ceilings: '{given}'"
      for given in ("1,2", "1,2,3,4", "a,2,3", "0,2,3", "1,0,3", "1,-,nan", "inf,-,1", "1,2,-", "")),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.split(": ")[0])
def test_a_bad_number_is_one_clear_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command, _, message = case.partition(": ")
    monkeypatch.setattr(sys, "argv", command.split(" "))
    with pytest.raises(SystemExit) as ended:
        MAIN[sys.argv[0]]()
    assert ended.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_refuses_too() -> None:
    """In a process of its own: it changes where modules come from."""
    command = [sys.executable, "scripts/peer.py", "transformers", "--batch", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: argument --batch: '0' is not" in done.stderr.splitlines()[-1]
