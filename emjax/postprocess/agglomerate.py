"""Hierarchical agglomeration of a region graph, and the merge tree that it leaves, to be cut at any threshold.

The score of an edge is 1 - statistic of its affinities; the cheapest edge is merged first, and parallel edges that
this makes become one (the algorithm of waterz; Funke et al., "Large scale image segmentation with structured loss
based deep learning for connectome reconstruction", 2018).
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from numba import njit

from emjax.postprocess.region_graph import BINS, LARGEST_COUNT, Graph, _bin

MEAN, QUANTILE, MAX = 0, 1, 2

NONE = np.uint32(0xFFFFFFFF)
DEAD = np.uint8(1)
STALE = np.uint8(2)
MERGED = np.uint8(4)

# A canonical score in [0, 2) is ordered by its first 31 binary places.
KEY_SCALE = 2.0**31
# A node with more neighbours than this has its edges in a hash table: in the canonical order, which looks at all of a node's
# edges anyway, and in waterz's.
HUB = 256
HUB_OF_WATERZ = 64
# Half-edges are numbered by uint32.
LARGEST_EDGES = 2**31 - 1
LARGEST_QUEUE = 2**16


@dataclasses.dataclass(frozen=True)
class Score:
    """A scoring function: 1 - mean, 1 - quantile of a 256-bin histogram, or 1 - maximum.

    ``initial_maximum``: before its first merge, an edge's histogram holds only its largest affinity (waterz's
    InitWithMax).
    """

    kind: int
    quantile: int = 0
    initial_maximum: bool = False

    def statistics(self, ties: str = "canonical") -> tuple[str, ...]:
        """What ``region_graph`` has to gather for this score."""
        if self.kind == MEAN:
            return ("running_mean",) if ties == "waterz" else ("mean",)
        return ("histogram",) if self.kind == QUANTILE and not self.initial_maximum else ("max",)


def parse_score(score: str | Score) -> Score:
    """A score by the name that the community gives it.

    ``mean``; ``max``; ``hist_quant_50`` and ``hist_quant_50_initmax`` (LSD), any quantile from 1 to 99;
    ``aff85_his256`` (PyTorch Connectomics), which is ``hist_quant_85_initmax``.

    Raises:
      ValueError: any other name.
    """
    if isinstance(score, Score):
        return score
    if score == "mean":
        return Score(MEAN)
    if score == "max":
        return Score(MAX)
    if match := re.fullmatch(r"hist_quant_(\d{1,2})(_initmax)?", str(score)):
        quantile, initial = int(match[1]), match[2] is not None
    elif match := re.fullmatch(r"aff(\d{1,2})_his256", str(score)):
        quantile, initial = int(match[1]), True
    else:
        quantile, initial = 0, False
    if not 1 <= quantile <= 99:
        raise ValueError(
            f"score is {score!r}; expected mean, max, hist_quant_Q, hist_quant_Q_initmax or affQ_his256, Q 1..99"
        )
    return Score(QUANTILE, quantile, initial)


@dataclasses.dataclass(frozen=True)
class MergeTree:
    """Merges in the order in which they were made.

    Attributes:
      nodes: the largest fragment id.
      a, b: (M,) uint32, the segments that merge k joins, a < b; the result is called a.
      score: (M,) float64, the score of the edge (float32 values with ``ties="waterz"``).
      level: (M,) float64, non-decreasing: merge k is made for every threshold above ``level[k]``.
      threshold: merges are known for thresholds up to this one.
      uv, uv_score: (R, 2) uint32 and (R,) float64, the edges left at ``threshold`` with their scores; None unless
        asked for.
    """

    nodes: int
    a: np.ndarray
    b: np.ndarray
    score: np.ndarray
    level: np.ndarray
    threshold: float
    uv: np.ndarray | None = None
    uv_score: np.ndarray | None = None

    def merges(self, threshold: float | None = None) -> int:
        """How many merges have a score below ``threshold``, in the sense of stopping at the first that has not."""
        if threshold is None:
            return self.a.size
        if not threshold <= self.threshold:
            raise ValueError(f"threshold is {threshold}; the tree is known up to {self.threshold}: agglomerate further")
        return int(np.searchsorted(self.level, threshold))

    def cut(self, threshold: float | None = None) -> np.ndarray:
        """The segment of each fragment: (nodes + 1,) uint32, the smallest fragment id in the segment; 0 stays 0.

        Raises:
          ValueError: a threshold above the one that the tree was made for.
        """
        merges = self.merges(threshold)
        segments = np.arange(self.nodes + 1, dtype=np.uint32)
        segments[self.b[:merges]] = self.a[:merges]
        _follow(segments)
        return segments


@njit(nogil=True, cache=True)
def _follow(segments):
    for i in range(segments.size):
        segments[i] = segments[segments[i]]


@njit(nogil=True, cache=True, inline="always")
def _root(parent, i):
    """The node that i has been merged into."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(nogil=True, cache=True)
def _adjacency(uv, nodes):
    """Neighbour and edge of each half-edge, grouped by node: ``(begin, neighbour, edge)``."""
    edges = uv.shape[0]
    begin = np.zeros(nodes + 2, np.uint32)
    for e in range(edges):
        begin[uv[e, 0] + np.uint32(1)] += np.uint32(1)
        begin[uv[e, 1] + np.uint32(1)] += np.uint32(1)
    for i in range(nodes + 1):
        begin[i + 1] += begin[i]
    place = begin.copy()
    around = np.empty((2 * edges, 2), np.uint32)
    for e in range(edges):
        u = uv[e, 0]
        v = uv[e, 1]
        around[place[u], 0] = v
        around[place[u], 1] = e
        place[u] += np.uint32(1)
        around[place[v], 0] = u
        around[place[v], 1] = e
        place[v] += np.uint32(1)
    return begin, around


@njit(nogil=True, cache=True, inline="always")
def _slot(size, a, b):
    low = min(a, b)
    high = max(a, b)
    mixed = (np.uint64(low) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(high) * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((mixed >> np.uint64(20)) & np.uint64(size - 1))


@njit(nogil=True, cache=True)
def _find(table, size, uv, parent, flags, a, b, but):
    """The living edge between nodes a and b, one of which is a hub, other than ``but``; or NONE."""
    i = _slot(size, a, b)
    while True:
        e = table[i]
        if e == NONE:
            return NONE
        if e != but and flags[e] & DEAD == 0:
            p = _root(parent, uv[e, 0])
            q = _root(parent, uv[e, 1])
            if (p == a and q == b) or (p == b and q == a):
                return e
        i = (i + 1) & (size - 1)


@njit(nogil=True, cache=True)
def _insert(table, used, uv, parent, hub, flags, a, b, e):
    """Enters edge e as that between a and b; entries of dead edges are overwritten, those of moved ones stay behind.

    ``used``: the number of entries, and the size of the part of the table that is in use, which grows as needed.
    """
    size = used[1]
    i = _slot(size, a, b)
    while table[i] != NONE and flags[table[i]] & DEAD == 0:
        i = (i + 1) & (size - 1)
    if table[i] == NONE:
        used[0] += 1
    table[i] = e
    if 4 * used[0] > 3 * size:
        used[0] = 0
        for f in range(flags.size):
            used[0] += flags[f] & DEAD == 0 and (hub[_root(parent, uv[f, 0])] or hub[_root(parent, uv[f, 1])])
        while size < 4 * used[0] and size < table.size:
            size *= 2
        used[1] = size
        table[:size] = NONE
        for f in range(flags.size):
            if flags[f] & DEAD == 0:
                p = _root(parent, uv[f, 0])
                q = _root(parent, uv[f, 1])
                if hub[p] or hub[q]:
                    i = _slot(size, p, q)
                    while table[i] != NONE:
                        i = (i + 1) & (size - 1)
                    table[i] = f


@njit(nogil=True, cache=True)
def _compact(e, start, bins, counts, ring, tally):
    """Sums the histograms in the ring of edge e and writes the sum, sorted, back over them.

    ``tally`` is zero before and after. There is always room: a sum needs no more entries of at most LARGEST_COUNT than its
    parts. Entries left over in the last segment in use get the count 0, and the segments after it leave the ring.
    """
    entries = 0
    segment = np.uint32(e)
    while True:
        entries += start[segment + 1] - start[segment]
        for r in range(start[segment], start[segment + 1]):
            tally[bins[r]] += np.int64(counts[r])
        segment = ring[segment]
        if segment == e:
            break
    # The bins in use, ascending: from the entries themselves if they are few.
    used = tally[BINS:]
    n = 0
    if entries <= 32:
        while True:
            for r in range(start[segment], start[segment + 1]):
                if counts[r] == 0:
                    continue
                b = np.int64(bins[r])
                k = n
                while k > 0 and used[k - 1] > b:
                    used[k] = used[k - 1]
                    k -= 1
                if k > 0 and used[k - 1] == b:
                    for q in range(k, n):
                        used[q] = used[q + 1]
                else:
                    used[k] = b
                    n += 1
            segment = ring[segment]
            if segment == e:
                break
    else:
        for b in range(BINS):
            used[n] = b
            n += np.int64(tally[b] > 0)
    k = 0
    while True:
        for r in range(start[segment], start[segment + 1]):
            if k == n:
                counts[r] = 0
                continue
            b = used[k]
            taken = min(tally[b], LARGEST_COUNT)
            bins[r] = b
            counts[r] = taken
            tally[b] -= taken
            k += np.int64(tally[b] == 0)
        if k == n:
            ring[segment] = e
            break
        segment = ring[segment]


@njit(nogil=True, cache=True)
def _quantile_bin(e, quantile, count, start, bins, counts, ring, tally):
    """The bin that holds element quantile * n // 100 + 1 of edge e's n affinities (waterz's pivot, without
    overflow).
    """
    pivot = np.int64(quantile) * np.int64(count[e]) // 100 + 1
    total = np.int64(0)
    if ring[e] != e:
        _compact(e, start, bins, counts, ring, tally)
    segment = np.uint32(e)
    while True:
        for r in range(start[segment], start[segment + 1]):
            total += np.int64(counts[r])
            if total >= pivot:
                return np.int64(bins[r])
        segment = ring[segment]
        if segment == e:
            return np.int64(BINS)


@njit(nogil=True, cache=True, inline="always")
def _exact_score(kind, e, count, total, scale, value):
    """1 - mean from exact sums, or 1 - maximum, in float64."""
    if kind == MEAN:
        return 1.0 - np.float64(total[e]) / (np.float64(count[e]) * scale)
    return 1.0 - np.float64(value[e])


@njit(nogil=True, cache=True, inline="always")
def _single_score(kind, quantile, e, count, value, start, bins, counts, ring, tally):
    """1 - statistic as waterz rounds it: float32, the subtraction in double."""
    if kind == QUANTILE:
        bin_ = _quantile_bin(e, quantile, count, start, bins, counts, ring, tally)
        return np.float32(1.0 - np.float64(np.float32((bin_ + 0.5) / BINS)))
    return np.float32(1.0 - np.float64(value[e]))


@njit(nogil=True, cache=True, inline="always")
def _add_statistics(kind, ours, lost, kept, count, total, value, ring):
    """Adds the statistics of edge ``lost`` to ``kept``; returns whether the score of ``kept`` may have changed."""
    if kind == MAX:
        count[kept] += count[lost]
        if value[kept] >= value[lost]:
            return False
        value[kept] = value[lost]
        return True
    if kind == QUANTILE:
        # Two rings become one.
        after = ring[kept]
        ring[kept] = ring[lost]
        ring[lost] = after
    elif ours:
        total[kept] += total[lost]
    else:
        n = np.float32(count[lost])
        m = np.float32(count[kept])
        left = np.float32(value[lost] * n)
        right = np.float32(value[kept] * m)
        value[kept] = np.float32(left + right) / np.float32(np.int64(count[lost]) + np.int64(count[kept]))
    count[kept] += count[lost]
    return True


@njit(nogil=True, cache=True)
def _tidy(node, turn, begin, around, fill, chain, tail, parent, flags, mark):
    """Drops dead edges and emptied segments from the adjacency of a node, and marks its neighbours with their edges."""
    before = NONE
    segment = np.uint32(node)
    stamp = np.uint64(turn) << np.uint64(32)
    while segment != NONE:
        first = np.int64(begin[segment])
        w = first
        for r in range(first, first + np.int64(fill[segment])):
            e = around[r, 1]
            if flags[e] & DEAD == 0:
                other = _root(parent, around[r, 0])
                around[w, 0] = other
                around[w, 1] = e
                mark[other] = stamp | np.uint64(e)
                w += 1
        fill[segment] = w - first
        if w == first and before != NONE:
            chain[before] = chain[segment]
        else:
            before = segment
        segment = chain[segment]
    tail[node] = before


@njit(nogil=True, cache=True)
def _merge(
    e, turn, uv, begin, around, fill, chain, tail, degree, parent, name, hub, mark, table, used,
    flags, key, kind, ours, count, total, value, ring, touched,
):  # fmt: skip
    """Contracts edge e into the end with more neighbours; the merged node goes by the smaller of the two names.

    Shared neighbours are found by marking those of the larger end or, if it is a hub, by looking them up. With
    ``ours``, a stale edge keeps the smaller of two keys, a lower bound; lists in ``touched`` those whose key this
    lowers, and returns how many.
    """
    changed = 0
    big = _root(parent, uv[e, 0])
    small = _root(parent, uv[e, 1])
    if degree[big] < degree[small]:
        big, small = small, big
    big_first = name[big] < name[small]
    flags[e] |= DEAD | MERGED
    degree[big] -= np.uint32(1)
    if not hub[big]:
        _tidy(big, turn, begin, around, fill, chain, tail, parent, flags, mark)
        hub[big] = degree[big] > (HUB if ours else HUB_OF_WATERZ)
        if hub[big]:
            if used[0] < 0:
                table[: used[1]] = NONE
                used[0] = 0
            segment = np.uint32(big)
            while segment != NONE:
                for r in range(begin[segment], begin[segment] + fill[segment]):
                    if not hub[around[r, 0]]:
                        _insert(table, used, uv, parent, hub, flags, big, around[r, 0], around[r, 1])
                segment = chain[segment]
    looks_up = hub[big]
    parent[small] = big
    segment = np.uint32(small)
    while segment != NONE:
        first = np.int64(begin[segment])
        for r in range(first, first + np.int64(fill[segment])):
            f = around[r, 1]
            if flags[f] & DEAD:
                continue
            other = _root(parent, around[r, 0])
            if looks_up:
                g = _find(table, used[1], uv, parent, flags, big, other, f)
            elif mark[other] >> np.uint64(32) == np.uint64(turn):
                g = np.uint32(mark[other] & np.uint64(0xFFFFFFFF))
            else:
                g = NONE
            if g == NONE:
                degree[big] += np.uint32(1)
                if looks_up or hub[other]:
                    _insert(table, used, uv, parent, hub, flags, big, other, f)
                continue
            if ours:
                # Of two keys (score, edge number), sum and larger number make one that is never below both, and does
                # not depend on the order in which edges are joined: so neither does the tree.
                keep_f = f > g
            elif big_first:
                keep_f = not key[f] > key[g]
            else:
                keep_f = key[g] > key[f]
            kept = f if keep_f else g
            lost = g if keep_f else f
            if _add_statistics(kind, ours, lost, kept, count, total, value, ring):
                flags[kept] |= STALE
            if ours:
                if key[lost] < key[kept]:
                    key[kept] = key[lost]
                    touched[changed] = kept
                    changed += 1
            flags[lost] |= DEAD
            degree[other] -= np.uint32(1)
            if keep_f and (looks_up or hub[other]):
                _insert(table, used, uv, parent, hub, flags, big, other, f)
        segment = chain[segment]
    chain[tail[big]] = small
    tail[big] = tail[small]
    name[big] = min(name[big], name[small])
    return changed


@njit(nogil=True, cache=True)
def _heap_push(heap, size, entry):
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] <= entry:
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = entry


@njit(nogil=True, cache=True)
def _heap_pop(heap, size):
    """Removes the smallest of ``size`` entries."""
    last = size - 1
    entry = heap[last]
    i = 0
    child = 1
    while child < last:
        if child + 1 < last and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= entry:
            break
        heap[i] = heap[child]
        i = child
        child = 2 * i + 1
    heap[i] = entry


@njit(nogil=True, cache=True, inline="always")
def _score_key(score):
    """The order of canonical scores, in 32 bits."""
    scaled = score * KEY_SCALE
    if not scaled > 0:
        return np.uint32(0)
    if scaled >= 4294967295.0:
        return np.uint32(4294967295)
    return np.uint32(scaled)


@njit(nogil=True, cache=True)
def _cheapest(
    node, begin, around, fill, next_segment, tail, parent, flags, key, kind, count, total, scale, value
):  # fmt: skip
    """The edge of a node with the smallest (key, number), stale ones scored if it matters; dead ones are dropped."""
    best = NONE
    best_key = NONE
    before = NONE
    segment = np.uint32(node)
    while segment != NONE:
        first = np.int64(begin[segment])
        w = first
        for r in range(first, first + np.int64(fill[segment])):
            e = around[r, 1]
            f = flags[e]
            if f & DEAD:
                continue
            around[w, 0] = around[r, 0]
            around[w, 1] = e
            w += 1
            k = key[e]
            if k > best_key or (k == best_key and e > best):
                continue
            if f & STALE:
                k = _score_key(_exact_score(kind, e, count, total, scale, value))
                key[e] = k
                flags[e] = f & ~STALE
                if k > best_key or (k == best_key and e > best):
                    continue
            best = e
            best_key = k
        fill[segment] = w - first
        if w == first and before != NONE:
            next_segment[before] = next_segment[segment]
        else:
            before = segment
        segment = next_segment[segment]
    tail[node] = before
    return best


@njit(nogil=True, cache=True)
def _agglomerate_canonical(
    uv, nodes, limit, kind, key, count, total, scale, value,
    merged_a, merged_b, merged_score, merged_key, flags, score, name, parent,
):  # fmt: skip
    """Merges all edges whose key is below ``limit``; returns how many merges.

    Two nodes may merge as soon as their edge is the cheapest of both: as joining edges never makes one cheaper than
    both, this gives the tree of merging the cheapest edge of all, but stays within a neighbourhood, and so within
    the processor's cache. Chains of cheapest edges are followed node by node first; what involves hubs, which are
    dear to scan, is left to a heap.
    """
    edges = uv.shape[0]
    begin, around = _adjacency(uv, nodes)
    fill = np.empty(nodes + 1, np.uint32)
    for i in range(nodes + 1):
        fill[i] = begin[i + 1] - begin[i]
    degree = fill.copy()
    next_segment = np.full(nodes + 1, NONE, np.uint32)
    tail = name.copy()
    hub = np.zeros(nodes + 1, np.bool_)
    mark = np.zeros(nodes + 1, np.uint64)
    size = 16
    while size < 2 * edges:
        size *= 2
    # Filled when there is a first hub; memory is touched only as far as hubs need it.
    table = np.empty(size, np.uint32)
    used = np.array([-1, max(16, size // 8)])
    no_ring = np.empty((0, 1), np.uint32)[:, 0]
    touched = np.empty(nodes + 1, np.uint32)
    best = np.full(nodes + 1, NONE, np.uint32)
    best_key = np.full(nodes + 1, NONE, np.uint32)
    for e in range(edges):
        k = _score_key(_exact_score(kind, e, count, total, scale, value))
        key[e] = k
        for side in range(2):
            node = uv[e, side]
            if k < best_key[node]:
                best_key[node] = k
                best[node] = e
    merges = 0
    stack = np.empty(nodes + 1, np.uint32)
    heap = np.empty(0, np.uint64)
    queued = 0
    phase = 0
    depth = 0
    node = np.uint32(0)
    while True:
        if phase == 0:
            if depth == 0:
                node += np.uint32(1)
                if node <= nodes:
                    if parent[node] == node and degree[node] > 0:
                        stack[0] = node
                        depth = 1
                    continue
                # Every chain has ended: at the limit, or at a hub.
                phase = 1
                for e in range(edges):
                    queued += (flags[e] & DEAD == 0) and (np.uint64(key[e]) < limit)
                # An edge may be pushed twice more for each one that it takes in: with the lower bound, and scored.
                heap = np.empty(3 * queued, np.uint64)
                queued = 0
                for e in range(edges):
                    if flags[e] & DEAD == 0 and np.uint64(key[e]) < limit:
                        _heap_push(heap, queued, (np.uint64(key[e]) << np.uint64(32)) | np.uint64(e))
                        queued += 1
                continue
            at = stack[depth - 1]
            if degree[at] > HUB:
                depth = 0
                continue
            for _ in range(2):
                e = best[at]
                if e == NONE or flags[e] & (DEAD | STALE) or key[e] != best_key[at]:
                    e = _cheapest(
                        at, begin, around, fill, next_segment, tail, parent, flags, key,
                        kind, count, total, scale, value,
                    )  # fmt: skip
                    best[at] = e
                    if e != NONE:
                        best_key[at] = key[e]
                if at == stack[depth - 1]:
                    found = e
                    if found == NONE or np.uint64(key[found]) >= limit:
                        break
                    at = _root(parent, uv[found, 0])
                    if at == stack[depth - 1]:
                        at = _root(parent, uv[found, 1])
                    if degree[at] > HUB:
                        break
            if found == NONE or np.uint64(key[found]) >= limit or degree[at] > HUB:
                depth = 0
                continue
            if e != found:
                stack[depth] = at
                depth += 1
                continue
            depth -= 1
            if depth > 0 and stack[depth - 1] == at:
                depth -= 1
            e = found
        else:
            if queued == 0:
                break
            entry = heap[0]
            _heap_pop(heap, queued)
            queued -= 1
            e = np.uint32(entry & np.uint64(0xFFFFFFFF))
            if flags[e] & DEAD or np.uint64(key[e]) != entry >> np.uint64(32):
                continue
            if flags[e] & STALE:
                flags[e] &= ~STALE
                key[e] = _score_key(_exact_score(kind, e, count, total, scale, value))
                if np.uint64(key[e]) < limit:
                    _heap_push(heap, queued, (np.uint64(key[e]) << np.uint64(32)) | np.uint64(e))
                    queued += 1
                continue
        p = _root(parent, uv[e, 0])
        q = _root(parent, uv[e, 1])
        merged_a[merges] = min(name[p], name[q])
        merged_b[merges] = max(name[p], name[q])
        merged_score[merges] = _exact_score(kind, e, count, total, scale, value)
        merged_key[merges] = key[e]
        merges += 1
        changed = _merge(
            e, merges, uv, begin, around, fill, next_segment, tail, degree, parent, name, hub, mark, table, used,
            flags, key, kind, True, count, total, value, no_ring, touched,
        )  # fmt: skip
        if phase == 0:
            joined = p if parent[p] == p else q
            best[joined] = NONE
            if degree[joined] > 0:
                stack[depth] = joined
                depth += 1
            continue
        for k in range(changed):
            f = touched[k]
            if np.uint64(key[f]) < limit:
                _heap_push(heap, queued, (np.uint64(key[f]) << np.uint64(32)) | np.uint64(f))
                queued += 1
    for e in range(edges):
        if score.size and flags[e] & DEAD == 0:
            score[e] = _exact_score(kind, e, count, total, scale, value)
    return merges


@njit(nogil=True, cache=True)
def _float_key(score):
    """The order of float32 scores, in 32 bits (0.0 and -0.0 are one)."""
    bits = np.array([score + np.float32(0)], np.float32).view(np.uint32)[0]
    return ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)


@njit(nogil=True, cache=True)
def _waterz_push(heap, size, entry):
    """As libstdc++'s push_heap: up while the parent's score is strictly larger; only the upper 32 bits are compared."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] >> np.uint64(32) <= entry >> np.uint64(32):
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = entry


@njit(nogil=True, cache=True)
def _waterz_pop(heap, size):
    """As libstdc++'s pop_heap: the hole sinks along the smaller child (the right one if equal), then the last entry
    rises.
    """
    last = size - 1
    entry = heap[last]
    i = 0
    child = 2
    while child < last:
        if heap[child] >> np.uint64(32) > heap[child - 1] >> np.uint64(32):
            child -= 1
        heap[i] = heap[child]
        i = child
        child = 2 * (i + 1)
    if child == last:
        heap[i] = heap[child - 1]
        i = child - 1
    _waterz_push(heap, i, entry)


@njit(nogil=True, cache=True)
def _queue_bin(score, levels):
    if not score > 0:
        return 0
    if score >= 1:
        return levels - 1
    return min(np.int64(np.float32(score * np.float32(levels))), levels - 1)


@njit(nogil=True, cache=True)
def _agglomerate_waterz(
    uv, nodes, threshold, kind, quantile, count, value,
    start, bins, counts, ring, levels,
    merged_a, merged_b, merged_score, merged_level, flags, score, name, parent, remaining,
):  # fmt: skip
    """Merges in waterz's order; ``levels``: bins of its queue, 0 for its heap. Returns how many merges.

    ``remaining``: whether the scores of edges that are left are brought up to date.
    """
    edges = uv.shape[0]
    begin, around = _adjacency(uv, nodes)
    fill = np.empty(nodes + 1, np.uint32)
    for i in range(nodes + 1):
        fill[i] = begin[i + 1] - begin[i]
    degree = fill.copy()
    next_segment = np.full(nodes + 1, NONE, np.uint32)
    tail = name.copy()
    hub = np.zeros(nodes + 1, np.bool_)
    mark = np.zeros(nodes + 1, np.uint64)
    size = 16
    while size < 2 * edges:
        size *= 2
    # Filled when there is a first hub; memory is touched only as far as hubs need it.
    table = np.empty(size, np.uint32)
    used = np.array([-1, max(16, size // 8)])
    tally = np.zeros(2 * BINS + 1, np.int64)
    total = np.empty(0, np.int64)
    heap = np.empty(0 if levels else edges, np.uint64)
    link = np.empty(edges if levels else 0, np.uint32)
    front = np.full(levels, NONE, np.uint32)
    back = np.full(levels, NONE, np.uint32)
    # Bins above that of the threshold are never reached.
    last = _queue_bin(threshold, levels)
    lowest = levels
    queued = 0
    merges = 0
    level = np.float32(-np.inf)
    pushed = np.uint32(0)
    fresh = 0
    while True:
        # Every edge is scored and pushed once at first, and later whenever it comes up stale.
        if fresh < edges:
            pushed = np.uint32(fresh)
            fresh += 1
        elif queued == 0:
            break
        else:
            if levels:
                e = front[lowest]
            else:
                e = np.uint32(heap[0] & np.uint64(0xFFFFFFFF))
            now = score[e]
            if now >= threshold:
                break
            level = max(level, now)
            if levels:
                front[lowest] = link[e]
                while lowest < levels and front[lowest] == NONE:
                    lowest += 1
            else:
                _waterz_pop(heap, queued)
            queued -= 1
            if flags[e] & DEAD:
                continue
            if not flags[e] & STALE:
                p = name[_root(parent, uv[e, 0])]
                q = name[_root(parent, uv[e, 1])]
                merged_a[merges] = min(p, q)
                merged_b[merges] = max(p, q)
                merged_score[merges] = now
                merged_level[merges] = level
                merges += 1
                _merge(
                    e, merges, uv, begin, around, fill, next_segment, tail, degree, parent, name, hub, mark,
                    table, used, flags, score, kind, False, count, total, value, ring, link,
                )  # fmt: skip
                continue
            flags[e] &= ~STALE
            pushed = e
        score[pushed] = _single_score(kind, quantile, pushed, count, value, start, bins, counts, ring, tally)
        if levels:
            b = _queue_bin(score[pushed], levels)
            if b > last:
                continue
            link[pushed] = NONE
            if front[b] == NONE:
                front[b] = pushed
            else:
                link[back[b]] = pushed
            back[b] = pushed
            lowest = min(lowest, b)
        else:
            _waterz_push(heap, queued, (np.uint64(_float_key(score[pushed])) << np.uint64(32)) | np.uint64(pushed))
        queued += 1
    for e in range(edges if remaining else 0):
        if flags[e] & STALE and flags[e] & DEAD == 0:
            score[e] = _single_score(kind, quantile, e, count, value, start, bins, counts, ring, tally)
    return merges


def agglomerate(
    graph: Graph,
    threshold: float | Sequence[float] = 1.0,
    *,
    score: str | Score = "mean",
    ties: str = "canonical",
    discretize_queue: int | None = None,
    remaining: bool = False,
) -> MergeTree:
    """Merges the fragments of ``graph``, cheapest edge first, while the score is below ``threshold``.

    Args:
      graph: from ``region_graph``, with the statistics that the score needs (``parse_score(score).statistics(ties)``).
      threshold: the largest threshold at which the tree will be cut, or several of which the largest counts.
      score: see ``parse_score``; 1 - statistic, so it rises from 0 (surely one object) to 1.
      ties: "canonical": exact sums, and an order among equal scores that depends on the graph only, not on blocks or
        threads: by edge number for ``mean`` and ``max``. Quantiles count whole bins, so waterz's own order depends on
        the graph only, and is kept. "waterz": waterz 0.10.1's float32 arithmetic and order, merge for merge.
      discretize_queue: the number of bins, each first in, first out, of waterz's queue; 0 for its heap. Default: 256
        for quantiles with ``ties="canonical"`` (one bin for each score there is), else 0.
      remaining: also keep the edges that are left, with their scores.

    Returns:
      The merge tree; ``tree.cut(t)`` for any t up to ``threshold``.

    Raises:
      ValueError: unknown score or ties, a threshold that is no number, statistics that the graph lacks.
    """
    scoring = parse_score(score)
    if ties not in ("canonical", "waterz"):
        raise ValueError(f"ties is {ties!r}; expected 'canonical' or 'waterz'")
    thresholds = np.atleast_1d(np.asarray(threshold, np.float64))
    if thresholds.size == 0 or np.isnan(thresholds).any():
        raise ValueError(f"threshold is {threshold!r}; expected a number, or several")
    exact = ties == "canonical" and scoring.kind != QUANTILE
    if discretize_queue is None:
        discretize_queue = BINS if ties == "canonical" and not exact else 0
    if isinstance(discretize_queue, bool) or not 0 <= discretize_queue <= LARGEST_QUEUE:
        raise ValueError(
            f"discretize_queue is {discretize_queue!r}; expected 0 or a number of bins up to {LARGEST_QUEUE}"
        )
    if discretize_queue and exact:
        raise ValueError("discretize_queue is waterz's; expected it with ties='waterz', or with a quantile score")
    most = float(thresholds.max())
    edges = graph.uv.shape[0]
    if edges > LARGEST_EDGES:
        raise ValueError(f"graph has {edges} edges; expected at most {LARGEST_EDGES}")
    # What a merge touches of an edge lies together in memory: sum (or value, or ring of histograms), count, key (or
    # score).
    state = np.empty((edges, 4 if exact else 3), np.uint32)
    ring, value, count = state[:, 0], state.view(np.float32)[:, 0], state[:, -2]
    total = state.view(np.int64)[:, 0] if exact else np.empty(0, np.int64)
    start, bins, counts = _load_statistics(graph, scoring, ties, count, total, value, ring)
    merged_a = np.empty(min(graph.nodes, edges), np.uint32)
    merged_b = np.empty_like(merged_a)
    flags = np.zeros(edges, np.uint8)
    name = np.arange(graph.nodes + 1, dtype=np.uint32)
    parent = name.copy()
    if exact:
        merged_score = np.empty(merged_a.size, np.float64)
        merged_key = np.empty(merged_a.size, np.uint32)
        limit = np.uint64(min(max(np.ceil(most * KEY_SCALE), 0.0), 2.0**32))
        scores: np.ndarray = np.empty(edges if remaining else 0, np.float64)
        merges = _agglomerate_canonical(
            graph.uv, graph.nodes, limit, scoring.kind, state[:, -1], count, total, float(graph.scale), value,
            merged_a, merged_b, merged_score, merged_key, flags, scores, name, parent,
        )  # fmt: skip
        # The merges of a segment come before those that it takes part in, also among equal keys.
        order = np.argsort(merged_key[:merges], kind="stable")
        merged_a, merged_b, merged_score = merged_a[order], merged_b[order], merged_score[order]
        merged_level = merged_key[order] / KEY_SCALE
    else:
        limit32 = np.float32(most)
        if ties == "canonical" and limit32 < most:
            limit32 = np.nextafter(limit32, np.float32(np.inf))
        merged_score = np.empty(merged_a.size, np.float32)
        merged_level = np.empty(merged_a.size, np.float32)
        scores = state.view(np.float32)[:, -1]
        merges = _agglomerate_waterz(
            graph.uv, graph.nodes, limit32, scoring.kind, scoring.quantile, count, value,
            start, bins, counts, ring, int(discretize_queue), merged_a, merged_b, merged_score, merged_level,
            flags, scores, name, parent, remaining,
        )  # fmt: skip
    left_uv = left_score = None
    if remaining:
        left = np.flatnonzero(flags & DEAD == 0)
        left = left[scores[left] >= (most if exact else limit32)]
        _follow_all(parent)
        left_uv = np.sort(name[parent[graph.uv[left]]], axis=1)
        left_score = scores[left].astype(np.float64)
    return MergeTree(
        nodes=graph.nodes,
        a=merged_a[:merges].copy(),
        b=merged_b[:merges].copy(),
        score=merged_score[:merges].astype(np.float64),
        level=merged_level[:merges].astype(np.float64),
        threshold=most,
        uv=left_uv,
        uv_score=left_score,
    )


def _load_statistics(graph, scoring, ties, count, total, value, ring):
    """Fills the working statistics; returns histograms to be overwritten, empty if the score needs none."""
    lacking = {
        "mean": graph.sum is None,
        "running_mean": graph.running_mean is None,
        "max": graph.max is None,
        "histogram": graph.histograms is None,
    }
    needed = scoring.statistics(ties)
    for statistic in needed:
        if lacking[statistic]:
            raise ValueError(f"graph lacks {statistic!r}; make it with region_graph(..., statistics={needed})")
    count[:] = graph.count
    if scoring.kind == QUANTILE:
        ring[:] = np.arange(ring.size, dtype=np.uint32)
        if scoring.initial_maximum:
            count[:] = 1
            return np.arange(count.size + 1), _bins(graph.max), np.ones(count.size, np.uint8)
        runs = graph.histograms
        if runs.counts.dtype != np.uint8:
            raise ValueError(f"graph has histograms with {runs.counts.dtype} counts; expected uint8")
        return runs.start, runs.bins.copy(), runs.counts.copy()
    if scoring.kind == MEAN and ties == "waterz":
        value[:] = graph.running_mean
    elif scoring.kind == MEAN:
        total[:] = graph.sum
    else:
        value[:] = graph.max
    return np.zeros(1, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint8)


@njit(nogil=True, cache=True)
def _follow_all(parent):
    for i in range(parent.size):
        parent[i] = _root(parent, parent[i])


@njit(nogil=True, cache=True)
def _bins(values):
    bins = np.empty(values.size, np.uint8)
    for i in range(values.size):
        bins[i] = _bin(values[i])
    return bins
