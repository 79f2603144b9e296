"""The benchmarks of several ranks, with two of them on a CPU: the relations that their figures must satisfy."""

from pathlib import Path

from scripts.bench.lib.measurements import Measurement, load
from tests.processes import run_module

QUICK = {"scripts.bench.ranks.skew.TOKENS": 1024}  # test_skew.py checks the fit of gates' biases to its own number


def run(module: str, flags: str, out: Path) -> tuple[str, dict[str, Measurement]]:
    words = "--device", "cpu", *flags.split(), "--out", str(out)
    done = run_module(f"scripts.bench.{module}", *words, ranks=2, constants=QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {record.name: record for record in load(out)}


def test_dispatch_and_combine_of_both_layouts(tmp_path: Path) -> None:
    """With one expert per rank, and all experts per token, every token goes to each rank: the bytes are known."""
    sizes = "--hidden 256 --experts 2 --top-k 2 --decode-tokens 8 --prefill-tokens 64 --repeat 5"
    printed, records = run("ranks.ep", sizes, tmp_path / "r.json")
    assert "DeepEP cannot serve: no GPU" in printed and "low latency 77 / 114 us" in printed
    assert len(records) == 12
    scaled, bare = 256 + 2 * 4, 512
    rows = {"low latency": (8 * 2, 16), "normal": (64 * 2, 0)}  # copies; bytes that go with each in fp8
    for name, record in records.items():
        assert record.value > 0 and record.reference is None, name
        mode, call = name.split(", ")[1], name.split(": ")[1].split(",")[0]
        if record.unit != "GB/s":
            continue
        count, more = rows[mode]
        nbytes = count * (scaled + more if call == "dispatch" else bare)
        whole = records[name.replace("GB/s", "us")].value
        assert record.value >= nbytes / whole / 1e3 * 0.99 - 0.0005, name  # the slowest rank's time, regrouping and all


def test_the_engine_of_two_ranks(tmp_path: Path) -> None:
    work = "--shape tiny --layers 2 --batch 4 --prompt 20 --output 4 --prefill-batch 2 --step-tokens 40 --repeat 1"
    printed, records = run("engine", f"{work} --overlap on", tmp_path / "r.json")
    assert "overlap: on" in printed and printed.count("ready after") == 1
    begin = "tiny with 2 layers, EP2, overlap on, "
    works = ("prefill 2 x 20", "prefill 1 x 20", "decode, batch 4 after 20")
    assert all(records[begin + work].value > 0 for work in works)


def test_variants_of_two_ranks(tmp_path: Path) -> None:
    work = "--shape tiny --layers 2 --prompt 20 --batch 2 --output 4 --step-tokens 40 --repeat 1"
    printed, records = run("ranks", f"{work} --redundant 4 --interval 4", tmp_path / "r.json")
    begin, works = "tiny with 2 layers on 2 ranks, ", ("prefill of prompts of 20", "decode, batch 2 a GPU after 20")
    beside = {"ep": None, "overlap": "ep", "tp": "ep", "skewed": None, "static": "skewed", "live": "static"}
    law = dict.fromkeys(("skewed", "static", "live"), " (Zipf 0.5)")
    for variant, other in beside.items():
        for one in works:
            record = records[f"{begin}{variant}{law.get(variant, '')}: {one}, a GPU"]
            theirs = records[f"{begin}{other}{law.get(other, '')}: {one}, a GPU"].value if other else None
            assert record.value > 0 and record.reference == theirs, record.name
    assert printed.count("overlap: on") == 1 and "each rank holds a slice of every expert" in printed
    even = {v: records[f"{begin}{v} (Zipf 0.5): balancedness"].value for v in law}
    assert even["skewed"] < even["static"] <= 1 and even["skewed"] < even["live"] <= 1
    assert " 0 failed" in printed
