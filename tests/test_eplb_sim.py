"""The balancing simulator, on recordings whose outcome is known."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.recorder import save_recording
from scripts.eplb_sim import replay, unbalanced


def test_by_hand() -> None:
    """Two ranks of two experts; the first two experts get all tokens, so one rank does all the work."""
    counts = np.array([[[10, 10, 0, 0]]] * 4)
    got = replay(counts, 2, 4, 1, 1, interval=1)
    assert got["unbalanced"] == 0.5 and got["static"] == 1
    assert got["remade"] == pytest.approx((0.5 + 3) / 4)  # the first window has nothing to go by
    assert unbalanced(1, 4, 6).tolist() == [[0, 1, 2, 3, 0, 1]]


def test_a_load_that_moves_is_followed_one_window_late() -> None:
    one, other = [10, 10, 0, 0], [10, 0, 10, 0]
    got = replay(np.array([[one], [one], [other], [other]]), 2, 4, 1, 1, interval=1)
    assert got["unbalanced"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert got["remade"] <= 1 and got["remade"] >= (0.5 + 1 + 0.5 + 1) / 4


def test_windows_without_tokens_do_not_count() -> None:
    counts = np.array([[[10, 10, 0, 0]], [[0, 0, 0, 0]]])
    assert replay(counts, 2, 4, 1, 1, interval=1)["unbalanced"] == 0.5


def test_the_command(tmp_path: Path) -> None:
    generator, recording = torch.Generator().manual_seed(0), tmp_path / "r.safetensors"
    save_recording(recording, [torch.randint(100, (3, 32), generator=generator) for _ in range(5)], 3, 32)
    command = [sys.executable, "scripts/eplb_sim.py", str(recording), "--ep", "4,12", "--redundant", "0,4"]
    done = subprocess.run([*command, "--out", str(tmp_path / "o.json")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout and "does not divide" in done.stdout
    assert '"kind": "simulated"' in (tmp_path / "o.json").read_text()
