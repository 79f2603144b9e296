"""Which sizes DeepEP serves, and the memory that it takes. Each of its two modes has a rule of its own.

Normal mode is compiled for some numbers of ranks. On one machine it uses NVLink alone. On several it uses RDMA between
ranks of the same number, and NVLink within a machine, which must have eight ranks. Low latency takes any number of
ranks that its constructor takes: under eight, or a multiple of eight.

The rules are those of its 2.0 wheels for Hopper: what deep_ep/buffers/legacy.py says, and what csrc/legacy/ and
csrc/kernels/legacy/ assert. The wheel's binary has the same assertions.
"""

import math
from dataclasses import dataclass

# Rows per queue in the recommended configurations, over NVLink and over RDMA, by the numbers of ranks that normal mode
# knows. A queue over RDMA is rounded up to a multiple of what is sent at once. The larger of both directions is here.
QUEUE_ROWS = {
    **dict.fromkeys((2, 4, 8), (256, 0)),
    16: (288, 140),
    **dict.fromkeys((24, 32, 48, 64), (288, 128)),
    96: (480, 132),
    128: (560, 132),
    **dict.fromkeys((144, 160), (720, 132)),
}
PER_NODE = 8  # ranks of a machine where normal mode uses RDMA; low latency takes multiples of it
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # the low-latency kernels are compiled for these
MAX_TOP_K = 11  # limit of the low-latency kernels
MAX_CAPACITY = 1024  # above, the low-latency kernels' count of tokens sent to one expert is no longer unique
MAX_SLOTS = 14 * 132  # of a job in low latency: 14 groups of warps on each of a Hopper's 132 SMs
MAX_LOW_LATENCY_BYTES = 2**35 - 1  # a buffer over RDMA is counted in 16 bytes by an int
MAX_LOCAL = 1024  # slots per rank, limit of the normal kernels
MAX_NODE_SLOTS = 512  # slots per machine: normal mode over RDMA counts them with one thread each
MAX_TOKEN_NODES = 8  # machines that one token may go to, limit of normal mode over RDMA
MAX_RDMA_ROW = 2**14 - 8  # bytes: a warp's shared memory, less a barrier, in normal mode over RDMA
NUM_SMS = 20  # SMs that the normal kernels hold: DeepEP's default


@dataclass(frozen=True)
class Sizes:
    """What decides whether DeepEP serves a job."""

    ranks: int
    ranks_per_node: int | None  # on each machine; None: unequal, or not numbered in a row
    num_slots: int  # P, over all ranks
    hidden: int
    top_k: int
    capacity: int  # the most tokens that a rank dispatches in a decode step
    dtype: str  # its name
    drafts: int = 0  # the tokens are 1 + so many for each sequence

    @property
    def nodes(self) -> int:
        """The number of machines; 0 if their ranks are unequal or not in a row."""
        return self.ranks // self.ranks_per_node if self.ranks_per_node else 0

    @property
    def crosses(self) -> bool:
        """Whether there are several machines."""
        return self.nodes != 1


def misfits(sizes: Sizes, decodes: bool = True) -> list[str]:
    """Return the rules by which DeepEP cannot serve a job on any hardware, a line each.

    A job needs low latency. One that only prefills (`decodes` is false) needs normal mode, too.
    """
    found = low_latency_misfits(sizes)
    return found if decodes else list(dict.fromkeys(found + normal_misfits(sizes)))


def low_latency_misfits(sizes: Sizes) -> list[str]:
    """Return the rules by which low latency cannot serve a job's decode steps, a line each."""
    found, ranks, slots = [], sizes.ranks, sizes.num_slots
    if ranks < 2 or (ranks > PER_NODE and ranks % PER_NODE):
        found.append(f"ranks must be 2 to {PER_NODE} or a multiple of {PER_NODE}, not {ranks}")
    if slots % ranks:
        found.append(f"physical experts % ranks must be 0, not {slots} % {ranks} = {slots % ranks}")
    if slots > MAX_SLOTS:
        found.append(f"physical experts must be at most {MAX_SLOTS}, not {slots}")
    if sizes.hidden not in HIDDEN:
        found.append(f"hidden size must be one of {_listed(HIDDEN)}, not {sizes.hidden}")
    if sizes.top_k > MAX_TOP_K:
        found.append(f"experts a token must be at most {MAX_TOP_K}, not {sizes.top_k}")
    each = sizes.drafts + 1
    product = f" = {sizes.capacity / each:g} x (1 + --speculate {sizes.drafts})" if sizes.drafts else ""
    if sizes.capacity > MAX_CAPACITY:
        most = f"must be at most {MAX_CAPACITY}, not {sizes.capacity}{product}"
        found.append(f"tokens a rank dispatches in a decode step {most}")
    if sizes.dtype != "bfloat16":
        found.append(f"needs bfloat16, not {sizes.dtype}")
    size = low_latency_bytes(slots, sizes.hidden, padded(sizes.capacity, ranks))
    if size > MAX_LOW_LATENCY_BYTES:
        rows = f"{slots} physical experts x {sizes.capacity} tokens{product}"
        found.append(f"low latency's buffer must be under 32 GiB, not {size / 2**30:.1f}: {rows}")
    return found


def normal_misfits(sizes: Sizes) -> list[str]:
    """Return the rules by which normal mode cannot serve a job's steps with prompts, a line each."""
    found, ranks, slots, nodes = [], sizes.ranks, sizes.num_slots, sizes.nodes
    legal = tuple(known for known in QUEUE_ROWS if (known > PER_NODE) == sizes.crosses)
    where = "ranks on several machines" if sizes.crosses else "ranks on one machine"
    if ranks not in legal:
        found.append(f"{where} must be one of {_listed(legal)}, not {ranks}")
    if sizes.ranks_per_node is None:
        found.append("machines must have equally many ranks, numbered in a row")
    elif sizes.crosses and sizes.ranks_per_node != PER_NODE:
        found.append(f"ranks of a machine must be {PER_NODE}, not {sizes.ranks_per_node}")
    if slots // ranks > MAX_LOCAL:
        found.append(f"physical experts / ranks must be at most {MAX_LOCAL}, not {slots} / {ranks} = {slots // ranks}")
    if sizes.crosses and nodes:
        if slots // nodes > MAX_NODE_SLOTS:
            found.append(f"physical experts of a machine must be at most {MAX_NODE_SLOTS}, not {slots // nodes}")
        if min(nodes, sizes.top_k) > MAX_TOKEN_NODES:
            reach = f"min({nodes} machines, {sizes.top_k} experts)"
            found.append(f"machines that a token goes to must be at most {MAX_TOKEN_NODES}, not {reach}")
        if (row := _align(2 * sizes.hidden + 8 + 8 * sizes.top_k, 16)) > MAX_RDMA_ROW:
            found.append(f"bytes of a token over RDMA must be at most {MAX_RDMA_ROW}, not {row}")
    return found


def described(sizes: Sizes, plain: str) -> str:
    """Return what serves a job that DeepEP serves, for the log. `plain`: the name of the other dispatcher."""
    name = "DeepEP over RDMA" if sizes.crosses else "DeepEP"
    if sizes.nodes > 1:
        name += f" between {sizes.nodes} machines of {sizes.ranks_per_node} ranks"
    why = normal_misfits(sizes)
    return f"{name}; in steps with prompts {plain} (normal mode: {'; '.join(why)})" if why else name


def padded(capacity: int, ranks: int) -> int:
    """Return the capacity, rounded up so that ranks * capacity is a multiple of 4."""
    return _align(capacity, 4 // math.gcd(ranks, 4))


def buffer_bytes(sizes: Sizes, num_sms: int = NUM_SMS) -> int:
    """Estimate the GPU memory of a `DeepEPBuffer` without the library: its size hints, from its source.

    Normal mode has its queues in memory for NVLink. Over RDMA it has more, in the memory that low latency uses too.
    Source: csrc/legacy/config.hpp and deep_ep/buffers/legacy.py of DeepEP.
    """
    low_latency = low_latency_bytes(sizes.num_slots, sizes.hidden, padded(sizes.capacity, sizes.ranks))
    if normal_misfits(sizes):
        return low_latency
    nvlink, rdma = normal_bytes(sizes.ranks, sizes.hidden, num_sms)
    return nvlink + max(rdma, low_latency)


def normal_bytes(ranks: int, hidden: int, num_sms: int = NUM_SMS) -> tuple[int, int]:
    """Return normal mode's memory over NVLink and over RDMA: a queue per channel (two SMs) and peer.

    Over RDMA the peers are machines, and a queue has as much memory to send as to receive.
    """
    channels, nodes = num_sms // 2, max(1, ranks // PER_NODE)
    nvlink_rows, rdma_rows = QUEUE_ROWS[ranks]
    row = 2 * hidden + 8 + 128 * (8 + 4) + 128 * 4  # with its source, ids, weights and scales
    nvlink = channels * min(ranks, PER_NODE) * (nvlink_rows * row + (2 * nodes + 3) * 4)
    if nodes == 1:
        return _align(nvlink, 128), 0
    rdma = channels * nodes * 2 * (rdma_rows * (row + 16) + (2 * PER_NODE + 2) * 4)
    return _align(nvlink, 128), _align(rdma, 128)


def low_latency_bytes(num_slots: int, hidden: int, capacity: int) -> int:
    """Return low latency's memory: two regions, each to send and to receive a row per slot and token."""
    message = 2 * hidden + max(16, 4 * (hidden // 128))  # a dispatch's header, or a combine's ranges
    return _align(2 * (2 * num_slots * capacity * message + _align(4 * num_slots, 128)), 128)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
