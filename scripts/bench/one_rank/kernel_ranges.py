"""Find the named range of a profile that launched each of a GPU's kernels, from the Chrome trace.

Ranges are found by the time of the launch, because kernels that a library launches by itself belong to no torch
operator.
"""

import bisect
import json
import tempfile
from pathlib import Path

from torch.profiler import profile

LAUNCHES = ("cuda_runtime", "cuda_driver")
WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def export(profiler: profile, trace: Path | None) -> list[dict]:
    """Return the events of the profile's Chrome trace. `trace`: where to keep the file (None: it is deleted)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json") if trace is None else trace
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def mark_ranges(events: list[dict], mark: str) -> list[tuple[float, float, str]]:
    """Return the `record_function` ranges whose names begin with `mark`, in order: start, end, name.

    Times are in microseconds, and the names come without the mark.
    """
    ours = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(mark)]
    return sorted((e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(mark)) for e in ours)


def launched_in(events: list[dict], mark: str) -> list[tuple[dict, str]]:
    """Return kernels, copies and fills, each with the innermost range that launched it. Those without are left out."""
    ranges = mark_ranges(events, mark)
    starts = [start for start, *_ in ranges]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES}
    found = []
    for event in (e for e in events if e.get("cat") in WORK):
        at = launched.get(event["args"].get("correlation"))
        if at is None:
            continue
        around = (ranges[i] for i in range(bisect.bisect_right(starts, at) - 1, -1, -1) if at <= ranges[i][1])
        if innermost := next(around, None):
            found.append((event, innermost[2]))
    return found
