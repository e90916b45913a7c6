"""Components against SciPy and scikit-image, and lookup tables."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from skimage import measure
from volumes_for_tests import affinity_volumes, as_float

from emjax.postprocess import apply, connected_components, label_components, renumber


@settings(max_examples=40, deadline=None)
@given(affinity_volumes(uint8=True), st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.9, 1.0]), st.integers(1, 3))
def test_affinities(affinities, threshold, threads):
    shape = affinities.shape[1:]
    index = np.arange(np.prod(shape)).reshape(shape)
    rows, columns = [], []
    for axis in range(3):
        upper = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        lower = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        joined = as_float(affinities)[(axis, *upper)] > np.float32(threshold)
        rows.append(index[upper][joined])
        columns.append(index[lower][joined])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = sparse.coo_matrix((np.ones(rows.size), (rows, columns)), shape=(index.size, index.size))
    component = sparse.csgraph.connected_components(graph, directed=False)[1]
    alone = ~np.isin(index.ravel(), np.concatenate([rows, columns]))
    expected, names = np.zeros(index.size, np.uint32), {}
    for i in np.flatnonzero(~alone):
        expected[i] = names.setdefault(component[i], len(names) + 1)
    found = connected_components(affinities, threshold, threads=threads)
    np.testing.assert_array_equal(found, expected.reshape(shape))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(2, 7)] * 3), st.integers(0, 2**31), st.sampled_from([np.uint8, np.int64, bool]),
    st.integers(1, 3),
)  # fmt: skip
def test_labels_equal_scikit_image(shape, seed, dtype, threads):
    labels = np.random.default_rng(seed).integers(0, 3, shape).astype(dtype)
    for connectivity, rank in ((26, 3), (6, 1)):
        np.testing.assert_array_equal(
            label_components(labels, connectivity, threads=threads), measure.label(labels, connectivity=rank)
        )


def test_raster_order_on_one_voxel_axes():
    labels = np.array([0, 2, 1, 1, 0, 2], np.uint8).reshape(1, 6, 1)
    assert label_components(labels).ravel().tolist() == [0, 1, 2, 2, 0, 3]
    assert label_components(labels, background=1).ravel().tolist() == [1, 2, 0, 0, 3, 4]


def test_apply_and_renumber():
    labels = (
        np.random.default_rng(0)
        .integers(0, 2**40, 300)
        .astype(np.uint64)[np.random.default_rng(1).integers(0, 300, (4, 30, 30))]
    )
    labels[labels % 7 == 0] = 0
    new, ids = renumber(labels)
    assert new.max() == ids.size - 1 == np.unique(labels).size - 1
    np.testing.assert_array_equal(apply(ids, new), labels)
    np.testing.assert_array_equal(apply(ids, new, threads=3), labels)
    first = new.ravel()[np.sort(np.unique(new, return_index=True)[1])]
    assert first[first > 0].tolist() == list(range(1, ids.size))
    in_place = new.copy()
    assert apply(np.arange(ids.size, dtype=np.uint32)[::-1], in_place, out=in_place) is in_place


def test_renumber_many_ids():
    labels = np.random.default_rng(2).permutation(40_000).reshape(40, 40, 25).astype(np.uint32)
    new, ids = renumber(labels)
    np.testing.assert_array_equal(ids[new], labels)


def test_apply_refuses_unknown_ids():
    with pytest.raises(ValueError, match="labels holds the id 5; lut has 3 entries"):
        apply(np.arange(3, dtype=np.uint32), np.array([[[1, 5]]]))
