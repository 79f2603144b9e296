"""The memory of a rank's GPU, or of its machine: what it can have, and a limit for torch's allocator.

`budget.py` makes a table of it before the KV pool is made: the pool gets the rest.
"""

import os
import socket
from pathlib import Path

import torch

from disagg.budget import Budget, gib, plan_parts, share_of_gpu
from disagg.captures import Captures
from disagg.config import EngineConfig
from model.footprint import StepShape, page_bytes, room_for_context, weight_bytes
from model.pages import PAGE
from model.transformer import Transformer
from parallel.dispatchers import Dispatchers
from parallel.mesh import Mesh, gpu_id

KV_TOKENS_ON_CPU = 65536


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
        among = f" / {len(ranks)} ranks = {gib(share)} GiB" if len(ranks) > 1 else ""
        asked = f"--kv-tokens {tokens}" if tokens is not None else f"{KV_TOKENS_ON_CPU} tokens"
        most = (share // page - 1) * PAGE
        raise ValueError(
            f"{asked}: a KV pool of {size:,} bytes ({gib(size)} GiB) is over the {gib(min(ranks))} GiB of memory "
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
        terms = " + ".join(f"{name} {gib(part)}" for name, part in parts.items() if part)
        size = f"{terms} = {gib(sum(parts.values()))} GiB"
        raise ValueError(f"memory: the weights of one rank, {size}, are over the {gib(room)} GiB available to it")


def host_memory() -> int:
    """Return the bytes of available memory of this machine, or all its memory if /proc/meminfo does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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


def step_shape(model: Transformer, mesh: Mesh, dispatchers: Dispatchers) -> StepShape:
    """Return what the memory of this rank's steps depends on."""
    buffer = dispatchers.buffer
    return StepShape(
        model.config,
        model.dtype.itemsize,
        model.fp8,
        mesh.attn.size,
        mesh.ep.size,
        model.placement.slots_per_rank,
        model.ops.alignment,
        buffer.capacity if buffer is not None else None,
        model.ops.whole_keys,
        buffer is None or buffer.configs is not None,
    )


def most_context(settings: EngineConfig, shape: StepShape, rows: int) -> int:
    """Return how many tokens the prompts of a step may see together: as many as the memory table has room for.

    `rows`: the most decodes of a step. Attention expands the whole context at once.
    """
    tokens = shape.whole(settings.max_tokens_per_step)
    least = tokens + settings.longest(shape.config)
    return room_for_context(shape, tokens, least, rows * (1 + settings.speculate))


def budget_of_all(
    settings: EngineConfig,
    model: Transformer,
    mesh: Mesh,
    dispatchers: Dispatchers,
    buckets: list[int],
    captures: Captures,
    handoff_bytes: int,
) -> Budget:
    """Collective. Return the budget of the rank with the least memory left for KV, for all ranks to use.

    `buckets`: row counts of decode steps. The rest is as in `Engine`.
    """
    config, shape = model.config, step_shape(model, mesh, dispatchers)
    needed = buckets[-1] * (1 + settings.speculate) // mesh.attn.size
    assert shape.capacity is None or shape.capacity >= needed, f"{shape.capacity=} {needed=}"
    parts = plan_parts(
        shape,
        dispatchers.num_bytes,
        buckets,
        settings.max_tokens_per_step,
        settings.positions(config),
        settings.longest(config),
        captures.decodes,
        settings.rebalance.layers_per_step if settings.rebalance.interval else 0,
        handoff_bytes,
        settings.drafts_per_step,
        captures.prompts,
        settings.decodes,
    )
    page = page_bytes(config, model.dtype.itemsize)
    own = claim_memory(mesh, parts, page, dispatchers.num_bytes, settings.gpu_memory_fraction)
    return min(mesh.ep.exchange(own, Budget), key=lambda budget: budget.left)


def lift_limit(device: torch.device) -> None:
    """Allow torch to use the whole GPU again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
