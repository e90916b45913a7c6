"""Bad input: one ValueError that names the argument, and never a crash in a kernel."""

import dataclasses

import numpy as np
import pytest

from emjax.postprocess import (
    agglomerate,
    apply,
    boundary_edge_features,
    connected_components,
    distance_transform_watershed,
    foreground_multicut,
    label_components,
    lsd_fragments,
    merge_blocks,
    mutex_watershed,
    region_graph,
    region_sizes,
    regrow,
    renumber,
    seeded_watershed,
    segment_blockwise,
    size_merge,
    superhuman_fragments,
    watershed,
)

GOOD = np.random.default_rng(0).random((3, 4, 5, 6), dtype=np.float32)
FRAGMENTS = watershed(GOOD)
GRAPH = region_graph(GOOD, FRAGMENTS, ("mean", "size"))


def with_nan(channel, place):
    affinities = GOOD.copy()
    affinities[(channel, *place)] = np.nan
    return affinities


CASES = {
    "rank": (lambda: watershed(GOOD[0]), r"affinities has shape \(4, 5, 6\); expected \(channel, z, y, x\)"),
    "channels": (lambda: watershed(GOOD[:2]), "affinities has 2 channels for 3 offsets"),
    "offsets": (lambda: watershed(GOOD, offsets=((1, 0, 0), (0, -1, 0), (0, 0, -1))), r"offsets .* lack \(-1, 0, 0\)"),
    "dtype": (lambda: watershed(GOOD.astype(np.float64)), "affinities is float64; expected float32, or uint8"),
    "empty axis": (lambda: watershed(GOOD[:, :0]), "expected at least one voxel along each axis"),
    "thresholds": (lambda: watershed(GOOD, 0.9, 0.1), "low is 0.9 and high is 0.1; expected low < high"),
    "threshold NaN": (lambda: watershed(GOOD, np.nan, 0.1), "expected finite numbers"),
    "NaN": (lambda: watershed(with_nan(1, (2, 3, 4))), r"NaN in the y channel at \(2, 3, 4\)"),
    "NaN, components": (lambda: connected_components(with_nan(0, (1, 0, 0))), r"NaN in the z channel at \(1, 0, 0\)"),
    "threads": (lambda: watershed(GOOD, threads=0), "threads is 0"),
    "shape": (lambda: region_graph(GOOD, FRAGMENTS[1:]), r"fragments has shape \(3, 5, 6\); expected \(4, 5, 6\)"),
    "statistics": (lambda: region_graph(GOOD, FRAGMENTS, ("median",)), "statistics has 'median'"),
    "negative": (lambda: region_graph(GOOD, -FRAGMENTS.astype(np.int64)), r"fragments holds the negative id -\d+ at"),
    "float labels": (lambda: region_graph(GOOD, FRAGMENTS.astype(float)), "fragments is float64; expected whole"),
    "overflow": (lambda: region_graph(GOOD, FRAGMENTS.astype(np.uint64) + 2**33), "fragments holds the id .* renumber"),
    "NaN on a face": (
        lambda: region_graph(np.full_like(GOOD, np.nan), np.arange(120).reshape(4, 5, 6)),
        "affinities has .* NaN",
    ),
    "lead": (lambda: region_graph(GOOD[:, :1], FRAGMENTS[:1], lead=(1, 0, 0)), r"lead is \(1, 0, 0\)"),
    "score": (lambda: agglomerate(GRAPH, score="median"), "score is 'median'; expected mean"),
    "quantile": (lambda: agglomerate(GRAPH, score="hist_quant_0"), "score is 'hist_quant_0'"),
    "ties": (lambda: agglomerate(GRAPH, ties="random"), "ties is 'random'"),
    "lacking": (lambda: agglomerate(GRAPH, ties="waterz"), "graph lacks 'running_mean'"),
    "lacking histogram": (lambda: agglomerate(GRAPH, score="hist_quant_50"), "graph lacks 'histogram'"),
    "threshold": (lambda: agglomerate(GRAPH, np.nan), "threshold is nan"),
    "no threshold": (lambda: agglomerate(GRAPH, []), r"threshold is \[\]"),
    "queue": (lambda: agglomerate(GRAPH, discretize_queue=256), "discretize_queue is waterz's"),
    "queue size": (lambda: agglomerate(GRAPH, ties="waterz", discretize_queue=-1), "discretize_queue is -1"),
    "cut": (lambda: agglomerate(GRAPH, 0.3).cut(0.5), "threshold is 0.5; the tree is known up to 0.3"),
    "sizes": (lambda: size_merge(dataclasses.replace(GRAPH, size=None), 5, 0.5), "graph has no sizes"),
    "weights": (lambda: size_merge(GRAPH, 5, 0.5, weights=np.ones(2)), r"weights has shape \(2,\)"),
    "lut": (lambda: apply(np.ones(3), FRAGMENTS), "lut is float64"),
    "out": (lambda: apply(np.arange(999, dtype=np.uint32), FRAGMENTS, out=np.zeros(3, np.uint32)), "out is uint32"),
    "connectivity": (lambda: label_components(FRAGMENTS, 18), "connectivity is 18; expected 6 or 26"),
    "border": (lambda: merge_blocks(GOOD, FRAGMENTS, np.zeros((3, 4, 5, 5), bool)), "border is bool of shape"),
    "block": (lambda: segment_blockwise(GOOD, (0, 4, 4)), r"block \(0, 4, 4\)"),
    "out shape": (lambda: segment_blockwise(GOOD, (2, 4, 4), out=np.zeros((1, 1, 1))), r"out has shape \(1, 1, 1\)"),
    "merged means": (
        lambda: region_graph(GOOD, FRAGMENTS, ("running_mean",)).merge(),
        "running means, which do not add",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_views_are_accepted():
    padded = np.zeros((4, 5, 6, 9), np.float32)
    padded[..., ::3][..., :3] = np.moveaxis(GOOD, 0, -1)
    view = np.moveaxis(padded[..., ::3][..., :3], -1, 0)
    np.testing.assert_array_equal(watershed(view), FRAGMENTS)
    strided = np.zeros((4, 5, 12), np.int32)
    strided[..., ::2] = FRAGMENTS
    np.testing.assert_array_equal(region_graph(GOOD, strided[..., ::2]).uv, GRAPH.uv)


EMPTY, NO_FRAGMENTS = GOOD[:, :, :0], FRAGMENTS[:, :0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: apply(np.zeros(3, np.uint32), NO_FRAGMENTS),
        lambda: boundary_edge_features(EMPTY, NO_FRAGMENTS),
        lambda: connected_components(EMPTY),
        lambda: distance_transform_watershed(EMPTY[0]),
        lambda: foreground_multicut(EMPTY, EMPTY[0]),
        lambda: label_components(NO_FRAGMENTS),
        lambda: lsd_fragments(EMPTY),
        lambda: merge_blocks(EMPTY, NO_FRAGMENTS, NO_FRAGMENTS.astype(bool)),
        lambda: mutex_watershed(EMPTY, ((-1, 0, 0), (0, -1, 0), (0, 0, -1))),
        lambda: region_graph(EMPTY, NO_FRAGMENTS),
        lambda: region_sizes(NO_FRAGMENTS),
        lambda: regrow(NO_FRAGMENTS, EMPTY, 5),
        lambda: renumber(NO_FRAGMENTS),
        lambda: seeded_watershed(EMPTY[0], NO_FRAGMENTS),
        lambda: segment_blockwise(EMPTY, (2, 2, 2)),
        lambda: superhuman_fragments(EMPTY),
        lambda: watershed(EMPTY),
    ],
)
def test_an_axis_of_length_zero_is_named(call):
    with pytest.raises(ValueError, match=r"has shape .* at least one voxel along each axis"):
        call()
