"""Minimum-cost multicut of a region graph: how many segments there are follows from the signed costs of its edges.

Minimise the sum of the costs of all edges between different segments; a positive cost holds two nodes together. The
problem is NP-hard. Here: greedy additive edge contraction (Keuper et al. 2015, "Efficient decomposition of image and
mesh graphs by lifted multicuts", algorithm 1), Kernighan-Lin with joins (algorithm 2 there), then fusion moves
(Beier et al. 2015, "Fusion moves for correlation clustering") with proposals from perturbed costs.
"""

import dataclasses

import numba
import numpy as np

from emjax.postprocess.region_graph import region_graph

_EPSILON = 1e-9


@dataclasses.dataclass(frozen=True)
class BoundaryEdges:
    """Edges between touching fragments.

    Attributes:
      uv: (E, 2) uint32, u < v, lexicographic.
      probability: (E,) float64, mean of 1 - affinity over the faces between u and v, all directions pooled.
      size: (E,) float64, number of those faces.
    """

    uv: np.ndarray
    probability: np.ndarray
    size: np.ndarray


def boundary_edge_features(
    affinities: np.ndarray, fragments: np.ndarray, foreground: np.ndarray | None = None, *, threads: int = 1
) -> BoundaryEdges:
    """Mean boundary probability and contact area of each pair of fragments (SegNeuron; elf's boundary features).

    Args:
      affinities: (3, z, y, x), offsets (-1, 0, 0), (0, -1, 0), (0, 0, -1); float32, or uint8 that stands for
        value / 255. The affinity of a face is that of its higher voxel.
      fragments: (z, y, x), integer ids; 0 is background.
      foreground: (z, y, x), probability in the type of the affinities: affinities are limited to it before anything
        else. No limit if None.
      threads: number of threads; the result does not depend on it.

    Raises:
      ValueError: shapes or types that do not fit, or bad ids.
    """
    affinities = np.asarray(affinities)
    if foreground is not None:
        foreground = np.asarray(foreground)
        if affinities.ndim != 4 or foreground.shape != affinities.shape[1:]:
            raise ValueError(
                f"foreground has shape {foreground.shape} and affinities {affinities.shape}; expected (z, y, x) of it"
            )
        if foreground.dtype != affinities.dtype:
            raise ValueError(f"foreground is {foreground.dtype} and affinities {affinities.dtype}; expected the same")
        affinities = np.minimum(affinities, foreground[None])
    boundary: np.ndarray
    if affinities.dtype == np.uint8:
        boundary = np.uint8(255) - affinities
    else:
        # 1 - a is rounded to float32 before the mean, as the reference does.
        boundary = np.float32(1) - affinities.astype(np.float32, copy=False)
    graph = region_graph(boundary, fragments, threads=threads)
    size = graph.count.astype(np.float64)
    assert graph.sum is not None
    return BoundaryEdges(graph.uv, graph.sum / (size * graph.scale), size)


def multicut_costs(probability: np.ndarray, size: np.ndarray | None = None, beta: float = 0.5) -> np.ndarray:
    """Costs of cutting from boundary probabilities, as SegNeuron and elf compute them.

    (ln((1 - p) / p) + ln((1 - beta) / beta)) * size / largest size, with p = 0.998 probability + 0.001.

    Args:
      probability: (E,) boundary probability in [0, 1]: 1 = certainly two objects.
      size: (E,) number of faces; edges count alike if None.
      beta: in (0, 1); above 0.5 favours cuts, below 0.5 merges (SegNeuron: 0.25).

    Returns:
      (E,) float64, positive where the nodes should stay together.

    Raises:
      ValueError: probabilities outside [0, 1], sizes that are not positive or do not fit, beta outside (0, 1).
    """
    p = np.asarray(probability, np.float64)
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise ValueError(f"probability spans {p.min()} to {p.max()}; expected 0 to 1")
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; expected a number between 0 and 1")
    p = 0.998 * p + 0.001
    costs = np.log((1 - p) / p) + np.log((1 - beta) / beta)
    if size is None or not p.size:
        return costs
    size = np.asarray(size, np.float64)
    if size.shape != p.shape:
        raise ValueError(f"size has shape {size.shape}; expected {p.shape}, that of probability")
    if not size.min() > 0:
        raise ValueError(f"size holds {size.min()}; expected positive numbers of faces")
    return costs * size / size.max()


def multicut(
    nodes: int,
    uv: np.ndarray,
    costs: np.ndarray,
    *,
    refine: bool = True,
    proposals: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Partitions a graph so that the costs of its cut edges sum to little.

    Args:
      nodes: number of nodes.
      uv: (E, 2) pairs of node numbers, 0 to nodes - 1; repeated pairs add up.
      costs: (E,) float; positive holds together, negative pulls apart.
      refine: Kernighan-Lin and fusion moves after greedy contraction.
      proposals: fusion moves to try at most, ending early after 10 without success. 0 leaves Kernighan-Lin alone, which
        is the published method; 40 lowered the energy of two random graphs in five.
      seed: of the perturbed costs of the proposals.

    Returns:
      (nodes,) uint32 segment numbers 0.. in the order of their first nodes. The energy is never above that of greedy
      contraction.

    Raises:
      ValueError: ``nodes`` negative, pairs out of range or of a node with itself, costs that do not fit or not finite.
    """
    uv, costs = _checked(nodes, uv, costs)
    if proposals < 0:
        raise ValueError(f"proposals is {proposals}; expected at least 0")
    uv, costs = _without_parallels(nodes, uv, costs)
    labels = _greedy(nodes, uv, costs)
    if not refine or not len(uv):
        return labels
    graph = _adjacency(nodes, uv, costs)
    labels = _kernighan_lin(graph, uv, costs, labels)
    return _fusion(graph, uv, costs, labels, proposals, seed)


def multicut_energy(uv: np.ndarray, costs: np.ndarray, labels: np.ndarray) -> float:
    """Sum of the costs of the edges whose ends have different labels; lower is better."""
    uv = np.asarray(uv, np.int64).reshape(-1, 2)
    return float(np.asarray(costs, np.float64)[labels[uv[:, 0]] != labels[uv[:, 1]]].sum())


def _checked(nodes: int, uv: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not 0 <= nodes <= 2**31 - 1:
        raise ValueError(f"nodes is {nodes}; expected 0 to 2**31 - 1")
    uv, costs = np.asarray(uv), np.asarray(costs, np.float64)
    if uv.size == 0:
        uv = uv.reshape(-1, 2).astype(np.int64)
    if uv.ndim != 2 or uv.shape[1] != 2 or uv.dtype.kind not in "ui":
        raise ValueError(f"uv has shape {uv.shape} and type {uv.dtype}; expected whole numbers (edges, 2)")
    if costs.shape != (len(uv),):
        raise ValueError(f"costs has shape {costs.shape}; expected ({len(uv)},), one for each edge of uv")
    if not np.isfinite(costs).all():
        raise ValueError(f"costs holds {costs[~np.isfinite(costs)][0]}; expected finite numbers")
    if len(uv) and (uv.min() < 0 or uv.max() >= nodes):
        raise ValueError(f"uv names node {uv.min() if uv.min() < 0 else uv.max()}; expected 0 to {nodes - 1}")
    uv = uv.astype(np.int64)
    if (uv[:, 0] == uv[:, 1]).any():
        raise ValueError(f"uv joins node {uv[uv[:, 0] == uv[:, 1]][0, 0]} with itself; expected two nodes")
    return uv, costs


def _without_parallels(nodes: int, uv: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges with u < v, lexicographic, parallel ones summed."""
    keys, inverse = np.unique(uv.min(1) * max(nodes, 1) + uv.max(1), return_inverse=True)
    return np.stack([keys // max(nodes, 1), keys % max(nodes, 1)], 1), np.bincount(inverse, costs, len(keys))


def _dense(labels: np.ndarray) -> np.ndarray:
    """Numbers 0.. in the order of first occurrence."""
    result = np.empty(len(labels), np.uint32)
    _renumber(labels, result, np.full(int(labels.max()) + 1 if len(labels) else 0, -1, np.int64))
    return result


def _greedy(nodes: int, uv: np.ndarray, costs: np.ndarray) -> np.ndarray:
    parents = np.arange(nodes, dtype=np.int64)
    edges = len(uv)
    ends, weights = np.ascontiguousarray(uv).copy(), np.array(costs, np.float64)
    # Half-edges in linked lists: half-edge 2e starts at ends[e, 0], 2e + 1 at ends[e, 1].
    first, last, degree = (np.full(nodes, value, np.int64) for value in (-1, -1, 0))
    following = np.full(2 * edges, -1, np.int64)
    slots = 1 << max(4, int(4 * edges).bit_length())
    keys, values = np.full(slots, -1, np.int64), np.empty(slots, np.int64)
    heap_weights, heap_edges = np.empty(max(16, edges), np.float64), np.empty(max(16, edges), np.int64)
    state = np.zeros(2, np.int64)
    _link(ends, first, last, degree, following, keys, values)
    _fill_heap(weights, heap_weights, heap_edges, state)
    state[1] = edges
    while not _contract(
        ends, weights, parents, first, last, degree, following, keys, values, heap_weights, heap_edges, state
    ):
        # Stopped for want of room: in the heap, or in the table of pairs.
        if 2 * state[1] > len(keys):
            keys, values = np.full(2 * len(keys), -1, np.int64), np.empty(2 * len(keys), np.int64)
            state[1] = _rehash_edges(ends, keys, values)
        heap_weights = np.concatenate([heap_weights, np.empty_like(heap_weights)])
        heap_edges = np.concatenate([heap_edges, np.empty_like(heap_edges)])
    _flatten(parents)
    return _dense(parents)


@dataclasses.dataclass(frozen=True)
class _Adjacency:
    """Neighbours of node n: ``neighbours[start[n]:start[n + 1]]``, with ``weights``."""

    start: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray


def _adjacency(nodes: int, uv: np.ndarray, costs: np.ndarray) -> _Adjacency:
    source, target = np.concatenate([uv[:, 0], uv[:, 1]]), np.concatenate([uv[:, 1], uv[:, 0]])
    order = np.argsort(source, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=nodes))]).astype(np.int64)
    return _Adjacency(start, target[order], np.concatenate([costs, costs])[order])


def _kernighan_lin(
    graph: _Adjacency, uv: np.ndarray, costs: np.ndarray, labels: np.ndarray, rounds: int = 100
) -> np.ndarray:
    """Moves between pairs of segments, splits, joins and moves of single nodes until nothing helps."""
    labels = _dense(labels).astype(np.int64)
    nodes = len(labels)
    changed = np.ones(nodes + 1, np.bool_)
    for _ in range(rounds):
        before = labels.copy()
        segments = int(labels.max()) + 1
        pairs = _pairs(uv, costs, labels)[0]
        # One free label more than there can be segments: the empty side of a split.
        first, ahead, behind = (np.full(size, -1, np.int64) for size in (nodes + 1, nodes, nodes))
        _list_members(labels, first, ahead, behind)
        gained = _improve(
            graph.start, graph.neighbours, graph.weights, labels, pairs, changed, segments, first, ahead, behind
        )
        joined = _joined(uv, costs, labels)
        moved = _move_nodes(graph.start, graph.neighbours, graph.weights, joined)
        labels = _dense(joined).astype(np.int64)
        if not gained and not moved and np.array_equal(labels, before):
            break
        changed = _changed(labels, before)
    return labels.astype(np.uint32)


def _pairs(uv: np.ndarray, costs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Touching segments (P, 2), lexicographic, and the summed costs between them."""
    ends = labels[uv]
    cut = ends[:, 0] != ends[:, 1]
    return _without_parallels(int(labels.max()) + 1, ends[cut].astype(np.int64), costs[cut])


def _joined(uv: np.ndarray, costs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    labels = _dense(labels).astype(np.int64)
    pairs, sums = _pairs(uv, costs, labels)
    if not (sums > _EPSILON).any():
        return labels
    return _greedy(int(labels.max()) + 1, pairs, sums).astype(np.int64)[labels]


def _changed(labels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Which segments do not have exactly the nodes of a segment of ``before``."""
    segments = int(labels.max()) + 1
    result = np.ones(len(labels) + 1, np.bool_)
    key = labels * (int(before.max()) + 1) + before
    overlaps, counts = np.unique(key, return_counts=True)
    new, old = overlaps // (int(before.max()) + 1), overlaps % (int(before.max()) + 1)
    same = (counts == np.bincount(labels, minlength=segments)[new]) & (counts == np.bincount(before)[old])
    result[new[same]] = False
    return result


def _fusion(
    graph: _Adjacency, uv: np.ndarray, costs: np.ndarray, labels: np.ndarray, proposals: int, seed: int
) -> np.ndarray:
    """Solves the problem again on the parts that the best partition and a proposal have in common."""
    nodes = len(labels)
    generator = np.random.default_rng(seed)
    spread = float(np.std(costs)) or 1.0
    best, energy, failures = labels, multicut_energy(uv, costs, labels), 0
    for trial in range(proposals):
        noise = generator.normal(0.0, spread * (0.25, 0.5, 1.0)[trial % 3], len(costs))
        other = _greedy(nodes, uv, costs + noise)
        parts = _dense(best.astype(np.int64) * (int(other.max()) + 1) + other)
        pairs, sums = _pairs(uv, costs, parts.astype(np.int64))
        groups = int(parts.max()) + 1
        coarse = np.empty(groups, np.int64)
        coarse[parts] = best
        reduced = _adjacency(groups, pairs, sums)
        candidates = [_kernighan_lin(reduced, pairs, sums, start) for start in (coarse, _greedy(groups, pairs, sums))]
        chosen = min(candidates, key=lambda found: multicut_energy(pairs, sums, found))
        if multicut_energy(pairs, sums, chosen) < energy - _EPSILON:
            best = _kernighan_lin(graph, uv, costs, chosen[parts])
            energy, failures = multicut_energy(uv, costs, best), 0
        else:
            failures += 1
            if failures == 10:
                break
    return _dense(best)


@numba.njit(nogil=True, cache=True)
def _renumber(labels, result, numbers):
    count = 0
    for node in range(len(labels)):
        label = np.int64(labels[node])
        if numbers[label] < 0:
            numbers[label] = count
            count += 1
        result[node] = numbers[label]


@numba.njit(nogil=True, cache=True)
def _flatten(parents):
    for node in range(len(parents)):
        root = node
        while parents[root] != root:
            root = parents[root]
        while parents[node] != root:
            parents[node], node = root, parents[node]


@numba.njit(nogil=True, cache=True)
def _slot(keys, key):
    """Where a pair is in the table, or the empty place where it belongs."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    slot = np.int64((mixed ^ (mixed >> np.uint64(29))) & np.uint64(len(keys) - 1))
    while keys[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & (len(keys) - 1)
    return slot


@numba.njit(nogil=True, cache=True)
def _link(ends, first, last, degree, following, keys, values):
    for edge in range(len(ends)):
        for side in range(2):
            node, half = ends[edge, side], 2 * edge + side
            if first[node] < 0:
                first[node] = half
            else:
                following[last[node]] = half
            last[node] = half
            degree[node] += 1
        slot = _slot(keys, (ends[edge, 0] << 32) | ends[edge, 1])
        keys[slot] = (ends[edge, 0] << 32) | ends[edge, 1]
        values[slot] = edge


@numba.njit(nogil=True, cache=True)
def _rehash_edges(ends, keys, values):
    """Fills a table with the edges still alive; returns their number."""
    used = 0
    for edge in range(len(ends)):
        one, other = ends[edge, 0], ends[edge, 1]
        if one >= 0:
            key = (min(one, other) << 32) | max(one, other)
            slot = _slot(keys, key)
            keys[slot], values[slot] = key, edge
            used += 1
    return used


@numba.njit(nogil=True, cache=True)
def _before(weight, edge, other_weight, other_edge):
    return weight > other_weight or (weight == other_weight and edge < other_edge)


@numba.njit(nogil=True, cache=True)
def _push(heap_weights, heap_edges, size, weight, edge):
    hole = size
    while hole > 0:
        parent = (hole - 1) >> 1
        if not _before(weight, edge, heap_weights[parent], heap_edges[parent]):
            break
        heap_weights[hole], heap_edges[hole] = heap_weights[parent], heap_edges[parent]
        hole = parent
    heap_weights[hole], heap_edges[hole] = weight, edge


@numba.njit(nogil=True, cache=True)
def _pop(heap_weights, heap_edges, size):
    """Takes off the first of ``size`` entries and returns it."""
    weight, edge = heap_weights[0], heap_edges[0]
    moved, moved_edge = heap_weights[size - 1], heap_edges[size - 1]
    hole, size = 0, size - 1
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size and _before(
            heap_weights[child + 1], heap_edges[child + 1], heap_weights[child], heap_edges[child]
        ):
            child += 1
        if _before(moved, moved_edge, heap_weights[child], heap_edges[child]):
            break
        heap_weights[hole], heap_edges[hole] = heap_weights[child], heap_edges[child]
        hole = child
    heap_weights[hole], heap_edges[hole] = moved, moved_edge
    return weight, edge


@numba.njit(nogil=True, cache=True)
def _fill_heap(weights, heap_weights, heap_edges, state):
    for edge in range(len(weights)):
        if weights[edge] > 0:
            _push(heap_weights, heap_edges, state[0], weights[edge], edge)
            state[0] += 1


@numba.njit(nogil=True, cache=True)
def _contract(ends, weights, parents, first, last, degree, following, keys, values, heap_weights, heap_edges, state):
    """Contracts the most attractive edge while one is left; False if heap or table must grow first.

    ``state``: entries in the heap, pairs in the table. An entry is stale unless its weight is the edge's. The node of
    lower degree is taken into the other, so that its edges move at most log2(edges) times.
    """
    while state[0] > 0:
        weight, edge = heap_weights[0], heap_edges[0]
        one, other = ends[edge, 0], ends[edge, 1]
        if one < 0 or weights[edge] != weight:
            _pop(heap_weights, heap_edges, state[0])
            state[0] -= 1
            continue
        kept, gone = (one, other) if degree[one] >= degree[other] else (other, one)
        if state[0] + degree[gone] > len(heap_edges) or 2 * (state[1] + degree[gone]) > len(keys):
            state[1] += degree[gone] if 2 * (state[1] + degree[gone]) > len(keys) else 0
            return False
        _pop(heap_weights, heap_edges, state[0])
        state[0] -= 1
        parents[gone] = kept
        ends[edge, 0] = ends[edge, 1] = -1
        half = first[gone]
        while half >= 0:
            after = following[half]
            moving = half >> 1
            if ends[moving, 0] >= 0:
                target = ends[moving, 1 - (half & 1)]
                key = (min(kept, target) << 32) | max(kept, target)
                slot = _slot(keys, key)
                parallel = values[slot] if keys[slot] >= 0 else np.int64(-1)
                if parallel >= 0 and ends[parallel, 0] >= 0:
                    weights[parallel] += weights[moving]
                    ends[moving, 0] = ends[moving, 1] = -1
                    degree[target] -= 1
                    if weights[parallel] > 0:
                        _push(heap_weights, heap_edges, state[0], weights[parallel], parallel)
                        state[0] += 1
                else:
                    if keys[slot] < 0:
                        keys[slot] = key
                        state[1] += 1
                    values[slot] = moving
                    ends[moving, half & 1] = kept
                    following[half] = -1
                    following[last[kept]] = half
                    last[kept] = half
                    degree[kept] += 1
            half = after
        degree[kept] -= 1
    return True


@numba.njit(nogil=True, cache=True)
def _list_members(labels, first, ahead, behind):
    for node in range(len(labels) - 1, -1, -1):
        label = labels[node]
        if first[label] >= 0:
            behind[first[label]] = node
        ahead[node] = first[label]
        first[label] = node


@numba.njit(nogil=True, cache=True)
def _improve(start, neighbours, weights, labels, pairs, changed, segments, first, ahead, behind):
    """Chains between all touching segments, then splits; only where something changed since the last round."""
    nodes = len(labels)
    inside = np.zeros(nodes, np.bool_)
    moved = np.zeros(nodes, np.bool_)
    crossing = np.zeros(nodes, np.int64)
    gains = np.zeros(nodes, np.float64)
    heap_weights = np.empty(16 + 2 * len(neighbours) + nodes, np.float64)
    heap_edges = np.empty(len(heap_weights), np.int64)
    members, chain = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    improved = False
    for row in range(len(pairs)):
        one, other = pairs[row, 0], pairs[row, 1]
        if not changed[one] and not changed[other]:
            continue
        if _chain(
            start, neighbours, weights, labels, one, other, first, ahead, behind,
            inside, moved, crossing, gains, heap_weights, heap_edges, members, chain,
        ):  # fmt: skip
            improved = changed[one] = changed[other] = True
    free = 0
    for segment in range(segments):
        if not changed[segment]:
            continue
        while True:
            while first[free] >= 0:
                free += 1
            if not _chain(
                start, neighbours, weights, labels, segment, free, first, ahead, behind,
                inside, moved, crossing, gains, heap_weights, heap_edges, members, chain,
            ):  # fmt: skip
                break
            improved = True
    return improved


@numba.njit(nogil=True, cache=True)
def _chain(
    start, neighbours, weights, labels, one, other, first, ahead, behind,
    inside, moved, crossing, gains, heap_weights, heap_edges, members, chain,
):  # fmt: skip
    """One Kernighan-Lin chain between two segments: each node changes sides once, and the best prefix is kept.

    Only nodes with a neighbour on the other side may move, unless the other side is empty (a split). True if the
    energy fell; labels and member lists follow.
    """
    count = 0
    for segment in (one, other):
        node = first[segment]
        while node >= 0:
            members[count] = node
            inside[node] = True
            count += 1
            node = ahead[node]
    split = first[other] < 0 or first[one] < 0
    if count < 2 or (count == 2 and not split):
        for place in range(count):
            inside[members[place]] = False
        return False
    size = 0
    for place in range(count):
        node = members[place]
        gain, across = 0.0, 0
        for index in range(start[node], start[node + 1]):
            neighbour = neighbours[index]
            if inside[neighbour]:
                if labels[neighbour] == labels[node]:
                    gain -= weights[index]
                else:
                    gain += weights[index]
                    across += 1
        gains[node], crossing[node] = gain, across
        if split or across > 0:
            _push(heap_weights, heap_edges, size, gain, node)
            size += 1
    length, best_length = 0, 0
    total, best = 0.0, 0.0
    while size > 0:
        gain, node = _pop(heap_weights, heap_edges, size)
        size -= 1
        if moved[node] or gain != gains[node] or not (split or crossing[node] > 0):
            continue
        moved[node] = True
        total += gain
        chain[length] = node
        length += 1
        if total > best + _EPSILON:
            best, best_length = total, length
        for index in range(start[node], start[node + 1]):
            neighbour = neighbours[index]
            if not inside[neighbour] or moved[neighbour]:
                continue
            if labels[neighbour] == labels[node]:
                gains[neighbour] += 2 * weights[index]
                crossing[neighbour] += 1
            else:
                gains[neighbour] -= 2 * weights[index]
                crossing[neighbour] -= 1
            if split or crossing[neighbour] > 0:
                _push(heap_weights, heap_edges, size, gains[neighbour], neighbour)
                size += 1
    for place in range(count):
        inside[members[place]] = moved[members[place]] = False
    for place in range(best_length):
        node = chain[place]
        old = labels[node]
        new = other if old == one else one
        if behind[node] >= 0:
            ahead[behind[node]] = ahead[node]
        else:
            first[old] = ahead[node]
        if ahead[node] >= 0:
            behind[ahead[node]] = behind[node]
        labels[node] = new
        ahead[node], behind[node] = first[new], -1
        if first[new] >= 0:
            behind[first[new]] = node
        first[new] = node
    return best_length > 0


@numba.njit(nogil=True, cache=True)
def _move_nodes(start, neighbours, weights, labels):
    """Moves single nodes to the neighbouring segment, or to one of their own, that lowers the energy most."""
    nodes = len(labels)
    sizes = np.zeros(2 * nodes + 1, np.int64)
    for node in range(nodes):
        sizes[labels[node]] += 1
    sums = np.zeros(2 * nodes + 1, np.float64)
    fresh = np.int64(0)
    improved = False
    for node in range(nodes):
        for index in range(start[node], start[node + 1]):
            sums[labels[neighbours[index]]] += weights[index]
        here = labels[node]
        while sizes[fresh] > 0:
            fresh += 1
        best, target = (-sums[here], fresh) if sizes[here] > 1 else (0.0, here)
        if best <= _EPSILON:
            best, target = 0.0, here
        for index in range(start[node], start[node + 1]):
            label = labels[neighbours[index]]
            if label != here and sums[label] - sums[here] > best + _EPSILON:
                best, target = sums[label] - sums[here], label
        for index in range(start[node], start[node + 1]):
            sums[labels[neighbours[index]]] = 0.0
        if target != here:
            sizes[here] -= 1
            sizes[target] += 1
            labels[node] = target
            fresh = min(fresh, here)
            improved = True
    return improved
