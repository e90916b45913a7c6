"""Region graph of fragments: which touch, over how many faces, and what the affinities on those faces are.

All statistics add: sums and counts are whole numbers, so a graph does not depend on the order in which voxels,
blocks or threads are taken. Only the float32 running mean, which reproduces waterz, does.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numba import njit

from emjax.postprocess.threads import check_threads, each, ranges
from emjax.postprocess.volumes import LARGEST_ID, NEAREST, as_fragments, nearest_channels

# float32 affinities are summed as multiples of 2**-30; an affinity of 1 may then occur 2**33 times on an edge.
FIXED_POINT = 2**30
LARGEST_AFFINITY = 1024.0
STATISTICS = ("mean", "max", "histogram", "running_mean", "size")
BINS = 256
LARGEST_COUNT = 255


@dataclasses.dataclass(frozen=True)
class Histograms:
    """Affinity histograms of edges, sparse: edge e holds ``bins[start[e]:start[e + 1]]``, ascending, with ``counts``.

    A value a falls into bin min(int(256 a), 255), as in waterz. ``start`` int64 (E + 1,), ``bins`` and ``counts`` uint8:
    a bin with more than 255 values has several entries, all full but the last.
    """

    start: np.ndarray
    bins: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Graph:
    """Edges between touching fragments, in lexicographic order of (u, v), u < v, without background 0.

    Attributes:
      nodes: the largest fragment id; ids run from 1 to ``nodes`` and not all need occur.
      uv: (E, 2) uint32.
      count: (E,) uint32, the number of voxel faces between u and v: their contact area.
      sum: (E,) int64, the sum of the affinities on these faces times ``scale``, or None.
      scale: 255 for uint8 affinities, 2**30 for float32.
      max: (E,) float32, the largest of them, or None.
      histograms: their histograms, or None.
      running_mean: (E,) float32, waterz's running mean in raster order, or None. Such a graph cannot be merged.
      size: (nodes + 1,) int64, voxels of each fragment (0: background), or None.
    """

    nodes: int
    uv: np.ndarray
    count: np.ndarray
    sum: np.ndarray | None = None
    scale: int = FIXED_POINT
    max: np.ndarray | None = None
    histograms: Histograms | None = None
    running_mean: np.ndarray | None = None
    size: np.ndarray | None = None

    def relabel(self, ids: np.ndarray) -> "Graph":
        """The graph with node i called ``ids[i]``: nodes of one name become one, and edges within it or to 0 vanish.

        Raises:
          ValueError: too few ids, ids above 2**32 - 2, or a graph with running means, which do not add.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size <= self.nodes or ids.dtype.kind not in "ui":
            raise ValueError(f"ids is {ids.dtype} of shape {ids.shape}; expected {self.nodes + 1} whole numbers")
        most = int(ids[: self.nodes + 1].max())
        if most > LARGEST_ID:
            raise ValueError(f"ids holds {most}; expected at most {LARGEST_ID}")
        size = None
        if self.size is not None:
            size = np.zeros(most + 1, np.int64)
            np.add.at(size, ids[: self.nodes + 1], self.size)
        return _sum_edges([dataclasses.replace(self, uv=ids[self.uv].astype(np.uint32), nodes=most, size=size)])

    def merge(self, *others: "Graph") -> "Graph":
        """One graph of several over the same ids, such as those of the blocks of a volume; edges named twice are
        summed.

        Raises:
          ValueError: graphs with different statistics or scales, or with running means, which do not add.
        """
        return _sum_edges([self, *others])

    @property
    def mean(self) -> np.ndarray:
        """(E,) float64, the mean affinity of each edge, from the exact sum."""
        if self.sum is None:
            raise ValueError("graph has no sums; make it with statistics=('mean',)")
        return self.sum / (self.count.astype(np.float64) * self.scale)


def _sum_edges(graphs: Sequence[Graph]) -> Graph:
    """Sorts edges into lexicographic order and sums what is known of equal ones."""
    first = graphs[0]
    for graph in graphs:
        if graph.running_mean is not None:
            raise ValueError("graph has running means, which do not add; make it with statistics=('mean',)")
        for name in ("sum", "max", "histograms", "size"):
            if (getattr(graph, name) is None) != (getattr(first, name) is None):
                raise ValueError(f"only some of the graphs have {name!r}; expected the same statistics in all")
        if graph.scale != first.scale:
            raise ValueError(f"graphs have scales {first.scale} and {graph.scale}; expected affinities of one dtype")
    nodes = max(graph.nodes for graph in graphs)
    ends = np.concatenate([graph.uv for graph in graphs])
    low, high = ends.min(axis=1), ends.max(axis=1)
    kept = np.flatnonzero((low != high) & (low != 0))
    key = (low[kept].astype(np.uint64) << np.uint64(32)) | high[kept]
    order = np.argsort(key, kind="stable")
    key, kept = key[order], kept[order]
    starts = np.flatnonzero(np.diff(key, prepend=~key[:1]))
    key = key[starts]

    def gathered(name):
        return np.concatenate([getattr(graph, name) for graph in graphs])[kept]

    count = np.add.reduceat(gathered("count").astype(np.int64), starts) if starts.size else np.zeros(0, np.int64)
    if count.size and int(count.max()) >= 2**32:
        raise ValueError(f"an edge has {int(count.max())} faces; expected fewer than {2**32}")
    total = largest = histograms = size = None
    if first.sum is not None:
        total = np.add.reduceat(gathered("sum"), starts) if starts.size else np.zeros(0, np.int64)
    if first.max is not None:
        largest = np.maximum.reduceat(gathered("max"), starts) if starts.size else np.zeros(0, np.float32)
    if first.histograms is not None:
        histograms = _sum_histograms([graph.histograms for graph in graphs], kept, starts)
    if first.size is not None:
        size = np.zeros(nodes + 1, np.int64)
        for part in (graph.size for graph in graphs if graph.size is not None):
            size[: part.size] += part
    return Graph(
        nodes=nodes,
        uv=np.stack([(key >> np.uint64(32)), key & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32),
        count=count.astype(np.uint32),
        sum=total,
        scale=first.scale,
        max=largest,
        histograms=histograms,
        size=size,
    )


def _sum_histograms(histograms, kept, starts):
    """Histograms of groups of edges; ``kept`` lists the edges, ``starts`` where each group begins."""
    begin, shift = [], 0
    for part in histograms:
        begin.append(np.stack([part.start[:-1], part.start[1:]]) + shift)
        shift += part.bins.size
    begin = np.concatenate(begin, axis=1)[:, kept] if begin else np.zeros((2, 0), np.int64)
    bins = np.concatenate([part.bins for part in histograms])
    counts = np.concatenate([part.counts for part in histograms])
    group = np.append(starts, kept.size)
    runs = np.zeros(starts.size, np.int64)
    _add_histograms(begin, bins, counts, group, runs, np.zeros(1, np.int64), bins[:0], counts[:0], False)
    start = np.zeros(starts.size + 1, np.int64)
    np.cumsum(runs, out=start[1:])
    out_bins, out_counts = np.empty(start[-1], np.uint8), np.empty(start[-1], np.uint8)
    _add_histograms(begin, bins, counts, group, runs, start, out_bins, out_counts, True)
    return Histograms(start, out_bins, out_counts)


@njit(nogil=True, cache=True)
def _add_histograms(begin, bins, counts, group, runs, start, out_bins, out_counts, write):
    tally = np.zeros(BINS, np.int64)
    for g in range(group.size - 1):
        tally[:] = 0
        for k in range(group[g], group[g + 1]):
            for r in range(begin[0, k], begin[1, k]):
                tally[bins[r]] += counts[r]
        n = 0
        for b in range(BINS):
            left = tally[b]
            while left > 0:
                if write:
                    out_bins[start[g] + n] = b
                    out_counts[start[g] + n] = min(left, LARGEST_COUNT)
                left -= LARGEST_COUNT
                n += 1
        runs[g] = n


@njit(nogil=True, cache=True)
def _row_edges(me, up, back, lead, u):
    """The smaller fragments of the faces at the lower sides of a row's voxels; returns how many."""
    n = 0
    previous = me[max(lead - 1, 0)]
    for x in range(lead, me.size):
        label = me[x]
        other = back[x]
        u[n] = min(label, other)
        n += np.int64((label != other) & (label != 0) & (other != 0))
        other = up[x]
        u[n] = min(label, other)
        n += np.int64((label != other) & (label != 0) & (other != 0))
        u[n] = min(label, previous)
        n += np.int64((label != previous) & (label != 0) & (previous != 0))
        previous = label
    return n


@njit(nogil=True, cache=True)
def _row_faces(me, up, back, az, ay, ax, lead, u, v, value):
    """The faces at the lower sides of a row's voxels, per voxel in the order z, y, x; returns how many."""
    n = 0
    previous = me[max(lead - 1, 0)]
    for x in range(lead, me.size):
        label = me[x]
        other = back[x]
        u[n] = min(label, other)
        v[n] = max(label, other)
        value[n] = az[x]
        n += np.int64((label != other) & (label != 0) & (other != 0))
        other = up[x]
        u[n] = min(label, other)
        v[n] = max(label, other)
        value[n] = ay[x]
        n += np.int64((label != other) & (label != 0) & (other != 0))
        u[n] = min(label, previous)
        v[n] = max(label, previous)
        value[n] = ax[x]
        n += np.int64((label != previous) & (label != 0) & (previous != 0))
        previous = label
    return n


@njit(nogil=True, cache=True)
def _count_faces(fragments, lead, z0, z1, faces):
    """Adds to ``faces[u]`` the number of faces whose smaller fragment is u."""
    _, height, width = fragments.shape
    u = np.empty(3 * width + 1, np.uint32)
    for z in range(z0, z1):
        for y in range(lead[1], height):
            me = fragments[z, y]
            n = _row_edges(me, fragments[z, max(y - 1, 0)], fragments[max(z - 1, 0), y], lead[2], u)
            for k in range(n):
                faces[u[k]] += np.uint32(1)


@njit(nogil=True, cache=True)
def _collect_faces(fragments, az, ay, ax, lead, z0, z1, place, others, values, levels, binned):
    """Writes each face's larger fragment and affinity (or its bin) into the bucket of its smaller fragment, in raster
    order; returns how many affinities are NaN or too large for sums of multiples of 1 / FIXED_POINT.
    """
    invalid = 0
    _, height, width = fragments.shape
    u = np.empty(3 * width + 1, np.uint32)
    v = np.empty(3 * width + 1, np.uint32)
    value = np.empty(3 * width + 1, az.dtype)
    for z in range(z0, z1):
        for y in range(lead[1], height):
            me = fragments[z, y]
            up = fragments[z, max(y - 1, 0)]
            back = fragments[max(z - 1, 0), y]
            n = _row_faces(me, up, back, az[z, y], ay[z, y], ax[z, y], lead[2], u, v, value)
            for k in range(n):
                p = place[u[k]]
                place[u[k]] = p + 1
                others[p] = v[k]
                invalid += np.int64(not abs(np.float32(value[k])) <= LARGEST_AFFINITY)
                values[p] = _bin(_level(value[k], levels)) if binned else value[k]
    return invalid


@njit(nogil=True, cache=True)
def _count_edges(start, others, u0, u1, nodes, degree):
    """``degree[u]``: how many different fragments the bucket of u names."""
    seen = np.zeros(nodes + 1, np.uint32)
    for u in range(u0, u1):
        n = 0
        for p in range(start[u], start[u + 1]):
            v = others[p]
            n += np.int64(seen[v] != u)
            seen[v] = u
        degree[u] = n


@njit(nogil=True, cache=True)
def _list_edges(start, others, u0, u1, first, uv, slot, count):
    """Fills the edges of buckets ``[u0, u1)``; leaves each face's edge, counted from the bucket's first, in
    ``others``.
    """
    for u in range(u0, u1):
        e0 = first[u]
        n = e0
        for p in range(start[u], start[u + 1]):
            v = others[p]
            s = slot[v]
            if s < e0 or s >= n or uv[s, 1] != v:
                slot[v] = n
                uv[n, 0] = u
                uv[n, 1] = v
                n += 1
        if n - e0 > 16:
            uv[e0:n, 1].sort()
        else:
            for e in range(e0 + 1, n):
                v = uv[e, 1]
                k = e
                while k > e0 and uv[k - 1, 1] > v:
                    uv[k, 1] = uv[k - 1, 1]
                    k -= 1
                uv[k, 1] = v
        for e in range(e0, n):
            slot[uv[e, 1]] = e
            count[e] = 0
        for p in range(start[u], start[u + 1]):
            e = slot[others[p]]
            others[p] = e - e0
            count[e] += np.uint32(1)


@njit(nogil=True, cache=True)
def _sum_bytes(start, edge, values, u0, u1, first, total):
    for u in range(u0, u1):
        for p in range(start[u], start[u + 1]):
            total[first[u] + edge[p]] += np.int64(values[p])


@njit(nogil=True, cache=True)
def _sum_floats(start, edge, values, u0, u1, first, total):
    """Sums multiples of 1 / FIXED_POINT."""
    for u in range(u0, u1):
        for p in range(start[u], start[u + 1]):
            total[first[u] + edge[p]] += np.int64(np.floor(np.float64(values[p]) * FIXED_POINT + 0.5))


@njit(nogil=True, cache=True)
def _largest(start, edge, values, u0, u1, first, levels, largest):
    for u in range(u0, u1):
        for e in range(first[u], first[u + 1]):
            largest[e] = -np.inf
        for p in range(start[u], start[u + 1]):
            e = first[u] + edge[p]
            value = _level(values[p], levels)
            if value > largest[e]:
                largest[e] = value


@njit(nogil=True, cache=True)
def _running_means(start, edge, values, u0, u1, first, levels, mean):
    seen = np.zeros(0, np.int64)
    for u in range(u0, u1):
        degree = first[u + 1] - first[u]
        if degree > seen.size:
            seen = np.zeros(2 * degree, np.int64)
        seen[:degree] = 0
        for e in range(first[u], first[u + 1]):
            mean[e] = 0
        for p in range(start[u], start[u + 1]):
            e = first[u] + edge[p]
            n = seen[edge[p]]
            seen[edge[p]] = n + 1
            scaled = np.float32(mean[e] * np.float32(n))
            mean[e] = np.float32(_level(values[p], levels) + scaled) / np.float32(n + 1)


@njit(nogil=True, cache=True, inline="always")
def _level(value, levels):
    """The affinity that a stored value stands for: ``levels`` has 256 of them for uint8, and none for float32."""
    return levels[np.int64(value)] if levels.size else np.float32(value)


@njit(nogil=True, cache=True, inline="always")
def _bin(value):
    """The histogram bin of an affinity, as waterz chooses it."""
    if not value > 0:
        return np.uint8(0)
    if value >= 1:
        return np.uint8(BINS - 1)
    return np.uint8(min(np.int64(value * np.float32(BINS)), BINS - 1))


@njit(nogil=True, cache=True)
def _sort_bins(start, edge, values, u0, u1, first, levels, count, bins, run):
    """Groups the bins of each edge of a bucket, sorted, where ``values`` has the bucket, in ``bins``, which may be
    ``values``; ``run[e + 1]``: how many entries the histogram of e needs.
    """
    end = np.zeros(0, np.int64)
    own = np.zeros(0, np.uint8)
    tally = np.zeros(BINS, np.int64)
    for u in range(u0, u1):
        degree = first[u + 1] - first[u]
        if degree > end.size:
            end = np.zeros(2 * degree, np.int64)
        if start[u + 1] - start[u] > own.size:
            own = np.zeros(2 * (start[u + 1] - start[u]), np.uint8)
        n = 0
        for k in range(degree):
            end[k] = n
            n += np.int64(count[first[u] + k])
        for p in range(start[u], start[u + 1]):
            own[end[edge[p]]] = _bin(_level(values[p], levels))
            end[edge[p]] += 1
        place = start[u]
        for e in range(first[u], first[u + 1]):
            faces = np.int64(count[e])
            begin = place - start[u]
            n = 0
            if faces > 32:
                tally[:] = 0
                for q in range(begin, begin + faces):
                    tally[own[q]] += 1
                for b in range(BINS):
                    n += (tally[b] + LARGEST_COUNT - 1) // LARGEST_COUNT
                    for _ in range(tally[b]):
                        bins[place] = b
                        place += 1
            else:
                for p in range(place, place + faces):
                    b = own[p - start[u]]
                    q = p
                    while q > place and bins[q - 1] > b:
                        bins[q] = bins[q - 1]
                        q -= 1
                    bins[q] = b
                n = 1
                for p in range(place + 1, place + faces):
                    n += np.int64(bins[p] != bins[p - 1])
                place += faces
            run[e + 1] = n


@njit(nogil=True, cache=True)
def _encode_runs(start, u0, u1, first, count, sorted_bins, run, bins, counts):
    for u in range(u0, u1):
        p = start[u]
        for e in range(first[u], first[u + 1]):
            r = run[e] - 1
            n = 0
            for k in range(np.int64(count[e])):
                if k == 0 or n == LARGEST_COUNT or sorted_bins[p] != sorted_bins[p - 1]:
                    r += 1
                    n = 0
                    bins[r] = sorted_bins[p]
                n += 1
                counts[r] = n
                p += 1


@njit(nogil=True, cache=True)
def _count_voxels(fragments, start, stop, size):
    i = start
    while i < stop:
        label = fragments[i]
        begin = i
        while i < stop and fragments[i] == label:
            i += 1
        size[label] += i - begin


def region_sizes(fragments: np.ndarray, nodes: int | None = None) -> np.ndarray:
    """(nodes + 1,) int64: how many voxels each id of a (z, y, x) label volume has, background first.

    Raises:
      ValueError: what ``as_fragments`` refuses.
    """
    fragments = as_fragments(fragments).reshape(-1)
    size = np.zeros((int(fragments.max()) if nodes is None else nodes) + 1, np.int64)
    _count_voxels(fragments, 0, fragments.size, size)
    return size


def affinity_levels(dtype: np.dtype) -> np.ndarray:
    """float32(value) / float32(255) for the 256 uint8 values; empty for float32, which stands for itself."""
    if dtype == np.uint8:
        return np.arange(256, dtype=np.float32) / np.float32(255)
    return np.empty(0, np.float32)


def region_graph(
    affinities: np.ndarray,
    fragments: np.ndarray,
    statistics: Iterable[str] = ("mean",),
    offsets: Sequence[Sequence[int]] = NEAREST,
    *,
    lead: Sequence[int] = (0, 0, 0),
    threads: int = 1,
) -> Graph:
    """The region graph of ``fragments``, with the affinities on the faces between them.

    Args:
      affinities: (c, z, y, x) float32 or uint8, as for ``watershed``.
      fragments: (z, y, x) whole numbers, 0 = background, which has no edges.
      statistics: any of "mean" (exact sums), "max", "histogram" (256 bins), "running_mean" (waterz's float32 mean) and
        "size" (voxels of each fragment); counts are always made.
      offsets: (z, y, x) offset of each channel.
      lead: along each axis 0, or 1 if the first plane is the neighbouring block's: only the faces at the lower sides of
        the other voxels are counted, and only these voxels.
      threads: worker threads; the result does not depend on their number.

    Raises:
      ValueError: unknown statistics, unfit shapes or dtypes, negative or too large ids, NaN or huge affinities on a
        face.
    """
    threads = check_threads(threads)
    wanted = {statistics} if isinstance(statistics, str) else set(statistics)
    if wanted - set(STATISTICS):
        raise ValueError(
            f"statistics has {sorted(wanted - set(STATISTICS))[0]!r}; expected any of {', '.join(STATISTICS)}"
        )
    az, ay, ax = nearest_channels(affinities, offsets)
    shape = np.shape(affinities)[1:]
    fragments = as_fragments(fragments, shape)
    nodes = int(fragments.max())
    lead = tuple(int(planes) for planes in lead)
    if len(lead) != 3 or any(planes not in (0, 1) or planes >= n for planes, n in zip(lead, shape)):
        raise ValueError(f"lead is {lead} for shape {shape}; expected 0 or 1 along each axis, with a plane after it")

    slabs = [(z0 + lead[0], z1 + lead[0]) for z0, z1 in ranges(shape[0] - lead[0], threads)]
    faces = np.zeros((len(slabs), nodes + 2), np.uint32)
    each(
        lambda z0, z1, faces: _count_faces(fragments, lead, z0, z1, faces),
        [(*slab, row) for slab, row in zip(slabs, faces)],
        threads,
    )
    start = np.zeros(nodes + 3, np.int64)
    np.cumsum(faces.sum(axis=0, dtype=np.int64), out=start[1:])
    place = start[:-1] + np.cumsum(np.vstack([np.zeros_like(faces[:1]), faces[:-1]]), axis=0, dtype=np.int64)
    del faces
    total = int(start[-1])
    levels = affinity_levels(az.dtype)
    scale = 255 if levels.size else FIXED_POINT
    # Histograms alone need a byte for each face.
    binned = wanted - {"size"} == {"histogram"}
    edge = np.empty(total, np.uint32)
    values = np.empty(total, np.uint8 if binned else az.dtype)
    invalid = sum(
        each(
            lambda z0, z1, place: _collect_faces(
                fragments, az, ay, ax, lead, z0, z1, place, edge, values, levels, binned
            ),
            [(*slab, row) for slab, row in zip(slabs, place)],
            threads,
        )
    )
    del place
    if invalid:
        raise ValueError(
            f"affinities has {invalid} values between fragments that are NaN or larger than {LARGEST_AFFINITY:g}; "
            "expected numbers, usually in [0, 1]"
        )

    shares = np.searchsorted(start, [total * part // threads for part in range(1, threads)])
    bounds = [0, *(int(bound) for bound in np.minimum(shares, nodes + 1)), nodes + 1]
    buckets = list(itertools.pairwise(bounds))
    degree = np.zeros(nodes + 1, np.int64)
    each(lambda u0, u1: _count_edges(start, edge, u0, u1, nodes, degree), buckets, threads)
    first = np.zeros(nodes + 2, np.int64)
    np.cumsum(degree, out=first[1:])
    edges = int(first[-1])
    uv = np.empty((edges, 2), np.uint32)
    count = np.empty(edges, np.uint32)
    each(
        lambda u0, u1: _list_edges(start, edge, u0, u1, first, uv, np.zeros(nodes + 1, np.int64), count),
        buckets,
        threads,
    )

    sums = None
    if "mean" in wanted:
        sums = np.zeros(edges, np.int64)
        add = _sum_bytes if levels.size else _sum_floats
        each(lambda u0, u1: add(start, edge, values, u0, u1, first, sums), buckets, threads)
    largest = running = histograms = size = None
    if "max" in wanted:
        largest = np.empty(edges, np.float32)
        each(lambda u0, u1: _largest(start, edge, values, u0, u1, first, levels, largest), buckets, threads)
    if "running_mean" in wanted:
        running = np.empty(edges, np.float32)
        each(lambda u0, u1: _running_means(start, edge, values, u0, u1, first, levels, running), buckets, threads)
    if "histogram" in wanted:
        bins = values if binned else np.empty(total, np.uint8)
        if binned:
            levels = (np.arange(BINS, dtype=np.float32) + np.float32(0.5)) / np.float32(BINS)
        run = np.zeros(edges + 1, np.int64)
        each(lambda u0, u1: _sort_bins(start, edge, values, u0, u1, first, levels, count, bins, run), buckets, threads)
        # Their memory is wanted for what follows.
        del edge, values
        histograms = _histograms(start, buckets, first, count, bins, run, threads)
    if "size" in wanted:
        size = region_sizes(fragments[lead[0] :, lead[1] :, lead[2] :], nodes)
    return Graph(
        nodes=nodes,
        uv=uv,
        count=count,
        sum=sums,
        scale=scale,
        max=largest,
        histograms=histograms,
        running_mean=running,
        size=size,
    )


def _histograms(start, buckets, first, count, sorted_bins, run, threads):
    np.cumsum(run, out=run)
    bins = np.empty(int(run[-1]), np.uint8)
    counts = np.empty(int(run[-1]), np.uint8)
    each(
        lambda u0, u1: _encode_runs(start, u0, u1, first, count, sorted_bins, run, bins, counts),
        buckets,
        threads,
    )
    return Histograms(run, bins, counts)
