"""SIMULATED communication time: a link that carries no data, but is busy for a modelled time.

For benchmarks of one rank (`loopback.py`). A transfer has three parts: a send kernel that takes all SMs, a flight
beside other computation, and a receive kernel that takes all SMs. On a GPU the flights of all transfers run one after
another, on a stream of their own. `wait` makes the computing stream wait for the flight; the host never waits:

    computing   ... | send | kernels enqueued between start and wait ... | receive | ...
    link               | flight >>>>>>>>>>>>>>>>>>>>> |

In flight, normal mode holds `num_sms` SMs (`hold.py`). Low latency holds none. Its flight is a copy to the host's
pinned memory, whose size makes it take the modelled time on this machine. A copy engine reads the GPU's memory and the
data cross PCIe, as when a network card reads them. (A waiting block would not do: some attention kernels' blocks leave
no registers free, so one of them would have to wait for it.)

On some machines the speed of such copies changes over time. So call `calibrate` before a measurement, and check the
transfers' times after it. Everything here can be captured in a CUDA graph.

On a CPU nothing runs concurrently; there `wait` returns when the transfer would be done.
"""

import importlib
import time
from collections.abc import Callable
from statistics import median

import torch

from scripts.bench.one_rank.delay import Delay, DelayModel

CALIBRATION = (2**20, 2**25)  # bytes
CALIBRATION_HOLD = 5e-6  # seconds
IN_A_ROW = 10  # transfers that are timed together, so that the start of a graph hardly counts


class SimulatedLink:
    def __init__(self, model: DelayModel, device: torch.device, num_sms: int = 0) -> None:
        """`num_sms`: SMs that a flight holds; 0 means low latency, whose flight is a copy."""
        self.model, self.device, self.num_sms = model, device, num_sms
        self.free_at = 0.0  # on a CPU: when the latest transfer is done, by time.perf_counter
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
        """Start a transfer. Returns `wait`, to be called once before the received data are used."""
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
        """Call `fly` on the link's own stream, after the work enqueued on the current stream.

        Returns a function that makes the current stream wait for it.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            fly()
            done = self.stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)

    def _fly(self, seconds: float) -> None:
        if not self.copies:
            self.kernels.hold(self.num_sms, seconds)
            return
        remaining = max(1, round((seconds - self.latency) * self.bandwidth))  # bytes
        while remaining > 0:
            count = min(remaining, self.sent.numel())
            self._copy(count)
            remaining -= count

    def _copy(self, count: int) -> None:
        self.host[:count].copy_(self.sent[:count], non_blocking=True)

    def calibrate(self) -> None:
        """Measure copies to the host as transfers use them: in a graph, on a stream of their own, between kernels.

        Sets the bytes per second, and the seconds by which a copy between two kernels delays the second one. This holds
        for transfers that are started or captured from now on.
        """
        if not self.copies:
            return
        rows = {count: self._row(count) for count in (0, *CALIBRATION)}
        taken: dict[int, list[float]] = {count: [] for count in rows}
        for _ in range(20):  # in turns, so that other traffic on PCIe slows all of them
            for count, row in rows.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                row.replay()
                end.record()
                end.synchronize()
                taken[count].append(begin.elapsed_time(end) / 1e3 / IN_A_ROW)
        without, small, large = (median(times) for times in taken.values())
        self.bandwidth = (CALIBRATION[1] - CALIBRATION[0]) / (large - small)
        self.latency = max(0.0, small - without - CALIBRATION[0] / self.bandwidth)

    def _row(self, count: int) -> torch.cuda.CUDAGraph:
        """Capture IN_A_ROW kernels, each followed by a copy of `count` bytes.

        Calibrated with copies alone, transfers took about 10 us too long on an H100.
        """
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
