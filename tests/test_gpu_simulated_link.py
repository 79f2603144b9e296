"""Simulated communication on a GPU takes the modelled time: alone, in a CUDA graph, and beside computation."""

from collections.abc import Callable
from statistics import median

import pytest
import torch

from scripts.bench.one_rank.delay import Delay
from scripts.bench.one_rank.rank import captured
from scripts.bench.one_rank.simulated_link import SimulatedLink

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
TIMES = {"dispatch": Delay(150e-6, 15e-6, 15e-6), "combine": Delay(1e-3)}


def model(what: str, tokens: int) -> Delay:
    return TIMES[what]


def seconds(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The GPU's time for `run`. `before` keeps the GPU busy while the host launches `run`, which takes time itself."""
    taken = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return median(taken)


@pytest.mark.parametrize("num_sms", [1, 20, 132])
def test_sms_are_held_for_the_time(num_sms: int) -> None:
    from scripts.bench.one_rank.hold import hold

    hold(num_sms, 1e-3)
    assert 1e-3 <= seconds(lambda: hold(num_sms, 1e-3), before=lambda: hold(1, 2e-3)) < 1.05e-3
    assert 1e-3 <= seconds(captured(lambda: hold(num_sms, 1e-3)).replay) < 1.05e-3


@pytest.mark.parametrize("num_sms", [0, 20])
def test_transfers_take_their_time(num_sms: int) -> None:
    """Ten transfers in a row. Without a graph each launch adds a few microseconds, so only long ones are checked.

    The median over several calibrations counts: on some machines the speed of copies changes by a fifth afterwards.
    """
    link = SimulatedLink(model, CUDA, num_sms)

    def ten(what: str) -> None:
        for _ in range(10):
            link.start(what, 128)()

    for what, transfer in TIMES.items():
        eager, replayed = [], []
        for _ in range(9):
            link.calibrate()
            eager.append(seconds(lambda what=what: ten(what)) / 10)
            replayed.append(seconds(captured(lambda what=what: ten(what)).replay) / 10)
        for name, taken in (("eager", eager), ("in a graph", replayed)):
            each = " ".join(f"{1e6 * t:.1f}" for t in sorted(taken))
            print(f"{num_sms=} {what}, {name}: {each} us for {1e6 * transfer.total:.1f}")
        assert median(replayed) == pytest.approx(transfer.total, rel=0.05, abs=10e-6)
        if transfer.total >= 1e-3:
            assert median(eager) == pytest.approx(transfer.total, rel=0.05)


@pytest.mark.parametrize("num_sms", [0, 20])
def test_computation_runs_beside_a_flight(num_sms: int) -> None:
    """In a graph, a flight of 1 ms and products of 0.5 ms take 1 ms together, not 1.5 ms.

    With 20 SMs held, products slow down in proportion, and not more.
    """
    link, side = SimulatedLink(model, CUDA, num_sms), 2048
    a, b, out = (torch.randn(side, side, device=CUDA, dtype=torch.bfloat16) for _ in range(3))

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    one = seconds(captured(lambda: products(50)).replay) / 50
    count = round(0.5e-3 / one)

    def beside() -> None:
        wait = link.start("combine", 128)
        products(count)
        wait()

    taken = seconds(captured(beside).replay)
    print(f"{num_sms=}: {1e3 * taken:.3f} ms")
    assert 0.95e-3 < taken < 1.2e-3


def test_deep_gemm_leaves_sms() -> None:
    deep_gemm = pytest.importorskip("deep_gemm")
    from kernels.deep_gemm_ops import leave_sms

    there = deep_gemm.get_num_sms()
    with leave_sms(20):
        assert deep_gemm.get_num_sms() == there - 20
    assert deep_gemm.get_num_sms() == there
