"""Agglomeration equals waterz merge for merge; the canonical tree does not depend on how it is computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes_for_tests import MEAN, QUANTILE, affinity_volumes, waterz_agglomerate

from emjax.postprocess import agglomerate, apply, parse_score, region_graph, watershed

SCORES = {
    "mean": MEAN,
    "hist_quant_50": QUANTILE.format(50, "false"),
    "hist_quant_75_initmax": QUANTILE.format(75, "true"),
    "aff85_his256": QUANTILE.format(85, "true"),
    "hist_quant_25": QUANTILE.format(25, "false"),
}
ALL = ("mean", "max", "histogram", "running_mean")


@settings(max_examples=60, deadline=None)
@given(affinity_volumes(longest=8, uint8=True), st.sampled_from(sorted(SCORES)), st.sampled_from([0, 256]))
def test_equal_to_waterz(affinities, score, queue):
    fragments = watershed(affinities, 0.0001, 0.9)
    thresholds = [0.2, 0.5, 0.8]
    options = {"scoring_function": SCORES[score], "discretize_queue": queue, "return_merge_history": True}
    expected = waterz_agglomerate(affinities, thresholds, fragments=fragments, **options)
    graph = region_graph(affinities, fragments, ALL)
    tree = agglomerate(graph, thresholds, score=score, ties="waterz", discretize_queue=queue)
    history = []
    for threshold, (segmentation, merges) in zip(thresholds, expected):
        np.testing.assert_array_equal(apply(tree.cut(threshold), fragments), segmentation)
        history += merges
        assert tree.merges(threshold) == len(history)
    assert [(m["a"], m["b"], m["score"]) for m in history] == list(zip(tree.a, tree.b, tree.score))


def noisy_graph(seed, shape=(12, 40, 40), uint8=False):
    rng = np.random.default_rng(seed)
    affinities = rng.random((3, *shape), dtype=np.float32)
    if uint8:
        affinities = np.round(affinities * 40).astype(np.uint8) * np.uint8(6)
    return region_graph(affinities, watershed(affinities), ALL)


def test_waterz_on_many_fragments_and_hubs():
    rng = np.random.default_rng(7)
    affinities = rng.random((3, 14, 60, 60), dtype=np.float32)
    fragments = watershed(affinities)
    graph = region_graph(affinities, fragments, ALL)
    options = {"return_merge_history": True, "return_region_graph": True}
    segmentation, merges, left = waterz_agglomerate(affinities, [0.6], fragments=fragments, **options)[0]
    tree = agglomerate(graph, 0.6, ties="waterz", remaining=True)
    np.testing.assert_array_equal(apply(tree.cut(), fragments), segmentation)
    assert [(m["a"], m["b"], m["score"]) for m in merges] == list(zip(tree.a, tree.b, tree.score))
    assert [(e["u"], e["v"], e["score"]) for e in left] == [(*uv, s) for uv, s in zip(tree.uv, tree.uv_score)]


@settings(max_examples=30, deadline=None)
@given(affinity_volumes(longest=8, uint8=True), st.sampled_from(sorted(set(SCORES) - {"mean"})))
def test_canonical_quantiles_equal_waterz_with_256_bins(affinities, score):
    fragments = watershed(affinities, 0.0001, 0.9)
    graph = region_graph(affinities, fragments, ("histogram", "max"))
    for queue in (None, 0):
        options = {"fragments": fragments, "scoring_function": SCORES[score]}
        expected = waterz_agglomerate(affinities, [0.3, 0.6], discretize_queue=0 if queue == 0 else 256, **options)
        tree = agglomerate(graph, 0.6, score=score, discretize_queue=queue)
        for threshold, segmentation in zip((0.3, 0.6), expected):
            np.testing.assert_array_equal(apply(tree.cut(threshold), fragments), segmentation)


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("uint8", [False, True])
def test_canonical_is_greedy_whatever_the_order_of_work(score, uint8, monkeypatch):
    graph = noisy_graph(8, (6, 24, 24), uint8)
    tree = agglomerate(graph, 0.7, score=score)
    np.testing.assert_array_equal(tree.cut(), greedy(graph, 0.7, score))


@pytest.mark.parametrize("score", ["mean", "max", "hist_quant_50", "hist_quant_75_initmax"])
@pytest.mark.parametrize("uint8", [False, True])
def test_cut_is_what_a_smaller_threshold_gives(score, uint8):
    graph = noisy_graph(8, (6, 24, 24), uint8)
    tree = agglomerate(graph, 0.7, score=score)
    assert np.all(np.diff(tree.level) >= 0)
    for threshold in (0.1, 0.3, 0.5, 0.69):
        np.testing.assert_array_equal(tree.cut(threshold), agglomerate(graph, threshold, score=score).cut())


def greedy(graph, threshold, score):
    """Merges the edge with the smallest (score, edge number) again and again; a joined edge has the larger number."""
    parsed = parse_score(score)
    edges = {}
    for e, (u, v) in enumerate(graph.uv.tolist()):
        if parsed.kind == parse_score("mean").kind:
            values = np.array([graph.sum[e], graph.count[e]], object)
        else:
            values = [graph.max[e]]
        edges[(u, v)] = (e, values)

    def cost(values):
        if parsed.kind == parse_score("mean").kind:
            return 1 - values[0] / (float(values[1]) * graph.scale)
        return 1 - float(max(values))

    key = {pair: (int(cost(values) * 2**31), e) for pair, (e, values) in edges.items()}
    segment = np.arange(graph.nodes + 1)
    while key:
        pair = min(key, key=key.get)
        if key[pair][0] >= threshold * 2**31:
            break
        a, b = pair
        segment[segment == b] = a
        del edges[pair], key[pair]
        for other in [p for p in edges if b in p]:
            e, values = edges.pop(other)
            del key[other]
            x = other[0] if other[1] == b else other[1]
            new = (min(a, x), max(a, x))
            if new in edges:
                f, more = edges[new]
                e, values = max(e, f), values + more
            edges[new] = (e, values)
            key[new] = (int(cost(values) * 2**31), e)
    return segment


def test_canonical_near_waterz_on_float_mean():
    affinities = np.random.default_rng(9).random((3, 10, 30, 30), dtype=np.float32)
    fragments = watershed(affinities)
    graph = region_graph(affinities, fragments, ALL)
    for threshold in (0.2, 0.45):
        ours = agglomerate(graph, threshold).cut()
        waterz = agglomerate(graph, threshold, ties="waterz").cut()
        assert np.mean(ours != waterz) < 0.005


def test_hubs_are_looked_up(monkeypatch):
    # A star: every leaf touches the middle and the next leaf.
    leaves = 3000
    labels = np.ones((2, 1, leaves), np.uint32)
    labels[1, 0] = np.arange(2, leaves + 2)
    rng = np.random.default_rng(10)
    affinities = rng.random((3, 2, 1, leaves), dtype=np.float32)
    graph = region_graph(affinities, labels, ALL)
    expected = waterz_agglomerate(affinities, [0.5, 0.9], fragments=labels)
    tree = agglomerate(graph, 0.9, ties="waterz")
    for threshold, segmentation in zip([0.5, 0.9], expected):
        np.testing.assert_array_equal(apply(tree.cut(threshold), labels), segmentation)
    canonical = agglomerate(graph, 1.0)
    for threshold in (0.5, 0.9):
        np.testing.assert_array_equal(canonical.cut(threshold), tree.cut(threshold))


def test_names():
    assert parse_score("aff85_his256") == parse_score("hist_quant_85_initmax")
    assert parse_score("hist_quant_10").statistics() == ("histogram",)
    assert parse_score("mean").statistics("waterz") == ("running_mean",)


def test_empty_graph():
    graph = region_graph(np.zeros((3, 2, 3, 4), np.float32), np.ones((2, 3, 4), np.uint32), ALL)
    for options in ({}, {"ties": "waterz"}, {"score": "hist_quant_50"}, {"score": "max"}, {"remaining": True}):
        tree = agglomerate(graph, 0.5, **options)
        assert tree.cut().tolist() == [0, 1]
        assert tree.a.size == 0
