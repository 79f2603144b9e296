"""GPUs that the planner knows.

`memory` is the total that CUDA reports, as users' out-of-memory messages of torch commonly give it. It differs from the
number in the product's name, and by some MiB from driver to driver.

The ceilings are the dense rates (without sparsity) of NVIDIA's data sheets for the SXM products. (H800 and H20 are sold
in China.) Nothing here was measured by this project, and no kernel reaches these ceilings.
"""

from dataclasses import dataclass

from disagg.budget import GIB
from scripts.bench.lib.step_cost import Ceilings


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    ceilings: Ceilings
    hopper: bool = True  # fp8 weights stay fp8, and DeepEP can serve


def _gpu(name: str, gib: float, bf16: float, fp8: float | None, terabytes: float) -> Gpu:
    """Return a GPU. `bf16`, `fp8` in TFLOP/s, `terabytes` per second of memory bandwidth."""
    ceilings = Ceilings(bf16 * 1e12, fp8 * 1e12 if fp8 else None, terabytes * 1e12)
    return Gpu(name, int(gib * GIB), ceilings, hopper=fp8 is not None)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 79.1, 312, None, 2.039),
        _gpu("h100", 79.1, 989, 1979, 3.35),
        _gpu("h200", 139.8, 989, 1979, 4.8),
        _gpu("h800", 79.1, 989, 1979, 3.35),
        _gpu("h20", 95.0, 148, 296, 4.0),
    )
}
