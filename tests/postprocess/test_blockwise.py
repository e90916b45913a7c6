"""Whatever the shape of the blocks, the block-wise result is that of the whole volume, voxel for voxel."""

import concurrent.futures

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes_for_tests import affinity_volumes

from emjax.postprocess import (
    Block,
    agglomerate,
    apply,
    block_border,
    block_fragments,
    grid,
    label_components,
    label_components_blockwise,
    merge_blocks,
    merge_blocks_blockwise,
    parse_score,
    region_graph,
    segment_blockwise,
    unique_ids,
    watershed,
)

BLOCKS = st.tuples(*[st.integers(1, 6)] * 3)


def whole(affinities, threshold, score, low, high):
    fragments = watershed(affinities, low, high)
    tree = agglomerate(region_graph(affinities, fragments, parse_score(score).statistics()), threshold, score=score)
    return fragments, apply(tree.cut(), fragments)


@settings(max_examples=120, deadline=None)
@given(
    affinity_volumes(longest=9, uint8=True), BLOCKS, st.sampled_from([(0.0001, 0.9999), (0.1, 0.6), (0.2, 0.9)]),
    st.sampled_from(["mean", "hist_quant_50", "hist_quant_75_initmax", "max"]),
)  # fmt: skip
def test_equal_to_the_whole(affinities, block, limits, score):
    expected_fragments, expected = whole(affinities, 0.5, score, *limits)
    fragments = np.empty(affinities.shape[1:], np.uint32)
    low, high = limits
    found, _ = segment_blockwise(affinities, block, 0.5, low=low, high=high, score=score, fragments=fragments)
    np.testing.assert_array_equal(fragments, expected_fragments)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("uint8", [False, True])
def test_larger_volume_on_threads(uint8):
    rng = np.random.default_rng(3)
    affinities = rng.random((3, 20, 50, 45), dtype=np.float32)
    if uint8:
        affinities = np.round(affinities * 30).astype(np.uint8) * np.uint8(8)
    expected_fragments, expected = whole(affinities, 0.4, "mean", 0.0001, 0.9999)
    fragments = np.empty(affinities.shape[1:], np.uint64)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found, tree = segment_blockwise(affinities, (8, 16, 20), [0.2, 0.4], fragments=fragments, map_=pool.map)
    np.testing.assert_array_equal(fragments, expected_fragments)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(apply(tree.cut(0.2), fragments), whole(affinities, 0.2, "mean", 0.0001, 0.9999)[1])


def test_plateau_through_every_block():
    affinities = np.full((3, 9, 9, 9), 128, np.uint8)
    affinities[2, 4, 4, 5] = 200  # The only outlet.
    affinities[0, 8, 0, 0] = 180
    fragments = np.empty((9, 9, 9), np.uint32)
    segment_blockwise(affinities, (2, 3, 4), 0.5, fragments=fragments)
    np.testing.assert_array_equal(fragments, watershed(affinities))


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 8)] * 3), BLOCKS, st.integers(0, 2**31), st.sampled_from([6, 26]))
def test_components(shape, block, seed, connectivity):
    labels = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint16)
    found, count = label_components_blockwise(labels, block, connectivity)
    expected = label_components(labels, connectivity)
    np.testing.assert_array_equal(found, expected)
    assert count == expected.max()


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(2, 8)] * 3), BLOCKS, st.integers(0, 2**31))
def test_block_merge(shape, block, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, shape)
    border = block_border(shape, [range(0, n, 3) for n in shape])
    affinities = rng.random((3, *shape), dtype=np.float32)
    expected = merge_blocks(affinities, labels, border, threshold=0.6, ties="canonical")
    found, _ = merge_blocks_blockwise(affinities, labels, border, block, threshold=0.6)
    np.testing.assert_array_equal(found, expected)


def test_border_of_blocks():
    border = block_border((4, 5, 6), [[0, 2], [0], [0, 3]])
    assert border[0].any(axis=(1, 2)).tolist() == [True, False, True, False]
    assert border[1].any(axis=(0, 2)).tolist() == [True, False, False, False, False]
    assert border[2].any(axis=(0, 1)).tolist() == [True, False, False, True, False, False]


def test_unique_ids():
    labels = np.array([0, 1, 2], np.uint32)
    assert unique_ids(labels, 3).tolist() == [0, (3 << 27) + 1, (3 << 27) + 2]
    with pytest.raises(ValueError, match="blocks below"):
        unique_ids(labels, 1 << 26)


def test_wrong_halo():
    block = grid((8, 8, 8), (4, 4, 4))[0, 0, 0]
    assert block.with_halo() == Block((0, 0, 0), (6, 6, 6), (8, 8, 8))
    with pytest.raises(ValueError, match=r"affinities has shape \(4, 4, 4\).*expected \(6, 6, 6\)"):
        block_fragments(np.zeros((3, 4, 4, 4), np.float32), block)
