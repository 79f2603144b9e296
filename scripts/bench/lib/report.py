"""Render docs/measurements.json as docs/measurements.md.

python -m scripts.bench.lib.report                                  # render
python -m scripts.bench.lib.report --merge FILE...                  # first add the figures of a benchmark's --out FILE
python -m scripts.bench.lib.report --merge FILE... --commit HASH    # the same, and name HASH as their commit
"""

import argparse
from dataclasses import replace
from itertools import groupby

from scripts.bench.lib.flags import old_file
from scripts.bench.lib.measurements import Measurement, commit, load, merge, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.store import STORE

INTRO = """# Measurements

Rendered from `measurements.json` by `python -m scripts.bench.lib.report`; do not edit. `ratio` is how many times as
good as its reference a figure is (over 1 is better, for times too). The kind of each figure is *measured*, *simulated*
or *modelled*.

A heading is the command as it was typed at the commit named below it. Commands are history and are not kept up to date:
some name scripts that have moved since. To run one again, check out its commit.
"""


def render(records: list[Measurement]) -> str:
    parts = [INTRO]
    for origin, group in groupby(sorted(records, key=_origin), key=_origin):  # stable: a run's figures keep their order
        parts.append(
            f"\n## {origin}\n\n| figure | value | reference | ratio | kind |\n| --- | --- | --- | --- | --- |\n"
        )
        for r in group:
            reference = "" if r.reference is None else f"{r.reference:,.4g} ({r.source})"
            ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
            parts.append(f"| {r.name} | {r.value:,.4g} {r.unit} | {reference} | {ratio} | {r.kind} |\n")
    return "".join(parts)


def _origin(r: Measurement) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in r.versions.items())
    return f"`{r.command}`\n\n{r.machine}, {r.date}, commit {r.commit}; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--merge", nargs="*", default=[], type=old_file, metavar="FILE", help="add the figures of these files"
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="the commit of all merged figures (their own; if empty, the one checked out)"
    )
    args = parser.parse_args()
    records = load()
    for path in args.merge:
        with refusals(parser):
            new = [replace(r, commit=args.commit or r.commit or commit()) for r in load(path)]
        records = merge(new, records)
    save(records)
    STORE.with_suffix(".md").write_text(render(records))


if __name__ == "__main__":
    main()
