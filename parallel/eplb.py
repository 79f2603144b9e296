"""Which experts go where: load counts -> a map with replicas. Pure functions of arrays (EPLB, as in DeepSeek-V3's
report, section 3.4, and DeepSeek's published code of that name).

An expert that many tokens want gets several slots, which share its tokens evenly; then slots are packed on ranks so
that the fullest rank has as little as possible. With experts in groups and ranks on nodes, whole groups stay on a node:
the gate picks few groups for a token, so that its tokens leave for few nodes.

    balance([[90, 60, 20, 10]], num_slots=6, num_ranks=3):    replicas   0  0  1  1  2  3     share 45 45 30 30 20 10
                                                              ranks     [0  2][0  3][1  1]    load  65 55 60

Beyond the published algorithm:

* Replicas are dealt in several ways (OFFSETS), of which every layer (or node of one) takes the one that packs best. The
  published way makes the largest share least, but how well shares fill the ranks matters as much: of two hot experts
  on 8 ranks with 8 slots over, 6 + 4 slots may pack evenly where 8 + 2 do not.
* Packing is followed by swaps between the fuller and the less full bins, in pairs, as long as any helps.

With one node, no layer is less balanced than under the published algorithm. With groups on nodes the bound is the
fullest node, over its ranks: loads after Zipf's law on 4 nodes give 0.72 by the published algorithm, 0.77 here, and
0.77 is that bound (0.9995 if experts may go anywhere: num_groups = 1). Choosing pairs of groups by what their replicas
could reach, instead of by their sums, was tried and found no better pairs.

All layers are worked on at once; loops run over slots and rounds, never over layers.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

OFFSETS = (0, -1e-9, 0.3, 0.6, 0.8, -0.5)  # see `replicate`; -1e-9 is 0 but for ties
ROUNDS = 48  # of swaps, at most
GOOD = 1.001  # the fullest bin over the mean: no swaps below


def balance(
    loads: ArrayLike, num_slots: int, num_ranks: int, num_groups: int = 1, num_nodes: int = 1
) -> NDArray[np.int64]:
    """loads [layers, E], tokens of each expert -> expert_of_slot [layers, P]: slot p is number p % (P / ranks) of rank
    p // (P / ranks), ranks in order of nodes. Every expert has a slot. A layer without tokens counts as one of equal
    loads.

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
    loads = np.where(loads.any(1, keepdims=True), loads, 1)
    if num_groups % num_nodes:
        num_nodes = 1
    if num_nodes == 1:
        num_groups = 1
    group = loads.reshape(layers, num_groups, -1)  # [layers, G, E / G]
    sums = group.sum(-1)
    groups = swap(sums, *pack(sums, num_nodes)).reshape(layers, -1)  # [layers, G], by node
    experts = np.arange(num_experts).reshape(num_groups, -1)[groups].reshape(layers * num_nodes, -1)
    node_loads = np.take_along_axis(loads, experts.reshape(layers, -1), 1).reshape(experts.shape)
    of_slot = _place(node_loads, num_slots // num_nodes, num_ranks // num_nodes)
    return np.take_along_axis(experts, of_slot, 1).reshape(layers, num_slots)


def _place(loads: NDArray, num_slots: int, num_ranks: int) -> NDArray[np.int64]:
    """loads [B, E] -> which of the experts is in each slot [B, num_slots], slots in order of ranks."""
    batch, ways = len(loads), len(OFFSETS)
    loads = np.repeat(loads, ways, 0)  # [B * ways, E]
    replicas = replicate(loads, num_slots, np.tile(OFFSETS, batch))
    of_slot = np.repeat(np.tile(np.arange(loads.shape[1]), len(loads)), replicas.ravel()).reshape(len(loads), -1)
    share = np.take_along_axis(loads / replicas, of_slot, 1)
    held, full = pack(share, num_ranks)
    best = full.max(1).reshape(batch, ways).argmin(1) + np.arange(batch) * ways
    held = swap(share[best], held[best], full[best])
    return np.take_along_axis(of_slot[best], held.reshape(batch, -1), 1)


def replicate(loads: NDArray, num_slots: int, offset: ArrayLike = 0) -> NDArray[np.int64]:
    """loads [B, E] -> slots of each expert [B, E], `num_slots` in each row: one each, and each slot over goes to the
    expert with the largest load / (slots so far - offset). `offset` [B] or one for all, under 1: 0 makes the largest
    share least; above, more experts get a second slot; below, the hottest get more."""
    (batch, experts), offset = loads.shape, np.broadcast_to(offset, len(loads))
    counts, first = np.ones(loads.size, np.int64), np.arange(batch) * experts
    key = loads / (1 - offset)[:, None]
    flat_key, flat_loads = key.reshape(-1), loads.reshape(-1)
    for _ in range(num_slots - experts):
        chosen = key.argmax(1) + first
        counts[chosen] += 1
        flat_key[chosen] = flat_loads[chosen] / (counts[chosen] - offset)
    return counts.reshape(batch, experts)


def pack(weights: NDArray, num_bins: int) -> tuple[NDArray[np.int64], NDArray]:
    """weights [B, n] -> the items in each bin [B, bins, n / bins], and the bins' weights [B, bins]: the heaviest item
    first, each into the lightest bin that has room."""
    batch, count = weights.shape
    size, first = count // num_bins, np.arange(batch) * num_bins
    order = np.argsort(-weights, axis=1, kind="stable")
    by_weight = np.take_along_axis(weights, order, 1).T.copy()  # [n, B]
    full, fill = np.zeros(batch * num_bins), np.zeros(batch * num_bins, np.int64)
    with_room = np.zeros((batch, num_bins))  # as `full`, infinite where there is no room
    flat_with_room, place = with_room.reshape(-1), np.empty((count, batch), np.int64)
    for i, weight in enumerate(by_weight):
        lightest = with_room.argmin(1) + first
        place[i] = lightest * size + fill[lightest]
        fill[lightest] += 1
        full[lightest] += weight
        flat_with_room[lightest] = np.where(fill[lightest] < size, full[lightest], np.inf)
    held = np.empty(weights.size, np.int64)
    held[place.T.ravel()] = order.ravel()
    return held.reshape(batch, num_bins, size), full.reshape(batch, num_bins)


def swap(weights: NDArray, held: NDArray, full: NDArray) -> NDArray[np.int64]:
    """`pack`'s result, levelled in place. A round pairs bins, fuller with less full, and in each pair swaps the two
    items that level it most; partners are far apart and close by in turn, and others every time."""
    size, half, rows = held.shape[2], held.shape[1] // 2, np.arange(len(held))
    items = np.take_along_axis(weights, held.reshape(len(held), -1), 1).reshape(held.shape)
    good = GOOD * full.mean(1)
    for turn in range(ROUNDS):
        rows = rows[full[rows].max(1) > good[rows]]
        if not len(rows):
            break
        row, by_load = rows[:, None], np.argsort(-full[rows], axis=1, kind="stable")
        if turn % 2 == 0:  # the fullest with the lightest, the next with the next, turned by one each time
            upper, lower = by_load[:, :half], np.roll(by_load[:, : -half - 1 : -1], -(turn // 2), axis=1)
        else:
            step = max(1, half // 2)
            at = np.flatnonzero(np.arange(held.shape[1] - step) // step % 2 == 0)
            upper, lower = by_load[:, at], by_load[:, at + step]
        wanted = (full[row, upper] - full[row, lower]) / 2  # [rows, pairs], what should move
        moved = items[row, upper][..., :, None] - items[row, lower][..., None, :]  # [rows, pairs, size, size]
        miss = np.abs(moved - wanted[..., None, None]).reshape(*wanted.shape, -1)
        best = miss.argmin(-1)
        helps = np.take_along_axis(miss, best[..., None], -1)[..., 0] < wanted * (1 - 1e-9)
        n, pair = np.nonzero(helps)
        give = rows[n], upper[n, pair], best[n, pair] // size
        take = rows[n], lower[n, pair], best[n, pair] % size
        change = items[give] - items[take]
        full[give[:2]] -= change
        full[take[:2]] += change
        for x in (held, items):
            x[give], x[take] = x[take], x[give]
    return held


def rank_loads(loads: ArrayLike, expert_of_slot: NDArray, num_ranks: int) -> NDArray:
    """Tokens of each rank [layers, ranks] under a map, an expert's replicas sharing its tokens evenly."""
    loads = np.asarray(loads, dtype=np.float64)
    counts = np.zeros(loads.shape, np.int64)
    np.add.at(counts, (np.arange(len(loads))[:, None], expert_of_slot), 1)
    share = np.take_along_axis(loads / np.maximum(counts, 1), expert_of_slot, 1)
    return share.reshape(len(loads), num_ranks, share.shape[1] // num_ranks).sum(-1)


def balancedness(loads: ArrayLike, expert_of_slot: NDArray, num_ranks: int) -> NDArray:
    """Mean over the fullest rank's tokens, for each layer: 1 is perfect; a layer without tokens is."""
    per_rank = rank_loads(loads, expert_of_slot, num_ranks)
    fullest = per_rank.max(1)
    return np.divide(per_rank.mean(1), fullest, out=np.ones(len(fullest)), where=fullest > 0)
