"""Benchmarks refuse senseless numbers like argparse: one line that names the flag, status 2, no traceback."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest

from tests.conftest import ROOT

COMMANDS = (
    "engine", "handoff", "lib.report", "lib.roofline", "one_rank", "one_rank.balance", "one_rank.overlap",
    "one_rank.rebalance", "one_rank.timeline", "ranks", "ranks.ep",
)  # fmt: skip


def main_of(command: str) -> Callable[[], None]:
    """Return the function that `python -m scripts.bench.COMMAND` calls."""
    assert command in COMMANDS
    try:
        return import_module(f"scripts.bench.{command}.run").main
    except ModuleNotFoundError:
        return import_module(f"scripts.bench.{command}").main


ENGINE = "engine --shape tiny"
DECODE = "lib.roofline decode --shape v3 --ceilings 798,1400,3.0 --batch 4 --kv 10"
PREFILL = "lib.roofline prefill --ceilings 798,-,3.0 --tokens 4"
RANKS = "ranks --device cpu --shape tiny"
TOO_LARGE = "too large for a CPU, and no GPU is used here; --shape tiny runs"
BAD = [
    *(f"{command} --device cpu --shape v3: --shape v3: {TOO_LARGE}"
      for command in ("engine", "handoff", "ranks", "one_rank decode",
                      "one_rank.overlap prefill", "one_rank.rebalance", "one_rank.timeline decode --chart c.png",
                      "one_rank.balance decode docs/recordings/moving-decode.safetensors --top-k 4")),
    f"{ENGINE} --device cpu --backend flash: --backend flash: 'flash' is none of flash_attn, flash_mla, deep_gemm,",
    "ranks.ep --device cpu: between ranks of a job: torchrun --nproc-per-node N with N of at least 2",
    f"{RANKS} --zipf nan: argument --zipf: 'nan' is not a number of at least 0",
    f"{RANKS} --zipf -1: argument --zipf: '-1' is not a number of at least 0",
    f"{RANKS} --redundant -1: argument --redundant: '-1' is not a whole number of at least 0",
    f"{RANKS} --only ep,tq: --only tq: the variants are ep, overlap, tp, skewed, static, live",
    f"{RANKS} --only static: --only static: it needs what skewed counts: --only skewed,static",
    f"{RANKS} --layers 1: --layers 1: of tiny it must be in [2, 5]",
    f"{RANKS} --layers 6: --layers 6: of tiny it must be in [2, 5]",
    f"{RANKS} --redundant 33: --redundant 33: (32 + redundant) % 1 ranks must be 0, and it must be at most 32 x 1 = 32",
    f"{RANKS} --prompt 2000: --prompt and --output make requests of 2099 tokens; tiny takes 2048",
    "handoff --interval nan: argument --interval: 'nan' is not a number of at least 0",
    "lib.report --merge /nowhere.json: argument --merge: '/nowhere.json' is not a file",
    *(f"{ENGINE} --{flag} {value}: argument --{flag}: '{value}' is not a whole number of at least 1"
      for flag in ("prompt", "output", "repeat", "layers", "prefill-batch", "step-tokens") for value in ("0",)),
    f"{ENGINE} --speculate 1,5: argument --speculate: 5 is not 1 to 4 drafts",
    f"{ENGINE} --speculate 1 --peer transformers: argument --speculate: of the peers vLLM alone can force acceptance",
    f"{ENGINE} --accept 60: argument --accept: '60' is not a number in [0, 1]",
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
    *(f"{command} --out {out}: argument --out: '{out}' is not a file that can be written"
      for command in ("engine", "ranks.ep", "handoff", "one_rank decode", "one_rank.rebalance")
      for out in ("docs", "README.md/x.json", "")),
    "one_rank decode --trace docs: argument --trace: 'docs' is not a file that can be written",
    "one_rank.timeline decode --chart x.pgn: argument --chart: 'x.pgn' does not end in .png",
    "ranks.ep --top-k 9 --experts 8: --top-k must be at most --experts (8), not 9",
    "ranks.ep --hidden 100: --hidden % 128 must be 0, not 100 % 128 = 100",
    "ranks.ep --repeat 0: argument --repeat: '0' is not",
    "handoff --prompts 0: argument --prompts: '0' is not",
    "handoff --wire-bytes 0: argument --wire-bytes: '0' is not",
    "one_rank.rebalance --shape tiny --device cpu --ep 1: --ep 1: it must be at least 2",
    "one_rank.rebalance --shape tiny --device cpu --ep 4 --experts 33: --experts 33: of tiny it must be at most 32",
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.split(": ")[0])
def test_a_bad_number_is_one_clear_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command, _, message = case.partition(": ")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command.replace("  ", " ").split(" "))
    with pytest.raises(SystemExit) as ended:
        main_of(sys.argv[0])()
    assert ended.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_refuses_too() -> None:
    """peer.py is a script that imports nothing of the project."""
    command = [sys.executable, "scripts/bench/engine/peer.py", "transformers", "--model", ".", "--batch", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: argument --batch: '0' is not" in done.stderr.splitlines()[-1]
