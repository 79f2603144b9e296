"""Draw docs/results.png: figures of docs/results.md beside what they are held against, from docs/measurements.json.

python -m scripts.tools.results_chart                 # draws docs/results.png
python -m scripts.tools.results_chart --chart c.png   # another file
"""

import argparse
from pathlib import Path

from scripts.bench.lib.charts import figure, save
from scripts.bench.lib.flags import new_png
from scripts.bench.lib.measurements import KINDS, Measurement, load
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.store import STORE

DECODE = "one rank of v3 at EP72, decode 256 x 2048, simulated arrivals (skew 1): "
PREFILL = "one rank of v3 at EP32, prefill 16384 in 4096s, simulated arrivals (skew 1): "
OVERLAP = "one rank of EP72, decode, simulated arrivals (skew 1), batch 256, KV 2048, simulated communication: "
FOUR = "v3 with 8 layers on 4 ranks, "
HANDOFF = "handoff 2 + 2: a decode step of v3, 8 layers (simulated arrivals), mean, "
SHOWN = {  # record -> its label: ours, over the reference
    "moonlight, prefill 64 x 1024, against vLLM": "Moonlight, prefill: over vLLM",
    "moonlight, decode, batch 128 after 1024, against vLLM": "Moonlight, decode at 128: over vLLM",
    DECODE + "a MoE layer": "one rank of EP72, simulated arrivals, decode layer: over SGLang's kernels",
    PREFILL + "a MoE layer": "one rank of EP32, simulated arrivals, prefill layer: over SGLang's kernels",
    DECODE + "tok/s a node, overlapped": "EP72, decode per node: over SGLang on H100s",
    OVERLAP + "throughput, overlapped over plain": "what overlap gives at 256 requests: over SGLang's gain",
    FOUR + "overlap: decode, batch 128 a GPU after 1024, a GPU": "4 GPUs, decode at 128 with overlap: over without",
    FOUR
    + "tp, --backend triton: decode, batch 256 a GPU after 1024, a GPU": "4 GPUs, plain TP, decode at 256: over EP",
    HANDOFF + "beside transfers of what prefill computes": "2 + 2 GPUs, decode step beside KV transfers: over without",
}
WHITE = {"color": "white", "pad": 1}  # behind a number, which the line at 1 may cross
COLOURS = dict(zip(KINDS, ("C0", "C1", "C7"), strict=True))


def draw(path: Path, records: list[Measurement]) -> None:
    """One bar per record of SHOWN: its ratio, coloured by its kind. ValueError if a record is missing."""
    by_name = {record.name: record for record in records}
    if missing := [name for name in SHOWN if name not in by_name]:
        raise ValueError(f"{STORE}: no record {missing[0]!r}")
    made, plot = figure(11, 4.5)
    for kind, colour in COLOURS.items():
        rows = [i for i, name in enumerate(SHOWN) if by_name[name].kind == kind]
        ratios = [by_name[name].ratio for name in SHOWN if by_name[name].kind == kind]
        plot.bar_label(plot.barh(rows, ratios, 0.7, label=kind, color=colour), fmt="%.2f", padding=3, bbox=WHITE)
    plot.axvline(1, color="black", linewidth=1)
    plot.set_yticks(range(len(SHOWN)), SHOWN.values())
    plot.invert_yaxis()
    plot.margins(x=0.1)
    plot.set_xlabel("how many times as good as the reference (over 1 is better, for times too)")
    plot.legend(loc="lower right")
    save(made, path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chart", type=new_png, default=STORE.with_name("results.png"), metavar="PNG")
    args = parser.parse_args()
    with refusals(parser):
        draw(args.chart, load())


if __name__ == "__main__":
    main()
