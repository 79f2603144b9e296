"""The memory budget of a rank's GPU, computed before the KV pool is made: the pool gets the rest.

`model/footprint.py` has the arithmetic on shapes. Here it becomes a table, a budget, and a limit for torch's allocator.
"""

import os
import socket
from collections import abc
from dataclasses import dataclass
from pathlib import Path

import torch

from model.batch import PAGE
from model.footprint import StepShape, contiguous_step, graphs, masked_step, sampling, table_bytes, weight_bytes
from parallel.mesh import Mesh, gpu_id

GIB = 2**30
KV_TOKENS_ON_CPU = 65536
WORKSPACES = 3 * 32 * 2**20  # cuBLAS takes 32 MiB (Hopper) per stream: the step's, the shared expert's, capture's


@dataclass(frozen=True)
class Budget:
    """The bytes that one rank may use of its GPU, and the parts that are not KV."""

    available: int
    why: str  # `available` as an equation
    parts: dict[str, int]  # name -> bytes
    page: int  # bytes

    @property
    def left(self) -> int:
        return self.available - sum(self.parts.values())

    @property
    def most_pages(self) -> int:
        """Pages that fit in addition to the null page."""
        return max(0, self.left // self.page - 1)

    def pages(self, tokens: int | None) -> int:
        """Return the size of the pool, without the null page: `tokens` in pages, rounded down, or (None) all that fit.

        Raises ValueError if they do not fit.
        """
        pages = max(1, self.most_pages) if tokens is None else tokens // PAGE
        if pages <= self.most_pages:
            return pages
        asked = "the least: a page and the null page" if tokens is None else f"--kv-tokens {tokens}"
        most = f"--kv-tokens (to at most {self.most_pages * PAGE}), " if tokens is not None and self.most_pages else ""
        raise ValueError(
            f"{self.excess(pages, asked)}; raise --gpu-memory-fraction, or lower {most}"
            f"--max-tokens-per-step, --max-batch or --max-model-len"
        )

    def excess(self, pages: int, asked: str) -> str:
        """Return the sum that is over the limit, with a pool of `pages` pages plus the null page. `asked`: why."""
        size = (pages + 1) * self.page
        terms = [f"{name} {_gib(part)}" for name, part in self.parts.items() if part] + [f"KV {_gib(size)} ({asked})"]
        return (
            f"GPU memory: {' + '.join(terms)} = {_gib(sum(self.parts.values()) + size)} GiB is over "
            f"{self.why} = {_gib(self.available)} GiB"
        )

    def table(self, pages: int) -> str:
        """Return lines of name and GiB: each part, a pool of `pages` pages plus the null page, and the limit."""
        pool = (pages + 1) * self.page
        sizes = {**self.parts, "KV": pool, "together": sum(self.parts.values()) + pool, "limit": self.available}
        notes = {"KV": f"  {pages:,} pages, {pages * PAGE:,} tokens", "limit": f"  {self.why}"}
        width = max(map(len, sizes))
        lines = [f"{name:>{width}}: {_gib(size):>8}{notes.get(name, '')}" for name, size in sizes.items()]
        return "\n".join([f"{'memory':>{width}}: {'GiB':>8}", *lines])


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def share_of_gpu(total: int, free: int, held: int, fraction: float, sharers: int) -> tuple[int, str]:
    """Return the bytes that one of `sharers` ranks on a GPU may use, and the equation for the log.

    It is the smaller of two limits. One is the rank's share of `fraction` of the `total` bytes. The other is its share
    of the `free` bytes, plus the `held` bytes that it has taken already.
    """
    allowed, obtainable = int(fraction * total) // sharers, free // sharers + held
    among = f" / {sharers} ranks" if sharers > 1 else ""
    if allowed <= obtainable:
        return allowed, f"--gpu-memory-fraction {fraction:g} x {_gib(total)}{among}"
    return obtainable, f"free {_gib(free)}{among} + {_gib(held)} that this rank has taken"


def share_of_torch(total: int, buffers: int, fraction: float, sharers: int) -> float:
    """Return the fraction of the GPU that torch may hold for one of `sharers` ranks.

    This is the rank's share of `fraction` plus half of the rest, without the `buffers` that torch does not allocate.
    The other half is for later users of memory, above all NCCL. Groups and links connect at their first use. By then
    torch's cache could have grown over all the memory.
    """
    return max(0.0, (1 + fraction) / 2 / sharers - buffers / total)


def pages_on_host(mesh: Mesh, tokens: int | None, page: int) -> int:
    """Collective. Return the size of a CPU rank's pool, without the null page: `tokens` in pages, rounded down.

    None: KV_TOKENS_ON_CPU. Raises ValueError if a machine's memory cannot hold the pools of its ranks.
    """
    pages = (tokens or KV_TOKENS_ON_CPU) // PAGE
    machines: dict[str, list[int]] = {}
    for host, available in mesh.ep.exchange((socket.gethostname(), host_memory()), tuple[str, int]):
        machines.setdefault(host, []).append(available)
    ranks = min(machines.values(), key=lambda seen: min(seen) // len(seen))  # the machine with the least per rank
    share, size = min(ranks) // len(ranks), (pages + 1) * page
    if size > share:
        among = f" / {len(ranks)} ranks = {_gib(share)} GiB" if len(ranks) > 1 else ""
        asked = f"--kv-tokens {tokens}" if tokens is not None else f"{KV_TOKENS_ON_CPU} tokens"
        most = (share // page - 1) * PAGE
        raise ValueError(
            f"{asked}: a KV pool of {size:,} bytes ({_gib(size)} GiB) is over the {_gib(min(ranks))} GiB of memory "
            f"that are available{among}; " + (f"--kv-tokens can be at most {most}" if most > 0 else "no page fits")
        )
    return pages


def check_weights(mesh: Mesh, shape: StepShape) -> None:
    """Collective. Raise ValueError if a rank's weights are over the memory that it can have, before they take any."""
    on_gpu = mesh.device.type == "cuda"
    place = gpu_id(mesh.device) if on_gpu else socket.gethostname()
    mine = place, torch.cuda.mem_get_info(mesh.device)[0] if on_gpu else host_memory()
    seen = mesh.ep.exchange(mine, tuple[str, int])
    places = [place for place, _ in seen]
    room, parts = min(available // places.count(place) for place, available in seen), weight_bytes(shape)
    if sum(parts.values()) > room:
        terms = " + ".join(f"{name} {_gib(part)}" for name, part in parts.items() if part)
        size = f"{terms} = {_gib(sum(parts.values()))} GiB"
        raise ValueError(f"memory: the weights of one rank, {size}, are over the {_gib(room)} GiB available to it")


def host_memory() -> int:
    """Return the bytes of available memory of this machine, or all its memory if /proc/meminfo does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_parts(
    shape: StepShape,
    buffers: int,
    buckets: abc.Sequence[int],
    max_tokens_per_step: int,
    max_model_len: int,
    longest: int,
    captures: bool,
    spare_layers: int = 0,
    handoff: int = 0,
) -> dict[str, int]:
    """Return the table's rows without KV: name -> bytes.

    `buffers`: bytes of the dispatcher's buffers. `buckets`: row counts of decode steps.
    `longest`: the most tokens of KV per request. At most one prompt in a step began earlier, and it can attend to that
    many tokens in addition to the step's own.
    `spare_layers`: layers whose experts may move at once (`disagg/rebalance.py`).
    `handoff`: bytes of the KV handoff's buffers (`disagg/handoff/credits.py`).
    """
    tokens = -(-max_tokens_per_step // shape.attn_tp) * shape.attn_tp
    most = max(buckets)
    steps = (
        contiguous_step(shape, tokens, tokens + longest, most),
        masked_step(shape, most),
        sampling(shape.config, most),
    )
    weights = weight_bytes(shape)
    return weights | {
        "spare experts": spare_layers * weights["routed experts"] // max(shape.config.num_moe_layers, 1),
        "tables": table_bytes(shape, max_model_len, most),
        "communication buffers": buffers,
        "KV handoff": handoff,
        "activations": max(steps),
        "CUDA graphs": graphs(shape, buckets) if captures else 0,
        "cuBLAS workspaces": WORKSPACES,
    }


def claim_memory(mesh: Mesh, parts: dict[str, int], page: int, buffers: int, fraction: float) -> Budget:
    """Collective. Return this rank's budget, and limit torch's allocator to it until `lift_limit`.

    Call it after the weights were made: the budget depends on the GPU's free memory now.
    """
    sharers = mesh.ranks_on_my_gpu()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(mesh.device)
    held = torch.cuda.memory_reserved(mesh.device) + buffers
    torch.cuda.set_per_process_memory_fraction(share_of_torch(total, buffers, fraction, sharers), mesh.device.index)
    return Budget(*share_of_gpu(total, free, held, fraction, sharers), parts, page)


def lift_limit(device: torch.device) -> None:
    """Allow torch to use the whole GPU again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
