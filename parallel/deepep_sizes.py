"""Which sizes DeepEP serves, and the memory that it takes. The limits are those of its 2.0 wheels for Hopper."""

RANKS = (2, 4, 8)  # one machine; on several, the normal kernels use RDMA, which was never tried here
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # the low-latency kernels are compiled for these
MAX_TOP_K = 11  # limit of the low-latency kernels
MAX_CAPACITY = 1024  # above, the low-latency kernels' count of tokens sent to one expert is no longer unique
MAX_LOCAL = 1024  # slots per rank, limit of the normal kernels
NUM_SMS = 20  # SMs that the normal kernels hold: DeepEP's default
QUEUE_ROWS = 256  # rows per queue in DeepEP's recommended configurations for one machine


def misfit(ranks: int, num_slots: int, hidden: int, top_k: int, capacity: int, dtype: str) -> str | None:
    """Return which size DeepEP cannot serve on any hardware, or None.

    `num_slots`: P, over all ranks. `capacity`: the most tokens that a rank dispatches in a decode step. `dtype`: its
    name.
    """
    if ranks not in RANKS:
        return f"ranks must be one of {_listed(RANKS)}, not {ranks}"
    if num_slots % ranks:
        return f"physical experts % ranks must be 0, not {num_slots} % {ranks} = {num_slots % ranks}"
    if num_slots // ranks > MAX_LOCAL:
        return f"physical experts / ranks must be at most {MAX_LOCAL}, not {num_slots} / {ranks} = {num_slots // ranks}"
    if hidden not in HIDDEN:
        return f"hidden size must be one of {_listed(HIDDEN)}, not {hidden}"
    if top_k > MAX_TOP_K:
        return f"experts a token must be at most {MAX_TOP_K}, not {top_k}"
    if capacity > MAX_CAPACITY:
        return f"tokens a rank dispatches in a decode step must be at most {MAX_CAPACITY}, not {capacity}"
    if dtype != "bfloat16":
        return f"needs bfloat16, not {dtype}"
    return None


def padded(capacity: int, ranks: int) -> int:
    """Return the capacity, rounded up so that ranks * capacity is a multiple of 4."""
    return capacity + (-capacity) % max(1, 4 // ranks)


def buffer_bytes(ranks: int, num_slots: int, hidden: int, capacity: int, num_sms: int = NUM_SMS) -> int:
    """Estimate the GPU memory of a `DeepEPBuffer` without the library: its two size hints, from its source.

    Normal mode has a queue per channel (two SMs) and rank, of a number of rows that its recommended configurations fix.
    Low latency has two regions, each to send and to receive a row per slot and token.
    Source: csrc/config.hpp and deep_ep/buffer.py of DeepEP, version 1.
    """
    align = lambda size: -(-size // 128) * 128  # noqa: E731
    queues, row = num_sms // 2 * ranks, 2 * hidden + 8 + 128 * (8 + 4) + 128 * 4  # with ids, weights and scales
    normal = align(queues * (QUEUE_ROWS * row + 5 * 4))
    message = 2 * hidden + max(16, 4 * (hidden // 128))  # a dispatch's header, or a combine's ranges
    low_latency = align(2 * (2 * num_slots * capacity * message + align(4 * num_slots)))
    return normal + low_latency


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
