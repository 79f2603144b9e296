"""The figures of a run, as records of docs/measurements.json."""

import argparse
from typing import Any

from scripts.bench.lib.measurements import Measurement
from tests.chaos.run import STREAMING, TOGETHER, Figures, longest


def of_faults(figures: Figures, args: argparse.Namespace) -> list[Measurement]:
    name = f"chaos, {figures.faults.total()} faults over {args.transport}{', quick limits' if args.quick else ''}"
    pauses = "longest pause of a stream that moved"
    return [
        Measurement(f"{name}: requests with the tokens of one process", figures.right, "requests"),
        Measurement(f"{name}: requests with other tokens, or an error without reason", len(figures.wrong), "", "lower"),
        Measurement(f"{name}: corrupt transfers of KV, of {figures.transfers:,}", figures.corrupt, "", "lower"),
        Measurement(f"{name}: right answers, {STREAMING}", figures.together, f"of {TOGETHER}"),
        Measurement(f"{name}: {pauses}, {TOGETHER} streams run", round(longest(figures, STREAMING), 3), "s", "lower"),
        Measurement(f"{name}: {pauses}, whatever happened", round(longest(figures), 3), "s", "lower"),
        *(
            Measurement(f"{name}: {pauses}, {kind}", round(longest(figures, kind), 3), "s", "lower")
            for kind in ("kill a decode rank", "stop a decode job until it is lost")
        ),
        Measurement(f"{name}: longest gap of a stream whose job went on", round(figures.other_s, 3), "s", "lower"),
        Measurement(f"{name}: longest time until a job that went on was back", round(figures.back_s, 3), "s", "lower"),
    ]


def of_aborts(aborts: dict[str, dict[str, Any]]) -> list[Measurement]:
    made = []
    for library, counted in aborts.items():
        name = f"aborts, {counted['aborted']} over {library}"
        amid = sum(count for state, count in counted["rooms"].items() if state.startswith("transferring"))
        made += [
            Measurement(f"{name}: while KV was on its way", amid, "requests"),
            Measurement(f"{name}: corrupt transfers, and pages written while free", counted["corrupt"], "", "lower"),
        ]
    return made
