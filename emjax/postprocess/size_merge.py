"""Merging by size, then removal of dust: Kruskal's algorithm that stops where both sides are large enough.

Zlateski and Seung (2015), section 3.3; zwatershed's ``merge_segments``.
"""

import numpy as np
from numba import njit

from emjax.postprocess.region_graph import Graph


@njit(nogil=True, cache=True)
def _join_small(uv, order, size, least, parent):
    for e in order:
        a = uv[e, 0]
        b = uv[e, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a != b and (size[a] < least or size[b] < least):
            low = min(a, b)
            high = max(a, b)
            parent[high] = low
            size[low] += size[high]


@njit(nogil=True, cache=True)
def _number_large(parent, size, dust):
    """Turns the union-find into labels 1, 2, ... of the sets that are kept, in order of their smallest id."""
    labels = np.zeros(parent.size, np.uint32)
    last = np.uint32(0)
    for i in range(1, parent.size):
        if parent[i] != i:
            parent[i] = parent[parent[i]]
            labels[i] = labels[parent[i]]
        elif size[i] > 0 and size[i] >= dust:
            last += np.uint32(1)
            labels[i] = last
    return labels


def size_merge(
    graph: Graph, size: int, weight: float, dust: int = 0, *, weights: str | np.ndarray = "mean"
) -> np.ndarray:
    """Joins fragments across heavy edges while one side is small, then drops the sets that are still dust.

    The edges are taken by falling weight (equal ones in the order of the graph) while the weight is above
    ``weight``; the two sets that an edge joins become one if either has fewer than ``size`` voxels.

    Args:
      graph: with ``size``, and with the statistic that the weights come from.
      size: sets of at least this many voxels are not joined with each other.
      weight: edges of at most this weight join nothing.
      dust: sets with fewer voxels become background.
      weights: "mean", "max" or "running_mean", or an array with one weight for each edge.

    Returns:
      (nodes + 1,) uint32: labels 1, 2, ... in order of each set's smallest fragment; 0 for background and dust.

    Raises:
      ValueError: a graph without sizes or without the statistic, weights of another length or NaN, negative sizes.
    """
    if graph.size is None:
        raise ValueError("graph has no sizes; make it with region_graph(..., statistics=('mean', 'size'))")
    if not (size >= 0 and dust >= 0):
        raise ValueError(f"size is {size} and dust is {dust}; expected 0 or more voxels")
    if isinstance(weights, str):
        if weights not in ("mean", "max", "running_mean"):
            raise ValueError(f"weights is {weights!r}; expected 'mean', 'max', 'running_mean' or an array")
        values = getattr(graph, weights)
        if values is None:
            raise ValueError(
                f"graph lacks {weights!r}; make it with region_graph(..., statistics=({weights!r}, 'size'))"
            )
    else:
        values = np.asarray(weights)
    if values.shape != graph.count.shape:
        raise ValueError(f"weights has shape {values.shape}; expected {graph.count.shape}, one for each edge")
    if np.isnan(values).any() or np.isnan(weight):
        raise ValueError("weights or weight holds NaN; expected numbers")
    heavy = np.flatnonzero(values > weight)
    order = heavy[np.argsort(-values[heavy], kind="stable")]
    sizes = graph.size.copy()
    parent = np.arange(graph.nodes + 1, dtype=np.uint32)
    _join_small(graph.uv, order, sizes, size, parent)
    return _number_large(parent, sizes, dust)
