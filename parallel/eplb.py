"""Which experts go where: load counts -> a map with replicas. Pure functions of arrays (EPLB, as in DeepSeek-V3's
report, section 3.4, and DeepSeek's published code of that name).

An expert that many tokens want gets several slots, which share its tokens evenly; then slots are packed on ranks so
that the fullest rank has as little as possible. With experts in groups and ranks on nodes, whole groups stay on a node:
the gate picks few groups for a token, so that its tokens leave for few nodes.

    balance([[90, 60, 20, 10]], num_slots=6, num_ranks=3):    replicas   0  0  1  1  2  3     share 45 45 30 30 20 10
                                                              ranks     [0  3][0  2][1  1]    load  55 65 60

Beyond the published algorithm: the packing is followed by swaps between the fullest rank and the others, as long as any
makes the fuller of the two less full; and where shares tie, replicas are dealt in two ways, of which each layer takes
the better. All layers are worked on at once; nothing loops over a layer's experts.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

SWAPS = 36  # at most, in a layer (or a node of one)
GOOD = 1.001  # the fullest rank over the mean: no swaps below


def balance(
    loads: ArrayLike, num_slots: int, num_ranks: int, num_groups: int = 1, num_nodes: int = 1
) -> NDArray[np.int64]:
    """loads [layers, E], tokens of each expert -> expert_of_slot [layers, P]: slot p is number p % (P / ranks) of rank
    p // (P / ranks), ranks in order of nodes. Every expert has a slot.

    Groups (of E / num_groups consecutive experts) stay on nodes if they divide over them, else all ranks are one node.
    ValueError spells the equation that does not hold.
    """
    loads = np.asarray(loads, dtype=np.float64)
    layers, num_experts = loads.shape
    for name, value, divisor in (
        ("slots % ranks", num_slots, num_ranks),
        ("n_routed_experts % n_group", num_experts, num_groups),
        ("ranks % nodes", num_ranks, num_nodes),
    ):
        if divisor < 1 or value % divisor:
            raise ValueError(f"{name} must be 0, not {value} % {divisor}" + f" = {value % max(divisor, 1)}")
    if num_slots < num_experts:
        raise ValueError(f"slots >= n_routed_experts must hold, not {num_slots} >= {num_experts}")
    if num_groups % num_nodes:
        num_nodes = 1
    if num_nodes == 1:
        num_groups = 1
    tie = 1e-9 * max(loads.mean(), 1.0)
    ways = np.concatenate((loads + tie, np.maximum(loads - tie, 0)))  # a tie goes to the less, the more replicated
    maps = _balance(ways, num_slots, num_ranks, num_groups, num_nodes).reshape(2, layers, num_slots)
    best = np.stack([balancedness(loads, of_slot, num_ranks) for of_slot in maps]).argmax(0)
    return maps[best, np.arange(layers)]


def _balance(loads: NDArray, num_slots: int, num_ranks: int, num_groups: int, num_nodes: int) -> NDArray[np.int64]:
    layers, num_experts = loads.shape
    group = loads.reshape(layers, num_groups, -1)  # [layers, G, E / G]
    node = pack(group.sum(-1), num_nodes)  # of each group
    in_node = np.argsort(node, axis=1, kind="stable")  # [layers, G], the groups by node
    experts = np.arange(num_experts).reshape(num_groups, -1)[in_node].reshape(layers * num_nodes, -1)
    node_loads = np.take_along_axis(loads, experts.reshape(layers, -1), 1).reshape(experts.shape)

    replicas = replicate(node_loads, num_slots // num_nodes)
    of_slot = np.repeat(np.tile(np.arange(experts.shape[1]), len(experts)), replicas.ravel()).reshape(len(experts), -1)
    share = np.take_along_axis(node_loads / replicas, of_slot, 1)
    rank = pack(share, num_ranks // num_nodes)
    of_slot = np.take_along_axis(of_slot, np.argsort(rank, axis=1, kind="stable"), 1)
    return np.take_along_axis(experts, of_slot, 1).reshape(layers, num_slots)


def replicate(loads: NDArray, num_slots: int) -> NDArray[np.int64]:
    """loads [B, E] -> slots of each expert [B, E], `num_slots` in each row, that make the largest share least: each
    slot over goes to the expert whose share is the largest then."""
    counts = np.ones(loads.shape, np.int64)
    rows = np.arange(len(loads))
    for _ in range(num_slots - loads.shape[1]):
        counts[rows, (loads / counts).argmax(1)] += 1
    return counts


def pack(weights: NDArray, num_bins: int) -> NDArray[np.int64]:
    """weights [B, n] -> the bin of each item [B, n], n / num_bins items in each: the heaviest item first, each into the
    lightest bin that has room, then swaps."""
    batch, count = weights.shape
    rows, size = np.arange(batch), count // num_bins
    if num_bins == 1 or size == 0:
        return np.zeros(weights.shape, np.int64)
    order = np.argsort(-weights, axis=1, kind="stable").T.copy()  # [n, B]
    by_weight = np.take_along_axis(weights, order.T, 1).T.copy()
    bins, left = np.zeros((batch, num_bins)), np.full((batch, num_bins), size)
    with_room = np.zeros((batch, num_bins))  # the same, infinite where a bin is full
    of_item = np.empty(weights.shape, np.int64)
    for item, weight in zip(order, by_weight, strict=True):
        lightest = with_room.argmin(1)
        of_item[rows, item] = lightest
        left[rows, lightest] -= 1
        bins[rows, lightest] += weight
        with_room[rows, lightest] = np.where(left[rows, lightest], bins[rows, lightest], np.inf)
    return _swap(weights, of_item, bins)


def _swap(weights: NDArray, of_item: NDArray, bins: NDArray) -> NDArray[np.int64]:
    """Swap an item of the fullest bin with one of another, as long as the fuller of the two gets less full by it."""
    active = np.arange(len(weights))
    size = weights.shape[1] // bins.shape[1]
    for _ in range(SWAPS):
        w, where, load = weights[active], of_item[active], bins[active]
        rows, fullest = np.arange(len(active)), load.argmax(1)
        bad = load[rows, fullest] > GOOD * load.mean(1)
        if not bad.all():
            active, w, where, load = active[bad], w[bad], where[bad], load[bad]
            rows, fullest = np.arange(len(active)), fullest[bad]
        if not len(active):
            break
        mine = np.nonzero(where == fullest[:, None])[1].reshape(-1, size)  # [A, size], the fullest bin's items
        less = np.take_along_axis(w, mine, 1)[:, :, None] - w[:, None]  # [A, size, n], what it would lose
        top = load[rows, fullest][:, None, None]
        after = np.maximum(top - less, np.take_along_axis(load, where, 1)[:, None] + less)
        after = np.where(where[:, None] == fullest[:, None, None], np.inf, after).reshape(len(active), -1)
        best = after.argmin(1)
        improves = after[rows, best] < top[:, 0, 0] * (1 - 1e-12)
        if not improves.any():
            break
        active, best, rows = active[improves], best[improves], rows[improves]
        give, take = mine[rows, best // w.shape[1]], best % w.shape[1]
        from_bin, to_bin, moved = fullest[rows], where[rows, take], w[rows, give] - w[rows, take]
        of_item[active, give], of_item[active, take] = to_bin, from_bin
        bins[active, from_bin] -= moved
        bins[active, to_bin] += moved
    return of_item


def rank_loads(loads: ArrayLike, expert_of_slot: NDArray, num_ranks: int) -> NDArray:
    """Tokens of each rank [layers, ranks] under a map, an expert's replicas sharing its tokens evenly."""
    loads = np.asarray(loads, dtype=np.float64)
    counts = np.zeros(loads.shape, np.int64)
    np.add.at(counts, (np.arange(len(loads))[:, None], expert_of_slot), 1)
    share = np.take_along_axis(loads / np.maximum(counts, 1), expert_of_slot, 1)
    return share.reshape(len(loads), num_ranks, -1).sum(-1)


def balancedness(loads: ArrayLike, expert_of_slot: NDArray, num_ranks: int) -> NDArray:
    """Mean over the fullest rank's tokens, for each layer: 1 is perfect; a layer without tokens is."""
    per_rank = rank_loads(loads, expert_of_slot, num_ranks)
    fullest = per_rank.max(1)
    return np.divide(per_rank.mean(1), fullest, out=np.ones(len(fullest)), where=fullest > 0)
