"""Region graphs against brute force, and their sums over blocks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes_for_tests import affinity_volumes, as_float

from emjax.postprocess import region_graph, region_sizes, watershed

ALL = ("mean", "max", "histogram", "running_mean", "size")


def brute_force(affinities, fragments):
    """Edge -> affinities in raster order, channels z, y, x per voxel."""
    edges = {}
    for place in np.ndindex(fragments.shape):
        for axis in range(3):
            if place[axis] == 0:
                continue
            other = tuple(p - (a == axis) for a, p in enumerate(place))
            u, v = sorted((int(fragments[place]), int(fragments[other])))
            if u != v and u > 0:
                edges.setdefault((u, v), []).append(as_float(affinities)[(axis, *place)])
    return edges


@settings(max_examples=30, deadline=None)
@given(affinity_volumes(longest=5, uint8=True), st.integers(1, 3))
def test_statistics(affinities, threads):
    fragments = watershed(affinities, 0.0001, 0.9)
    graph = region_graph(affinities, fragments, ALL, threads=threads)
    edges = brute_force(affinities, fragments)
    assert [tuple(edge) for edge in graph.uv] == sorted(edges)
    np.testing.assert_array_equal(graph.size, np.bincount(fragments.ravel()))
    for e, edge in enumerate(sorted(edges)):
        values = np.array(edges[edge], np.float32)
        assert graph.count[e] == values.size
        np.testing.assert_allclose(graph.mean[e], values.astype(np.float64).mean(), atol=1e-9, rtol=1e-7)
        assert graph.max[e] == values.max()
        running = np.float32(0)
        for n, value in enumerate(values):
            running = np.float32(value + np.float32(running * np.float32(n))) / np.float32(n + 1)
        assert graph.running_mean[e] == running
        bins = np.minimum((values * 256).astype(int), 255)
        runs = slice(graph.histograms.start[e], graph.histograms.start[e + 1])
        found, counts = np.unique(bins, return_counts=True)
        np.testing.assert_array_equal(graph.histograms.bins[runs], found)
        np.testing.assert_array_equal(graph.histograms.counts[runs], counts)


def test_histogram_entries_hold_at_most_255():
    """Two fragments that touch over 700 faces, 600 of them with one affinity, whole and in parts."""
    fragments = np.repeat(np.array([1, 2], np.uint32), 700).reshape(2, 1, 700)
    affinities = np.zeros((3, 2, 1, 700), np.uint8)
    affinities[0, 1, 0, :600] = 200
    expected = [0, 200, 200, 200], [100, 255, 255, 90]
    whole = region_graph(affinities, fragments, "histogram")
    parts = [region_graph(affinities[..., s], fragments[..., s], "histogram") for s in (slice(550), slice(550, None))]
    for graph in (whole, parts[0].merge(parts[1])):
        assert graph.histograms.counts.dtype == np.uint8
        np.testing.assert_array_equal(graph.histograms.bins, expected[0])
        np.testing.assert_array_equal(graph.histograms.counts, expected[1])


@settings(max_examples=30, deadline=None)
@given(affinity_volumes(longest=6, uint8=True), st.data())
def test_parts_add_up(affinities, data):
    fragments = watershed(affinities, 0.0001, 0.9)
    statistics = ("mean", "max", "histogram", "size")
    whole = region_graph(affinities, fragments, statistics)
    axis = data.draw(st.integers(0, 2))
    if fragments.shape[axis] < 2:
        return
    cut = data.draw(st.integers(1, fragments.shape[axis] - 1))
    low = tuple(slice(0, cut) if a == axis else slice(None) for a in range(3))
    high = tuple(slice(cut - 1, None) if a == axis else slice(None) for a in range(3))
    lead = tuple(int(a == axis) for a in range(3))
    parts = [
        region_graph(affinities[(slice(None), *low)], fragments[low], statistics),
        region_graph(affinities[(slice(None), *high)], fragments[high], statistics, lead=lead),
    ]
    merged = parts[0].merge(parts[1])
    assert merged.nodes == whole.nodes
    for name in ("uv", "count", "sum", "max", "size"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    for name in ("start", "bins", "counts"):
        np.testing.assert_array_equal(getattr(merged.histograms, name), getattr(whole.histograms, name))


def test_relabel_joins_nodes():
    fragments = np.arange(1, 5, dtype=np.uint32).reshape(1, 1, 4)
    affinities = np.zeros((3, 1, 1, 4), np.uint8)
    affinities[2, 0, 0] = [0, 10, 20, 30]
    graph = region_graph(affinities, fragments).relabel(np.array([0, 1, 2, 2, 1]))
    assert graph.uv.tolist() == [[1, 2]]
    assert graph.count.tolist() == [2]
    assert graph.sum.tolist() == [40]
    assert graph.scale == 255


def test_sizes():
    labels = np.random.default_rng(0).integers(0, 9, (3, 4, 50))
    np.testing.assert_array_equal(region_sizes(labels), np.bincount(labels.ravel()))


def test_no_edges():
    graph = region_graph(
        np.zeros((3, 2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint32), ("mean", "max", "histogram", "size")
    )
    assert graph.uv.shape == (0, 2)
    assert graph.merge(graph).uv.shape == (0, 2)
    assert graph.relabel(np.zeros(1, np.uint32)).nodes == 0
