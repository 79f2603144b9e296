"""The one-rank benchmarks on a CPU, with the tiny shape.

Parts and gaps add up to the layer. The modelled cluster equals numbers by hand. Figures say simulated or modelled.
Impossible flags are refused with the rule that they break.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.image import imread

from scripts.bench.lib.shapes import SHAPES
from scripts.bench.one_rank import deepep_times
from scripts.bench.one_rank import overlap as bench_overlap
from scripts.bench.one_rank import run as bench_rank
from scripts.bench.one_rank import timeline as overlap_timeline
from scripts.bench.one_rank.delay import Delay
from scripts.bench.one_rank.run import Figures, cluster_steps, coarse
from scripts.bench.one_rank.timeline import kernel_spans, lanes_of, overlapped_share, without
from tests.processes import run_module

SIZES = {
    "decode": ("--ep", "4", "--batch", "4", "--kv", "100", "--skew", "1.5"),
    "prefill": ("--ep", "4", "--tokens", "128", "--prompt", "64"),
}
TINY = ("--shape", "tiny", "--layers", "3", "--redundant", "4", "--device", "cpu")


def run(module: str, *words: str) -> subprocess.CompletedProcess:
    return run_module(f"scripts.bench.{module}", *words, timeout=120)


def run_well(module: str, *words: str) -> str:
    done = run(module, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("phase", SIZES)
def test_parts_sum_to_the_layer(phase: str, tmp_path: Path) -> None:
    out, trace, chart = tmp_path / "r.json", tmp_path / "new" / "t.json", tmp_path / "c.png"
    files = ("--out", str(out), "--trace", str(trace), "--chart", str(chart))
    said = run_well("one_rank", phase, *SIZES[phase], *TINY, "--repeat", "2", *files)
    assert "arrivals simulated" in said and "MODELLED" in said and "memory by the table" in said
    records = json.loads(out.read_text())
    assert all("simulated" in record["name"] for record in records)
    modelled = [record for record in records if record["kind"] == "modelled"]
    assert [record["name"].split(", ")[-1] for record in modelled] == ["plain", "overlapped"]
    assert all(record["kind"] == "measured" for record in records[: -len(modelled)])
    values = {record["name"].split(": ")[1]: record["value"] for record in records[: -len(modelled)]}
    layer, step = values.pop("a MoE layer"), values.pop("the step, computation alone")
    assert values.pop("the step as two micro-batches, computation alone") > 0
    assert sum(values.values()) == pytest.approx(layer, abs=0.001) and step > layer
    core = {"MLA core, a MoE layer", "routed experts, a MoE layer", "router, a MoE layer", "gaps, a MoE layer"}
    assert core < values.keys()
    named = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(name.startswith("rank/moe:routed experts") for name in named)
    assert imread(chart).std() > 0.01


@pytest.mark.parametrize("phase", SIZES)
def test_overlap_is_measured_plain_and_with_a_link(phase: str, tmp_path: Path) -> None:
    sizes = {"decode": ("--batch", "2", "4", "--kv", "70"), "prefill": ("--tokens", "128", "64", "--prompt", "64")}
    out = tmp_path / "r.json"
    flags = ("--ep", "4", *sizes[phase], *TINY, "--repeat", "2", "--out", str(out))
    said = run_well("one_rank.overlap", phase, *flags)
    assert said.count("ms modelled") == 8 and "SGLang" not in said
    records = {record["name"]: record for record in json.loads(out.read_text())}
    assert len(records) == 2 * (2 * 3 + 1)  # sizes; with and without communication two times and their ratio; the link
    for name, record in records.items():
        title, _, figure = name.partition(": ")
        assert record["kind"] == ("simulated" if "simulated communication" in name else "measured")
        if figure == "throughput, overlapped over plain":
            plain, overlapped = (records[f"{title}: {which} step"]["value"] for which in ("plain", "overlapped"))
            assert record["value"] == pytest.approx(plain / overlapped, rel=0.01)
        elif "furthest off" in figure:
            assert record["value"] >= 0.999  # on a CPU a transfer is never done too early


@pytest.mark.parametrize("phase", SIZES)
def test_a_timeline_shows_who_computes_and_who_communicates(phase: str, tmp_path: Path) -> None:
    trace, chart = tmp_path / "t.json", tmp_path / "c.png"
    said = run_well("one_rank.timeline", phase, *SIZES[phase], *TINY, "--trace", str(trace), "--chart", str(chart))
    assert "plain:" in said and "overlapped:" in said
    assert imread(chart).std() > 0.01
    turns = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"].startswith("turn ")]
    turns = [event["name"].removeprefix("turn ") for event in sorted(turns, key=lambda event: event["ts"])]
    transfers = [name for name in turns if name.endswith(">")]
    assert transfers[:5] == ["a 0 dispatch>", "a 0 combine>", "b 0 dispatch>", "a 1 dispatch>", "b 0 combine>"]
    layers = 2  # with experts, of the 3
    assert len(transfers) == 4 * layers and turns.count(f"b {layers - 1} experts") == 1


def test_kernels_are_put_down_to_the_turn_that_launched_them() -> None:
    """A trace by hand. Kernels run long after their launches, and are found by their correlation.

    A stream of its own makes a flight. A wait of the CPU does not count as computing.
    """

    def launch(number: int, at: float, cat: str = "cuda_runtime") -> dict:
        return {"cat": cat, "name": "launch", "ts": at, "dur": 1, "args": {"correlation": number}}

    def kernel(number: int, at: float, dur: float, stream: int, name: str = "gemm", cat: str = "kernel") -> dict:
        args = {"correlation": number, "stream": stream}
        return {"cat": cat, "name": name, "ts": at, "dur": dur, "args": args}

    ranges = {"step": (0, 100), "a 0 attention": (10, 10), "a 0 dispatch": (30, 20), "a 0 dispatch>": (35, 5)}
    events = [
        {"cat": "user_annotation", "name": f"turn {name}", "ts": ts, "dur": dur} for name, (ts, dur) in ranges.items()
    ]
    events += [launch(1, 5), launch(2, 12, "cuda_driver"), launch(3, 36), launch(4, 37), launch(5, 45), launch(6, 101)]
    events += [kernel(1, 1000, 500, 7), kernel(2, 2000, 1000, 7), kernel(3, 3000, 100, 7, "_hold_kernel"),
               kernel(4, 3100, 2000, 9, "Memcpy DtoH", "gpu_memcpy"), kernel(5, 3100, 1000, 7),
               kernel(6, 9000, 1, 7), {"cat": "kernel", "name": "unknown", "ts": 0, "dur": 1, "args": {}}]  # fmt: skip
    lanes = lanes_of(kernel_spans(events))
    assert lanes == {
        "a: computing": [(0.0, 1.0, "attention"), (1.0, 1.1, "send, receive"), (1.1, 2.1, "dispatch")],
        "a: communication": [(1.1, 3.1, "dispatch>")],
    }
    assert overlapped_share(lanes) == pytest.approx(0.5)
    assert without((0.0, 10.0, "x"), [(2.0, 3.0), (5.0, 9.0), (20.0, 21.0)]) == [
        (0.0, 2.0, "x"), (3.0, 5.0, "x"), (9.0, 10.0, "x"),
    ]  # fmt: skip


def test_low_latency_is_what_was_published() -> None:
    """Rows on the wire: 7,408 and 14,336 bytes, 1,024 of them for 128 tokens. Between the two published times at 64
    ranks lie 141 us and 7,094,272 bytes: 1.98752e-5 us a byte, so 22.231 us are fixed."""
    model = deepep_times.low_latency(SHAPES["v3"], 64)
    for what, published in (("dispatch", 173e-6), ("combine", 314e-6)):
        assert model(what, 128).total == pytest.approx(published)
    assert model("dispatch", 256).total == pytest.approx((22.231 + 2 * 150.769) * 1e-6, rel=1e-5)
    assert model("combine", 64).total == pytest.approx((22.231 + 291.769 / 2) * 1e-6, rel=1e-5)
    assert model("combine", 128).busy == pytest.approx(38.5e-6) and model("dispatch", 256).send == pytest.approx(30e-6)
    between = deepep_times.low_latency(SHAPES["v3"], 72)  # log2(72 / 64) = 0.16993 of the way to 128 ranks
    assert between("dispatch", 128).total == pytest.approx((173 + 0.16993 * 19) * 1e-6, rel=1e-5)
    assert between("combine", 128).total == pytest.approx((314 + 0.16993 * 55) * 1e-6, rel=1e-5)
    bf16 = deepep_times.low_latency(replace(SHAPES["v3"], fp8=False), 64)
    assert bf16("dispatch", 128).total == pytest.approx(314e-6)


def test_normal_is_bytes_over_bandwidth() -> None:
    """EP32 is 4 nodes of two groups. A token chooses none of a node's groups with probability 15 / 70.

    It chooses one with 40 / 70, and both with 15 / 70. Then all 8 experts are on other nodes with probability
    C(96, 8) / C(128, 8) = 0.09263, or C(64, 8) / C(128, 8) = 0.003097. That makes 2.9285 nodes per token. A row has
    7,392 bytes, and 14,336 on the way back.
    """
    nodes = 4 * (40 / 70 * (1 - 0.0926316) + 15 / 70 * (1 - 0.0030970))
    assert nodes == pytest.approx(2.9285, abs=1e-4)
    model = deepep_times.normal(SHAPES["v3"], 32)
    assert model("dispatch", 16384) == Delay(pytest.approx(16384 * nodes * 7392 / 58e9, rel=1e-4))
    assert model("combine", 16384).flight == pytest.approx(16384 * nodes * 14336 / 57e9, rel=1e-4)
    assert model("combine", 8192).flight == pytest.approx(model("combine", 16384).flight / 2)
    within = deepep_times.normal(replace(SHAPES["v3"], n_group=1, topk_group=1), 2)  # below the table: a node's NVLink
    ranks = 2 * (1 - 0.0031)  # all 8 of 256 on the other rank: 0.0035
    assert within("dispatch", 1000).flight == pytest.approx(1000 * ranks * 7392 / 153e9, rel=1e-3)


def test_the_modelled_cluster_by_hand() -> None:
    """10 MoE layers. Whole: 2 + 3 ms a layer. Halves: 1.0 + 1.5 in flight and 0.2 + 0.3 of kernels, twice a layer."""
    figures = Figures(step=100.0, halves=120.0, outside=10.0, layer=9.0, parts={}, floors={})
    whole = [Delay(1.6e-3, 0.2e-3, 0.2e-3), Delay(2.4e-3, 0.3e-3, 0.3e-3)]
    half = [Delay(1.0e-3, 0.1e-3, 0.1e-3), Delay(1.5e-3, 0.15e-3, 0.15e-3)]
    assert cluster_steps(figures, 10, whole, half) == pytest.approx({"plain": 150, "overlapped": 10 + 110 + 10})
    slow = cluster_steps(figures, 10, whole, half, slowdown=1.2)
    assert slow == pytest.approx({"plain": 150, "overlapped": 10 + 132 + 10})
    bound = cluster_steps(replace(figures, halves=30.0), 10, whole, half)
    assert bound["overlapped"] == pytest.approx(10 + 50 + 10)  # by the network
    assert cluster_steps(replace(figures, halves=None), 10, whole, half).keys() == {"plain"}


def test_parts_are_summed_to_those_of_the_anchors() -> None:
    fine = {
        "MLA core": 1.0,
        "MLA projections": 2.0,
        "shared experts": 3.0,
        "router": 4.0,
        "elementwise": 5.0,
        "gaps": 6.0,
    }
    assert coarse(fine) == {
        "MLA core": 1.0, "routed experts": 0.0, "projections and shared expert": 9.0, "other": 11.0,
        "a MoE layer": 21.0,
    }  # fmt: skip


REFUSED = {
    "decode --ep 5": "--ep 5, --redundant 4: (experts + redundant) % ep must be 0, not 36 % 5 = 1",
    "decode --ep 0": "argument --ep: '0' is not a whole number of at least 1",
    "decode --redundant -1": "argument --redundant: '-1' is not",
    "decode --batch 0": "argument --batch: '0' is not a whole number of at least 1",
    "decode --kv 0": "argument --kv: '0' is not a whole number of at least 1",
    "decode --kv 100000": "--kv 100000: the shape's longest sequence is 2048",
    "decode --layers 0": "--layers 0: of tiny it must be in [2, 5]",
    "decode --repeat 0": "argument --repeat: '0' is not a whole number of at least 1",
    "decode --skew 2.5": "--skew 2.5: it must be in [1, 2]",
    "decode --device cuda": "--device cuda: this machine has no CUDA GPU that torch can use",
    "decode --backend soup": "--backend soup: 'soup' is none of",
    "prefill --tokens 100 --prompt 64": "--tokens 100: tokens % prompt must be 0, not 100 % 64 = 36",
    "prefill --tokens 0": "argument --tokens: '0' is not",
    "prefill --prompt 4096": "--prompt 4096: the shape's longest sequence is 2048",
}


@pytest.mark.parametrize("words", REFUSED)
def test_flags_that_cannot_be_are_refused(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    refused(bench_rank, words, REFUSED[words], monkeypatch, capsys)


def test_halves_want_something_to_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cut = "--batch 33: batch % 2 must be 0, not 33 % 2 = 1: it is cut in halves"
    for script, more in ((bench_overlap, ""), (overlap_timeline, " --chart c.png")):
        refused(script, "decode --kv 64 --batch 33" + more, cut, monkeypatch, capsys)
        least = "--tokens 1: it must be at least 2"
        refused(script, "prefill --prompt 1 --tokens 1" + more, least, monkeypatch, capsys)
    refused(bench_overlap, "decode --kv 64 --repeat 0", "argument --repeat: '0' is not", monkeypatch, capsys)


def refused(
    script: ModuleType, words: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if "--device cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    phase, *flags = words.split()
    monkeypatch.setattr(sys, "argv", ["script", phase, *SIZES[phase], *TINY, *flags])
    with pytest.raises(SystemExit) as left:
        script.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and why in said and "Traceback" not in said
