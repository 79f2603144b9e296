"""python -m tests.chaos: faults under load, then aborts over each transport. It ends with 1 if anything is wrong."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from disagg.handoff.endpoints import TRANSPORTS
from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import Report, save
from tests.chaos.aborts import abort_storm
from tests.chaos.faults import Times
from tests.chaos.figures import of_aborts, of_faults
from tests.chaos.quick import LIMITS, TIMES
from tests.chaos.run import chaos, problems, summary
from tests.conftest import ROOT
from tests.test_handoff import obstacle


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "model" / "tiny", help="the model's folder (model/tiny)")
    add("--seconds", type=positive, default=180, help="how long faults happen; each kind does at least once (180)")
    add("--seed", type=int, default=1, help="of the faults and the requests (1)")
    add("--transport", choices=TRANSPORTS, default="torch", help="what moves the KV beside the faults (torch)")
    add("--aborts", type=int, default=1400, help="requests to abort, over all transports together (1400)")
    add("--quick", action="store_true", help="with the short limits of the tests, not those of the product")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    began, report = time.monotonic(), Report()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} {text}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder, (times, constants) = Path(scratch), (TIMES, LIMITS) if args.quick else (Times(), {})
        figures = chaos(folder, args.model, args.seconds, args.seed, times, constants, 120, args.transport, say)
        say(summary(figures))
        if found := problems(figures):
            print(*found, (folder / "said.txt").read_text(), sep="\n")
            return 1
        libraries = [name for name in TRANSPORTS if obstacle(name) is None]
        each = -(-args.aborts // len(libraries))
        aborts = abort_storm(folder, args.model, libraries, each, args.seed, 2 * args.aborts) if each else {}
        for library, counted in aborts.items():
            say(f"{library}: {counted}")
        for figure in of_faults(figures, args) + of_aborts(aborts):
            report.keep(figure)
        if args.out:
            save(report.records, args.out)
        return int(any(counted["corrupt"] for counted in aborts.values()))


if __name__ == "__main__":
    sys.exit(main())
