"""SIMULATED communication time: a link that carries nothing, and is busy for as long as it is told.

For benchmarks of one rank (`loopback.py`). A transfer has three parts: a send kernel that takes all SMs, the
flight beside whatever else is computed, and a receive kernel. On a GPU the flights of all transfers run one after
another on a stream of their own, and whoever waits for one makes the computing stream wait; the host never does:

    computing   ... | send | what is enqueued between start and wait ... | receive | ...
    link               | flight >>>>>>>>>>>>>>>>>>>>> |

In flight, normal mode holds `num_sms` SMs (`hold.py`). Low latency holds none: its flight is a copy to the
host's pinned memory of as many bytes as take that long here, which reads the GPU's memory and crosses PCIe as a network
card's reads do, and is done by a copy engine. (A block that waits would not do: no register is left beside some
attention kernels' blocks, so that one of them would have to wait for it.) How long such a copy takes changes on some
machines from one moment to the next: `calibrate` before, and see that transfers take their time after. All of it can be
captured in a CUDA graph.

On a CPU, where nothing runs beside, `wait` returns no sooner than the transfer would be done.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

CALIBRATION = (2**20, 2**25)  # bytes
CALIBRATION_HOLD = 5e-6  # seconds
IN_A_ROW = 10  # transfers that are timed together: the start of a graph is hardly seen in that of one


@dataclass(frozen=True)
class Delay:
    """Seconds that one dispatch or combine takes, simulated: `send` and `receive` on all SMs, `flight` between them."""

    flight: float
    send: float = 0.0
    receive: float = 0.0

    @property
    def busy(self) -> float:
        """Seconds in which it holds all SMs."""
        return self.send + self.receive

    @property
    def total(self) -> float:
        return self.flight + self.busy


DelayModel = Callable[[str, int], Delay]  # by "dispatch" or "combine", and the tokens that a rank sends


class SimulatedLink:
    def __init__(self, model: DelayModel, device: torch.device, num_sms: int = 0):
        """`num_sms`: that are held in flight; 0 is low latency, whose flight is a copy."""
        self.model, self.device, self.num_sms = model, device, num_sms
        self.free_at = 0.0  # CPU: by time.perf_counter, when the latest transfer is done
        self.copies = device.type == "cuda" and num_sms == 0
        if device.type != "cuda":
            return
        self.kernels = importlib.import_module("scripts.bench.one_rank.hold")
        self.stream = torch.cuda.Stream(device, priority=-1)  # as DeepEP's
        self.all_sms = torch.cuda.get_device_properties(device).multi_processor_count
        if self.copies:
            self.sent = torch.zeros(CALIBRATION[1], dtype=torch.uint8, device=device)
            self.host = torch.zeros(CALIBRATION[1], dtype=torch.uint8, pin_memory=True)
            self.calibrate()

    def start(self, what: str, tokens: int) -> Callable[[], None]:
        """Begin a transfer. Call what comes back, once, before using what arrived."""
        transfer = self.model(what, tokens)
        return self._start_on_cpu(transfer) if self.device.type != "cuda" else self._start_on_gpu(transfer)

    def _start_on_gpu(self, transfer: Delay) -> Callable[[], None]:
        if transfer.send:
            self.kernels.hold(self.all_sms, transfer.send)
        landed = self._beside(lambda: self._fly(transfer.flight))

        def wait() -> None:
            landed()
            if transfer.receive:
                self.kernels.hold(self.all_sms, transfer.receive)

        return wait

    def _beside(self, fly: Callable[[], None]) -> Callable[[], None]:
        """On the link's own stream, after what the current one has been given. What comes back makes that wait."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            fly()
            done = self.stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)

    def _fly(self, seconds: float) -> None:
        if not self.copies:
            self.kernels.hold(self.num_sms, seconds)
            return
        left = max(1, round((seconds - self.latency) * self.bandwidth))
        while left > 0:
            count = min(left, self.sent.numel())
            self._copy(count)
            left -= count

    def _copy(self, count: int) -> None:
        self.host[:count].copy_(self.sent[:count], non_blocking=True)

    def calibrate(self) -> None:
        """Measure copies to the host as they are used, in a graph, on a stream of their own, between kernels: bytes a
        second, and the seconds that a row of kernels is longer by with a copy between two. For what is started or
        captured from now on."""
        if not self.copies:
            return
        rows = {count: self._row(count) for count in (0, *CALIBRATION)}
        taken: dict[int, list[float]] = {count: [] for count in rows}
        for _ in range(20):  # in turns, so that what else goes over PCIe slows all
            for count, row in rows.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                row.replay()
                end.record()
                end.synchronize()
                taken[count].append(begin.elapsed_time(end) / 1e3 / IN_A_ROW)
        none, few, many = (median(times) for times in taken.values())
        self.bandwidth = (CALIBRATION[1] - CALIBRATION[0]) / (many - few)
        self.latency = max(0.0, few - none - CALIBRATION[0] / self.bandwidth)

    def _row(self, count: int) -> torch.cuda.CUDAGraph:
        """Kernels, and after each a copy of so many bytes. Calibrated by copies alone in a row, transfers took some
        10 us more than they should, on an H100."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_A_ROW):
                self.kernels.hold(self.all_sms, CALIBRATION_HOLD)
                self._beside(lambda: self._copy(count))()
        return graph

    def _start_on_cpu(self, transfer: Delay) -> Callable[[], None]:
        self.free_at = done = max(time.perf_counter(), self.free_at) + transfer.total

        def wait() -> None:
            while time.perf_counter() < done:
                pass

        return wait
