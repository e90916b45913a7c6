"""Size merge against a literal version of its definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes_for_tests import affinity_volumes

from emjax.postprocess import region_graph, size_merge, watershed


def literal(graph, size, weight, dust, weights):
    sets = [{i} for i in range(graph.nodes + 1)]
    of = list(range(graph.nodes + 1))
    for e in sorted(range(len(weights)), key=lambda e: -weights[e]):
        if not weights[e] > weight:
            break
        a, b = (of[int(i)] for i in graph.uv[e])
        sizes = [sum(graph.size[i] for i in sets[s]) for s in (a, b)]
        if a != b and min(sizes) < size:
            for i in sets[b]:
                of[i] = a
            sets[a] |= sets.pop(b) if b == len(sets) - 1 else sets[b]
    labels, number = np.zeros(graph.nodes + 1, np.uint32), {}
    for i in range(1, graph.nodes + 1):
        members = [j for j in range(1, graph.nodes + 1) if of[j] == of[i]]
        if sum(graph.size[j] for j in members) >= dust and graph.size[i]:
            labels[i] = number.setdefault(of[i], len(number) + 1)
    return labels


@settings(max_examples=40, deadline=None)
@given(affinity_volumes(longest=6), st.integers(0, 12), st.sampled_from([0.0, 0.3, 0.6]), st.integers(0, 6))
def test_definition(affinities, size, weight, dust):
    graph = region_graph(affinities, watershed(affinities, 0.0001, 0.9), ("mean", "max", "size"))
    for name in ("mean", "max"):
        weights = getattr(graph, name)
        np.testing.assert_array_equal(
            size_merge(graph, size, weight, dust, weights=name), literal(graph, size, weight, dust, weights)
        )
        np.testing.assert_array_equal(
            size_merge(graph, size, weight, dust, weights=weights), literal(graph, size, weight, dust, weights)
        )
