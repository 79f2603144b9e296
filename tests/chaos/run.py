"""The whole of it: load, faults, checks, figures. `python -m tests.chaos --help`."""

import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.tools.demo import free_port
from tests.chaos import cut, left
from tests.chaos.faults import Faults, Times
from tests.chaos.load import HOST, Door, Gap, Load, Said, Stream, answers, make_lines
from tests.chaos.place import Place
from tests.conftest import eventually
from tests.town import Town, town

TOGETHER = 100  # streams that run while a decode job is killed
STREAMING = f"kill a decode job while {TOGETHER} streams run"
BEGUN = 3  # pieces of a stream that runs for certain: the first token alone is prefill's
CLIENTS = 10
# The errors of a request for which there was no replica. When all prefill jobs are killed at once, a request may go
# from one dead job to another that the router still takes for alive. Then it is blamed for both.
ALLOWED = ("no prefill replica", "given up: 2 jobs died as they began it")


@dataclass
class Figures:
    requests: int = 0
    right: int = 0
    left: int = 0  # requests whose client has left
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of requests for which there was no replica
    together: int = 0  # of TOGETHER, those with the right answer
    ran_together: int = 0  # of TOGETHER, those that ran as the decode job was killed
    moved_together: int = 0  # of TOGETHER, those that went on in the other decode job
    faults: Counter[str] = field(default_factory=Counter)
    pauses: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of streams that moved
    own_s: float = 0.0  # longest gap of a stream whose decode job, or the router, was stopped
    other_s: float = 0.0  # longest gap of all other streams
    back_s: float = 0.0  # longest time until a job that went on was taken back
    transfers: int = 0
    corrupt: int = 0  # transfers that did not have their checksum
    in_use: dict[str, float] = field(default_factory=dict)  # at the end
    statuses: dict[str, list[int | None]] = field(default_factory=dict)
    processes: list[int] = field(default_factory=list)  # this and the next two: what is left
    ports: list[int] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)
    tracebacks: int = 0  # of the router and of the jobs that lived to the end


def chaos(
    folder: Path,
    model: Path,
    seconds: float,
    seed: int,
    times: Times,
    constants: dict[str, Any],
    limit_s: float = 120.0,
    transport: str = "torch",
    say: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Run faults for so many seconds, and each kind at least once. `constants`: as in `tests.town.town`.

    `limit_s`: what takes longer hangs. Raises AssertionError if something does not come in that time.
    """
    figures, shared, lines = Figures(), left.shared_memory(), make_lines(seed)
    with town(folder, model, **constants) as streets:
        expected = answers_of_one_process(streets, lines, limit_s)
        place = Place(streets, ("--transport", transport, "--kv-checksum"), limit_s)
        say(f"{len(lines)} requests have the answers of one process; the deployment is whole")
        load = Load(place.door, lines, seed)
        faults = Faults(place, load, random.Random(seed), times, say, cut.obstacle() is None)
        until = time.monotonic() + seconds
        kill_while_streaming(figures, faults, expected)
        load.start(CLIENTS)
        faults.run(until)
        hanging = load.stop(limit_s)
        assert not hanging, f"{[stream.name for stream in hanging]} hang\n{streets.said}"
        figures.faults = Counter(kind for kind, *_ in faults.happened)
        judge(figures, load.streams, expected, faults)
        finish(figures, place)
        said = streets.said
    look_behind(figures, place, shared)
    if problems(figures):
        (folder / "said.txt").write_text(said)
    return figures


def answers_of_one_process(streets: Town, lines: list[dict], limit_s: float) -> dict[int, Said]:
    """Return what a unified job answers, undisturbed, by the id() of the line."""
    door = Door(free_port(), limit_s)
    unified = streets.start("unified", 1, "--http", f"{HOST}:{door.port}")
    streets.until(lambda: serves(door), limit_s)
    expected = {id(line): said for line, said in zip(lines, answers(door, lines), strict=True)}
    unified.signal(signal.SIGINT)
    return expected


def serves(door: Door) -> bool:
    try:
        return b'"ok"' in door.get("/health")
    except OSError:
        return False


def finish(figures: Figures, place: Place) -> None:
    """Note what is in use though no request is left, then end the deployment."""
    eventually(lambda: not place.in_use(), 8)  # the transfers in flight are reported every 5 s
    figures.in_use = place.in_use()
    place.look()
    figures.transfers, figures.corrupt = (int(sum(d.values())) for d in (place.transfers, place.mismatches))
    place.router.signal(signal.SIGINT)
    place.until(lambda: all(None not in job.statuses for job in place.town.jobs))
    last = {"router": place.router, **{str(slot): slot.job for slot in place.slots}}
    figures.statuses = {name: job.statuses for name, job in last.items()}
    figures.tracebacks = sum("Traceback" in job.said for job in last.values())


def look_behind(figures: Figures, place: Place, shared: set[str]) -> None:
    """Note what all these processes have left. `shared`: the shared memory that there was before them."""
    sessions = [rank.pid for job in place.town.jobs for rank in job.ranks]
    eventually(lambda: not left.alive(sessions) and not left.orphans(left.shared_memory() - shared), 5)
    figures.processes = left.alive(sessions)
    figures.ports = sorted(port for port, _ in place.listened & left.listeners())
    figures.memory = left.orphans(left.shared_memory() - shared)


def kill_while_streaming(figures: Figures, faults: Faults, expected: dict[int, Said]) -> None:
    """Kill one of two decode jobs while TOGETHER streams run."""
    place, load = faults.place, faults.load
    began, streams = time.monotonic(), load.together(TOGETHER)
    place.until(lambda: all(len(stream.times) >= BEGUN or stream.ended for stream in streams))
    figures.ran_together = sum(not stream.ended for stream in streams)
    victim = place.of("decode")[1]
    place.kill(victim)
    place.until(lambda: all(stream.ended for stream in streams))
    faults.happened.append((STREAMING, began, time.monotonic()))
    figures.together = sum(stream.said == expected[id(stream.line)] for stream in streams)
    figures.moved_together = sum(any(gap.moved for gap in stream.gaps) for stream in streams)
    faults.say(
        f"{figures.ran_together} of {TOGETHER} streams ran as {victim} was killed; {figures.together} have the right "
        f"answer, {figures.moved_together} moved"
    )
    place.replace(victim)
    place.until_whole()


def judge(figures: Figures, streams: list[Stream], expected: dict[int, Said], faults: Faults) -> None:
    """Compare every answer, and tell the gaps apart."""
    figures.requests = len(streams)
    for stream in streams:
        if stream.said is not None and stream.said == expected[id(stream.line)]:
            figures.right += 1
        elif stream.left:
            figures.left += 1
        elif stream.error and any(e in stream.error for e in ALLOWED) and faults.lacked_prefill(stream.ended):
            figures.errors.append(stream.error)
        else:
            figures.wrong.append(f"{stream.name}: {stream.error or stream.said}, not {expected[id(stream.line)]}")
        for gap in stream.gaps:
            sort(figures, gap, faults)
    figures.back_s = max(faults.backs, default=0.0)


def sort(figures: Figures, gap: Gap, faults: Faults) -> None:
    """Count a gap among those of streams that moved, of streams that were stopped, or of all others."""
    if gap.moved:
        figures.pauses[faults.during(gap.began, gap.ended)].append(gap.seconds)
        return
    for stop in faults.stops:
        is_its = stop.role == "router" or (stop.role == "decode" and stop.ranks == gap.ranks)
        if is_its and stop.began < gap.ended and gap.began < stop.ended:
            figures.own_s = max(figures.own_s, gap.seconds)
            return
    figures.other_s = max(figures.other_s, gap.seconds)


def problems(figures: Figures) -> list[str]:
    """Return what is not as it must be."""
    together = figures.ran_together, figures.together
    left_over = figures.processes, figures.ports, figures.memory
    statuses = {status for job in figures.statuses.values() for status in job}
    found = [
        (figures.wrong, f"{len(figures.wrong)} wrong: {figures.wrong[:3]}"),
        (together != (TOGETHER, TOGETHER), f"{together} of {TOGETHER} streams ran, and were right: {STREAMING}"),
        (not figures.moved_together, f"no stream moved: {STREAMING}"),
        (not figures.errors, "nobody heard that there was no replica"),
        (figures.corrupt, f"{figures.corrupt} transfers did not have their checksum"),
        (not figures.transfers, "no transfer was counted"),
        (figures.in_use, f"in use at the end: {figures.in_use}"),
        (statuses != {0}, f"exit statuses {figures.statuses}"),
        (figures.tracebacks, f"{figures.tracebacks} jobs have printed a traceback"),
        (any(left_over), f"left: processes, ports, shared memory {left_over}"),
    ]
    return [text for holds, text in found if holds]


def longest(figures: Figures, kind: str = "") -> float:
    """Return the longest pause of a stream that moved: while `kind` and nothing else happened, or ever if it is ""."""
    return max(
        (pause for what, pauses in figures.pauses.items() if kind in ("", what) for pause in pauses), default=0.0
    )


def summary(figures: Figures) -> str:
    kinds, moves = figures.faults, sum(map(len, figures.pauses.values()))
    return (
        f"{figures.requests} requests: {figures.right} right, {figures.left} left by their clients, "
        f"{len(figures.errors)} errors while there was no replica, {len(figures.wrong)} wrong; "
        f"{kinds.total()} faults of {len(kinds)} kinds; {moves} streams moved, longest pause {longest(figures):.2f} s; "
        f"longest gap of the others {figures.other_s:.2f} s, of the stopped {figures.own_s:.2f} s; "
        f"back after {figures.back_s:.2f} s; {figures.transfers} transfers, {figures.corrupt} corrupt"
    )
