import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emjax.metrics import contingency, variation_of_information
from emjax.postprocess.mutex_watershed import mutex_watershed

OFFSETS = [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, -3, 0), (0, 0, -3), (-2, 0, 0), (1, 2, -2)]


def _naive(affinities, offsets, attractive, strides, mask, signed):
    """Algorithm 1 of the paper with sets."""
    channels, *shape = affinities.shape
    ids = np.arange(np.prod(shape)).reshape(shape)
    edges = []
    for channel in range(channels):
        for place in np.ndindex(*shape):
            other = tuple(np.add(place, offsets[channel]))
            if not all(0 <= value < side for value, side in zip(other, shape)):
                continue
            if channel >= attractive and any(value % step for value, step in zip(place, strides)):
                continue
            if mask is not None and not (mask[place] and mask[other]):
                continue
            value = affinities[(channel, *place)]
            weight = float(value) - 0.5 if signed else (1 - value if channel >= attractive else value)
            attracts = weight > 0 if signed else channel < attractive
            if not signed or weight != 0:
                edges.append((abs(weight) if signed else weight, attracts, ids[place], ids[other]))
    parent = list(range(ids.size))
    mutexes = [set() for _ in parent]

    def root(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for _, attracts, one, other in sorted(edges, key=lambda edge: -edge[0]):
        one, other = root(one), root(other)
        if one == other:
            continue
        if not attracts:
            mutexes[one].add(other)
            mutexes[other].add(one)
        elif other not in mutexes[one]:
            parent[other] = one
            for node in mutexes[other]:
                mutexes[node].discard(other)
                mutexes[node].add(one)
                mutexes[one].add(node)
    return np.array([root(node) for node in range(ids.size)]).reshape(shape)


def _same(one, other):
    return variation_of_information(contingency(one, other), ()).sum == 0


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, len(OFFSETS)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 4, 255]),
    st.integers(0, 2**31),
)
def test_equals_the_naive_algorithm(shape, attractive, signed, masked, levels, seed):
    generator = np.random.default_rng(seed)
    affinities = generator.random((len(OFFSETS), *shape)).astype(np.float32)
    if levels:
        affinities = (np.rint(affinities * levels) / levels).astype(np.float32)
    mask = generator.random(shape) > 0.2 if masked else None
    strides = (1, 2, 2)
    got = mutex_watershed(
        affinities,
        OFFSETS,
        attractive=attractive,
        strides=strides,
        mask=mask,
        convention="signed" if signed else "affogato",
    )
    want = _naive(affinities, OFFSETS, attractive, strides, mask, signed)
    inside = np.ones(shape, bool) if mask is None else mask
    assert np.array_equal(got == 0, ~inside)
    if inside.any():
        assert _same(got[inside], want[inside])
    numbers, first = np.unique(got[inside], return_index=True)
    assert np.array_equal(numbers, np.arange(1, len(numbers) + 1))
    assert (np.diff(first) > 0).all()


def test_many_mutexes_outgrow_the_tables():
    generator = np.random.default_rng(0)
    affinities = generator.random((len(OFFSETS), 4, 40, 40)).astype(np.float32)
    affinities[3:] *= 0.2
    labels = mutex_watershed(affinities, OFFSETS)
    assert labels.max() > 500
    assert (labels > 0).all()


def test_uint8_stands_for_255ths_and_strides_per_channel():
    values = np.random.default_rng(1).integers(0, 256, (len(OFFSETS), 3, 12, 12)).astype(np.uint8)
    as_float = values.astype(np.float32) / np.float32(255)
    assert np.array_equal(mutex_watershed(values, OFFSETS), mutex_watershed(as_float, OFFSETS))
    each = [(1, 1, 1)] * 3 + [(1, 4, 4)] * 4
    assert np.array_equal(
        mutex_watershed(values, OFFSETS, strides=each), mutex_watershed(values, OFFSETS, strides=(1, 4, 4))
    )


def test_only_repulsion_leaves_every_voxel_alone():
    affinities = np.zeros((1, 2, 3, 4), np.float32)
    labels = mutex_watershed(affinities, [(0, 0, -1)], attractive=0)
    assert np.array_equal(labels.ravel(), np.arange(1, 25))
    assert not mutex_watershed(affinities, [(0, 0, -1)], convention="signed", attractive=1, drop_isolated=True).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": OFFSETS[:-1]}, "affinities has 7 channels for 6 offsets"),
        ({"offsets": [(0, 0, 0)] * 7}, r"offsets holds \(0, 0, 0\)"),
        ({"attractive": 8}, "attractive is 8"),
        ({"strides": (1, 0, 1)}, "strides holds 0"),
        ({"strides": [(1, 1, 1)] * 3}, "strides has 3 triples"),
        ({"mask": np.ones((2, 2, 2))}, "mask has shape"),
        ({"convention": "other"}, "convention is 'other'"),
        ({"affinities": np.full((7, 2, 3, 3), np.nan, np.float32)}, "affinities holds NaN"),
        ({"affinities": np.zeros((7, 0, 3, 3), np.float32)}, "expected at least one voxel"),
        ({"affinities": np.zeros((7, 2, 3, 3))}, "affinities is float64"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"affinities": np.zeros((7, 2, 3, 3), np.float32), "offsets": OFFSETS} | change
    with pytest.raises(ValueError, match=message):
        mutex_watershed(**arguments)
