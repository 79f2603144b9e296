"""How long after SIGKILL to a job does its replacement serve? A router, a prefill and a decode job, of one rank each.

    SIGKILL ----------------> the router says that the job is lost      noticed
       |--> a new process --> it says that its weights are read         started + weights
                          --> the router says that it has joined        joined
                          --> the first token of a request              first token

The replacement is started at once, so the time that a supervisor takes is not in it. Nor is a second job of the role,
which would have gone on with the requests. The request whose first token counts is sent just after the kill. Times are
read from the processes' lines, every few milliseconds. `weights` is what the line says, to a tenth of a second, and
`started` is the rest until that line: mostly imports. The parts from `started` on add up to the total.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import ROOT, Measurement, Report, save
from scripts.tools.demo import free_port

HOST = "127.0.0.1"
LOOK_S = 0.005  # between two looks at a log
LIMIT_S = 120.0
PARTS = ("noticed", "started", "weights", "joined", "first token", "total")
READ = re.compile(r"weights: .* read in ([\d.]+) s")


class Job:
    """A process of run.py, and what it says."""

    def __init__(self, folder: Path, name: str, *flags: str) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with self._log.open("a") as log:
            command = [sys.executable, "run.py", *flags]
            self.process = Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def when(self, condition: Callable[[str], bool]) -> float:
        """Return when what it said met the condition. Raises RuntimeError if that takes too long or it ends."""
        deadline = time.monotonic() + LIMIT_S
        while not condition(self.said):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not say what it should:\n{self.said}")
            time.sleep(LOOK_S)
        return time.monotonic()


class Deployment:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.http, self._count = folder, str(model), free_port(), 0
        self._asking = ThreadPoolExecutor(1)
        self._address = f"{HOST}:{free_port()}"
        self.router = self._start("router", "--http", f"{HOST}:{self.http}", "--log-interval", "0")
        self.jobs = {role: self._start(role) for role in ("prefill", "decode")}
        self.router.when(lambda said: said.count(" joined, ranks: ") == 2)

    def _start(self, role: str, *flags: str) -> Job:
        self._count += 1
        common = ("--role", role, "--router", self._address, "--model", self.model)
        return Job(self.folder, f"{self._count}-{role}", *common, *flags)

    def first_token(self) -> float:
        """Ask for one token. Returns when it came."""
        body = json.dumps({"prompt": [5, 6, 7, 8], "max_tokens": 1, "ignore_eos": True}).encode()
        url, headers = f"http://{HOST}:{self.http}/v1/completions", {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=LIMIT_S) as answer:
            usage = json.load(answer)["usage"]
        if usage["completion_tokens"] != 1:
            raise RuntimeError(f"the answer has {usage}")
        return time.monotonic()

    def recover(self, role: str) -> dict[str, float]:
        """Kill the job of this role, and replace it. Returns the seconds of all PARTS."""
        joined = self.router.said.count(f"a {role} replica joined")
        lost = self.router.said.count(f"a {role} replica is lost")
        self.jobs[role].process.kill()
        killed = time.monotonic()
        waiting = self._asking.submit(self.first_token)
        new = self.jobs[role] = self._start(role)
        noticed = self.router.when(lambda said: said.count(f"a {role} replica is lost") > lost)
        read = new.when(lambda said: READ.search(said) is not None)
        weights = float(READ.search(new.said)[1])
        rejoined = self.router.when(lambda said: said.count(f"a {role} replica joined") > joined)
        served = waiting.result(LIMIT_S)
        ends = killed, read - weights, read, rejoined, served
        parts = [after - before for before, after in pairwise(ends)]
        return dict(zip(PARTS, (noticed - killed, *parts, served - killed), strict=True))

    def end(self) -> None:
        for job in (self.router, *self.jobs.values()):
            job.process.kill()
            job.process.wait()


def figures(role: str, runs: list[dict[str, float]]) -> list[Measurement]:
    """Return the median of each part."""
    name = f"recovery of a {role} job of one rank after SIGKILL, median of {len(runs)}"
    return [
        Measurement(f"{name}: {part}", round(statistics.median(run[part] for run in runs), 3), "s", "lower")
        for part in PARTS
    ]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "model" / "tiny", help="the model's folder (model/tiny)")
    add("--times", type=positive, default=5, help="kills per role (5)")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args, report = parse(words), Report()
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), args.model)
        try:
            deployment.first_token()
            for role in ("decode", "prefill"):
                for figure in figures(role, [deployment.recover(role) for _ in range(args.times)]):
                    report.keep(figure)
        finally:
            deployment.end()
    if args.out:
        save(report.records, args.out)
