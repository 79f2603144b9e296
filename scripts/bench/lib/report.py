"""Render docs/measurements.json as docs/measurements.md.

python -m scripts.bench.lib.report                    # render
python -m scripts.bench.lib.report --merge FILE...    # first take over the records that a benchmark wrote elsewhere
python -m scripts.bench.lib.report --merge FILE... --commit HASH    # which were made by that commit, whatever they say
"""

import argparse
from dataclasses import replace
from itertools import groupby

from scripts.bench.lib.flags import old_file, refusals
from scripts.bench.lib.measurements import STORE, Record, commit, load, merge, save

INTRO = """# Measurements

Rendered from `measurements.json` by `report.py`; do not edit. `ratio` is how many times as good as the
reference a figure is (over 1 is better, for times too). Every figure is *measured* unless its kind says *simulated*
or *modelled*.
"""


def render(records: list[Record]) -> str:
    parts = [INTRO]
    for origin, group in groupby(sorted(records, key=_origin), key=_origin):  # what a run gave stays in its order
        parts.append(
            f"\n## {origin}\n\n| figure | value | reference | ratio | kind |\n| --- | --- | --- | --- | --- |\n"
        )
        for r in group:
            reference = "" if r.reference is None else f"{r.reference:,.4g} ({r.source})"
            ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
            parts.append(f"| {r.name} | {r.value:,.4g} {r.unit} | {reference} | {ratio} | {r.kind} |\n")
    return "".join(parts)


def _origin(r: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in r.versions.items())
    return f"`{r.command}`\n\n{r.machine}, {r.date}, commit {r.commit}; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", nargs="*", default=[], type=old_file, metavar="FILE")
    parser.add_argument("--commit", metavar="HASH", help="the merged records' own, where the history was not at hand")
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
