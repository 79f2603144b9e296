"""The figures of a run, as records of docs/measurements.json."""

import argparse
from typing import Any

from scripts.bench.lib.measurements import Measurement
from tests.chaos.run import STREAMING, TOGETHER, Figures, longest


def of_faults(figures: Figures, args: argparse.Namespace) -> list[Measurement]:
    name = f"chaos over {args.transport}{' with short limits' if args.quick else ''}"
    pauses = "longest pause of a stream that moved"
    kinds = ("kill a decode rank", "stop a decode job until it is lost")
    return [
        Measurement(f"{name}: faults", figures.faults.total(), ""),
        Measurement(f"{name}: requests with the tokens of one process", figures.right, ""),
        Measurement(f"{name}: other requests, apart from those without any replica", len(figures.wrong), "", "lower"),
        Measurement(f"{name}: right answers of {TOGETHER}, {STREAMING}", figures.together, ""),
        Measurement(f"{name}: transfers of KV", figures.transfers, ""),
        Measurement(f"{name}: corrupt ones of them", figures.corrupt, "", "lower"),
        Measurement(f"{name}: {pauses}, {STREAMING}", round(longest(figures, STREAMING), 3), "s", "lower"),
        *(Measurement(f"{name}: {pauses}, {kind}", round(longest(figures, kind), 3), "s", "lower") for kind in kinds),
        Measurement(f"{name}: {pauses}, whatever happened", round(longest(figures), 3), "s", "lower"),
        Measurement(f"{name}: longest gap of a stream whose job went on", round(figures.other_s, 3), "s", "lower"),
        Measurement(f"{name}: longest time until a job that went on was back", round(figures.back_s, 3), "s", "lower"),
    ]


def of_aborts(aborts: dict[str, dict[str, Any]]) -> list[Measurement]:
    made = []
    for library, counted in aborts.items():
        name = f"aborts over {library}"
        amid = sum(count for state, count in counted["rooms"].items() if state.startswith("transferring"))
        made += [
            Measurement(name, counted["aborted"], ""),
            Measurement(f"{name}: while KV was on its way", amid, ""),
            Measurement(f"{name}: corrupt transfers, and pages written while free", counted["corrupt"], "", "lower"),
        ]
    return made
