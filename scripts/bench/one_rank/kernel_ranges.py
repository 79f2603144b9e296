"""Which named range of a profile launched each of a GPU's kernels, read from its Chrome trace: by the time of the
launch, for kernels that a library starts by itself belong to no operator of torch's.
"""

import bisect
import json
import tempfile
from pathlib import Path

from torch.profiler import profile

LAUNCHES = ("cuda_runtime", "cuda_driver")
WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def export(profiler: profile, trace: Path | None) -> list[dict]:
    """The events of its Chrome trace, which is kept at `trace`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json") if trace is None else trace
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def mark_ranges(events: list[dict], mark: str) -> list[tuple[float, float, str]]:
    """The `record_function` ranges whose names begin with `mark`, in order: start and end in microseconds, the rest of
    the name."""
    ours = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(mark)]
    return sorted((e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(mark)) for e in ours)


def launched_in(events: list[dict], mark: str) -> list[tuple[dict, str]]:
    """Kernels, copies and fills, each with the innermost range that launched it; those outside any are left out."""
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
