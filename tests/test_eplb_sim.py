"""The balancing simulator, on recordings with known results."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from parallel.load_counter import load_recording, save_recording
from scripts.bench.lib.measurements import load
from scripts.tools.eplb_sim import Deployment, Outcome, replay, unbalanced
from tests.conftest import ROOT
from tests.processes import run_module

TWO_RANKS = Deployment(2, 4)


def test_by_hand() -> None:
    """Two ranks of two experts; the first two experts get all tokens, so one rank does all the work."""
    got = replay(np.array([[[10, 10, 0, 0]]] * 4), TWO_RANKS, 1, [1, 2, 9])
    assert (got["unbalanced"].balancedness, got["static"].balancedness) == (0.5, 1)
    assert (got["unbalanced"].imbalance, got["static"].imbalance) == (2, 1)
    assert got["remade every 1"].balancedness == pytest.approx((0.5 + 3) / 4)  # the first window has nothing to go by
    assert got["remade every 2"].imbalance == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert got["remade every 9"] == got["unbalanced"]
    assert unbalanced(1, 4, 6).tolist() == [[0, 1, 2, 3, 0, 1]]


def test_a_load_that_moves_is_followed_one_window_late() -> None:
    """Experts 0 and 1 are hot in two windows, experts 2 and 3 in the next two.

    Each map is made from the window before it, so it fits only the second window of each pair.
    """
    one, other, neither = [30, 10, 0, 0], [0, 0, 30, 10], [10, 10, 10, 10]
    got = replay(np.array([[one], [one], [other], [other], [neither]]), TWO_RANKS, 1, [1])
    assert got["unbalanced"].balancedness == pytest.approx((4 * 0.5 + 1) / 5)
    followed = [0.5, 20 / 30, 0.5, 20 / 30, 1]  # of a pair, the hotter expert alone is over a rank's mean
    assert 0.5 < got["remade every 1"].balancedness <= np.mean(followed) + 0.1


def test_throughput_by_hand() -> None:
    """The experts take half of a balanced step: 0.5 + 0.5 x 2 = 1.5 against 0.5 + 0.5 x 1.2 = 1.1."""
    before, after = Outcome(0.5, 2.0), Outcome(1 / 1.2, 1.2)
    assert after.over(before, 0.5) == pytest.approx(1.5 / 1.1)
    assert after.over(before, 1) == pytest.approx(2 / 1.2) and before.over(before, 0.3) == 1


def test_windows_without_tokens_do_not_count() -> None:
    counts = np.array([[[10, 10, 0, 0]], [[0, 0, 0, 0]]])
    assert replay(counts, TWO_RANKS, 1, [])["unbalanced"].balancedness == 0.5


def test_nodes_hold_whole_groups() -> None:
    """The hot group fills one node of two; without nodes its experts may go anywhere."""
    counts = np.array([[[10, 10, 10, 10, 0, 0, 0, 0]]])
    assert [Deployment(8, 8, n).nodes for n in (8, 4, 3)] == [1, 2, 1]
    of_nodes = [replay(counts, Deployment(4, 8, n), 2, [])["static"].balancedness for n in (4, 2)]
    assert of_nodes == [1, 0.5]


@pytest.fixture
def recording(tmp_path: Path) -> str:
    generator, path = torch.Generator().manual_seed(0), tmp_path / "r.safetensors"
    save_recording(path, [torch.randint(100, (3, 32), generator=generator) for _ in range(5)], 3, 32)
    return str(path)


def run(*words: str) -> subprocess.CompletedProcess:
    return run_module("scripts.tools.eplb_sim", *words, timeout=60)


def test_the_command(recording: str, tmp_path: Path) -> None:
    out, chart = tmp_path / "o.json", tmp_path / "c.png"
    sizes = ["--ep", "4,12", "--redundant", "0,4", "--interval", "1,2", "--ranks-per-node", "2,8", "--groups", "2"]
    done = run(recording, "--phase", "decode", *sizes, "--out", str(out), "--chart", str(chart), "--name", "noise")
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout and "2.54x" in done.stdout and "EP12: 32 + 0 slots do not divide" in done.stdout
    assert done.stdout.count("EP4 on 2 nodes") == 2 * 4 and imread(chart).std() > 0.01
    records = {record.name: record for record in load(out)}
    assert {record.kind for record in records.values()} == {"simulated"}
    one = records["balancedness, noise, decode, EP12, 4 redundant, a static map"]
    assert one.reference < one.value <= 1
    two = records["implied throughput, noise, decode, EP12, 4 redundant, a static map, experts 24% of a step"]
    assert two.value > 1 and two.reference == 2.54


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ep", "0"], "argument --ep: '0' is not"),
        (["--redundant", "-1"], "argument --redundant: '-1' is not"),
        (["--experts-share", "1.5"], "argument --experts-share: 1.5 is not in (0, 1]"),
        (["--groups", "5"], "argument --groups: 32 experts do not divide into 5"),
        (["--ep", "2", "--redundant", "1000000000"], "argument --redundant: it must be at most experts x ranks (64), "),
        (["--ep", "7", "--redundant", "0"], "no deployment: (experts + --redundant) % --ep must be 0 for one of each"),
        (["--chart", "balance"], "argument --chart: 'balance' does not end in .png"),
    ],
)
def test_bad_flags_are_refused(recording: str, words: list[str], message: str) -> None:
    done = run(recording, "--phase", "prefill", *words)
    assert done.returncode == 2 and f"error: {message}" in done.stderr.splitlines()[-1], done.stderr


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "not a recording"), (tmp_path / "empty", "no tokens were recorded")):
        if path.name == "empty":
            save_recording(path, [], 3, 32)
        done = run(str(path), "--phase", "prefill")
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("order", ["moving", "mixed"])
def test_the_figures_in_docs_come_from_the_recordings_there(phase: str, order: str) -> None:
    records = {record.name: record for record in load()}
    counts = load_recording(ROOT / "docs" / "recordings" / f"{order}-{phase}.safetensors").numpy()
    got = replay(counts, Deployment(12, 36), 4, [1])
    for kind, name in (("static", "a static map"), ("remade every 1", "a map remade every 1 windows")):
        record = records[f"balancedness, tiny, {order} domains, {phase}, EP12, 4 redundant, {name}"]
        assert record.value == pytest.approx(got[kind].balancedness, abs=1e-3)
        assert record.reference == pytest.approx(got["unbalanced"].balancedness, abs=1e-3)
