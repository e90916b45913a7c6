import itertools

import numpy as np
import pytest

from emjax.postprocess.multicut import boundary_edge_features, multicut, multicut_costs, multicut_energy


def _graph(seed, nodes, edges, digits=6):
    generator = np.random.default_rng(seed)
    uv = generator.integers(0, nodes, (edges, 2))
    uv = uv[uv[:, 0] != uv[:, 1]]
    return uv, np.round(generator.normal(0.0, 1.0, len(uv)), digits)


def _optimum(nodes, uv, costs):
    best = np.inf
    for labels in itertools.product(*(range(node + 1) for node in range(nodes))):
        best = min(best, multicut_energy(uv, costs, np.array(labels)))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_small_graphs_are_solved(seed):
    uv, costs = _graph(seed, 6, 14)
    labels = multicut(6, uv, costs, proposals=20)
    assert multicut_energy(uv, costs, labels) == pytest.approx(_optimum(6, uv, costs))


@pytest.mark.parametrize("digits", [0, 1, 6])
@pytest.mark.parametrize("seed", range(8))
def test_refinement_never_makes_it_worse(seed, digits):
    uv, costs = _graph(seed, 80, 300, digits)
    energies = [
        multicut_energy(uv, costs, multicut(80, uv, costs, **options))
        for options in ({"refine": False}, {}, {"proposals": 20})
    ]
    assert energies[1] <= energies[0] + 1e-9
    assert energies[2] <= energies[1] + 1e-9


def test_greedy_contraction_equals_its_definition():
    uv, costs = _graph(3, 40, 120)
    weights = {}
    for (u, v), cost in zip(uv.tolist(), costs):
        weights[min(u, v), max(u, v)] = weights.get((min(u, v), max(u, v)), 0.0) + cost
    groups = np.arange(40)
    while weights and max(weights.values()) > 0:
        kept, gone = max(weights, key=lambda pair: weights[pair])
        groups[groups == gone] = kept
        merged = {}
        for (u, v), cost in weights.items():
            u, v = (kept if u == gone else u), (kept if v == gone else v)
            if u != v:
                merged[min(u, v), max(u, v)] = merged.get((min(u, v), max(u, v)), 0.0) + cost
        weights = merged
    got = multicut(40, uv, costs, refine=False)
    assert len(set(zip(groups.tolist(), got.tolist()))) == len(set(groups.tolist())) == len(set(got.tolist()))


def test_oracle_energies(oracles):
    with np.load(oracles / "segneuron" / "multicut.npz") as file:
        arrays = dict(file)
    for key in (name for name in arrays if name.startswith("nodes_")):
        graph = key.removeprefix("nodes_")
        uv, costs, nodes = arrays[f"edges_{graph}"], arrays[f"costs_{graph}"], int(arrays[key])
        for options, name in (({"refine": False}, "energy_gaec"), ({}, "energy"), ({"proposals": 20}, "energy")):
            labels = multicut(nodes, uv, costs, **options)
            assert multicut_energy(uv, costs, labels) <= arrays[f"{name}_{graph}"] + 1e-6


def test_a_hub_with_many_leaves():
    leaves = 5000
    uv = np.stack([np.zeros(leaves, np.int64), np.arange(1, leaves + 1)], 1)
    costs = np.where(np.arange(leaves) % 2 == 0, 1.0, -1.0)
    labels = multicut(leaves + 1, uv, costs)
    assert (labels[1::2] == labels[0]).all()
    assert len(np.unique(labels)) == 1 + leaves // 2


def test_graphs_without_edges_or_nodes():
    assert multicut(0, np.zeros((0, 2), int), np.zeros(0)).tolist() == []
    assert multicut(3, np.zeros((0, 2), int), np.zeros(0)).tolist() == [0, 1, 2]
    assert multicut(3, [[2, 1]], [1.0]).tolist() == [0, 1, 1]
    assert multicut(2, [[0, 1], [1, 0]], [1.0, -3.0]).tolist() == [0, 1]


def test_costs():
    costs = multicut_costs([0.0, 0.5, 1.0], [4, 2, 1], beta=0.5)
    assert costs == pytest.approx([np.log(999), 0.0, -np.log(999) / 4])
    assert multicut_costs([0.5], beta=0.25) == pytest.approx([np.log(3)])
    assert multicut_costs([]).shape == (0,)


def test_boundary_features_pool_all_directions():
    fragments = np.array([[[1, 2], [1, 2]], [[1, 3], [1, 3]]])
    affinities = np.zeros((3, 2, 2, 2), np.float32)
    affinities[2, 0, :, 1] = [0.25, 0.75]
    affinities[0, 1, :, 1] = [1.0, 0.5]
    edges = boundary_edge_features(affinities, fragments)
    assert edges.uv.tolist() == [[1, 2], [1, 3], [2, 3]]
    assert edges.size.tolist() == [2, 2, 2]
    assert edges.probability == pytest.approx([0.5, 1.0, 0.25])
    limited = boundary_edge_features(affinities, fragments, np.full((2, 2, 2), 0.5, np.float32))
    assert limited.probability == pytest.approx([1 - 0.375, 1.0, 0.5])
    with pytest.raises(ValueError, match="foreground has shape"):
        boundary_edge_features(affinities, fragments, np.ones((2, 2), np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, [[0, 3]], [1.0]), "uv names node 3"),
        ((3, [[1, 1]], [1.0]), "uv joins node 1 with itself"),
        ((3, [[0, 1]], [1.0, 2.0]), "costs has shape"),
        ((3, [[0, 1]], [np.nan]), "costs holds nan"),
        ((-1, [], []), "nodes is -1"),
        ((3, [[0.5, 1]], [1.0]), "uv has shape"),
    ],
)
def test_bad_graphs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        multicut(*arguments)


def test_bad_probabilities_are_named():
    with pytest.raises(ValueError, match="probability spans"):
        multicut_costs([1.5])
    with pytest.raises(ValueError, match="beta is 1"):
        multicut_costs([0.5], beta=1)
    with pytest.raises(ValueError, match="size has shape"):
        multicut_costs([0.5], [1, 2])
