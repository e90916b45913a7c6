import math

import numpy as np
import pytest
from skimage.metrics import adapted_rand_error
from skimage.metrics import variation_of_information as skimage_voi

from emjax.metrics import (
    adapted_rand_cremi,
    adapted_rand_skimage,
    border_mask,
    contingency,
    fill_unlabelled,
    normalised_information,
    rand_split_merge,
    score,
    score_table,
    variation_of_information,
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ignore", [(0,), ()])
def test_equal_to_scikit_image(seed, ignore):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 6, (3, 20, 21))
    segmentation = np.where(generator.random(labels.shape) < 0.8, labels + 1, generator.integers(0, 9, labels.shape))
    table = contingency(segmentation, labels)
    voi = variation_of_information(table, ignore)
    np.testing.assert_allclose(
        (voi.split, voi.merge), skimage_voi(labels, segmentation, ignore_labels=ignore), atol=1e-12
    )
    rand = adapted_rand_skimage(table, ignore)
    np.testing.assert_allclose(
        (rand.error, rand.precision, rand.recall),
        adapted_rand_error(labels, segmentation, ignore_labels=ignore),
        atol=1e-12,
    )


def test_same_partition_with_other_names_is_perfect():
    labels = np.random.default_rng(0).integers(1, 5, (4, 8, 8))
    scores = score(labels * 10 + 3, labels)
    assert scores.voi_sum == scores.arand_skimage == scores.arand_cremi == scores.cremi_score == 0
    assert scores.rand_split == scores.rand_merge == 1
    assert scores.nid == pytest.approx(0)
    assert scores.objects == scores.segments == 4


def test_definitions_of_precision_are_swapped():
    # One segment over two objects: only merges.
    labels = np.repeat([1, 2], 50).reshape(1, 10, 10)
    table = contingency(np.ones_like(labels), labels)
    assert variation_of_information(table).split == 0
    assert variation_of_information(table).merge == pytest.approx(1.0)
    assert adapted_rand_skimage(table).precision == 1
    assert adapted_rand_skimage(table).recall < 0.6
    assert adapted_rand_cremi(table).precision == pytest.approx(0.5)
    assert adapted_rand_cremi(table).recall == 1
    assert rand_split_merge(table).merge == pytest.approx(0.5)


def test_nothing_to_score_is_nan():
    labels = np.zeros((2, 3, 3), int)
    scores = score(labels, labels)
    assert math.isnan(scores.voi_sum)
    assert math.isnan(scores.arand_skimage)
    assert math.isnan(scores.arand_cremi)
    assert math.isnan(normalised_information(contingency(labels, labels)).nid)
    assert scores.voxels == 0


def test_scores_add_over_blocks():
    generator = np.random.default_rng(5)
    labels, segmentation = generator.integers(0, 4, (2, 6, 10, 10))
    table = contingency(segmentation[:2], labels[:2]) + contingency(segmentation[2:], labels[2:], offset=(2, 0, 0))
    assert score_table(table) == score(segmentation, labels)


def test_mask_leaves_voxels_out():
    labels = np.array([[[1, 1, 2, 2]]])
    segmentation = np.array([[[1, 1, 1, 2]]])
    assert score(segmentation, labels).voi_sum > 0
    assert score(segmentation, labels, np.array([[[1, 1, 0, 1]]])).voi_sum == 0


def test_ignored_ids_such_as_cremis():
    ignore = 2**64 - 1
    labels = np.array([[[1, ignore, 2, 2]]], np.uint64)
    segmentation = np.array([[[1, 2, 2, 2]]])
    assert score(segmentation, labels, ignore=(0, ignore)).voi_sum == 0


def test_border_mask_counts_world_units():
    labels = np.ones((2, 9, 9), int)
    labels[0, :, 5:] = 2
    pixels = border_mask(labels, 1)
    assert np.array_equal(pixels, border_mask(labels, 4, voxel_size=(40, 4, 4)))
    assert np.array_equal(np.flatnonzero(pixels[0, 0]), [3, 4, 5, 6])
    assert not pixels[1].any()
    # Anisotropic pixels: 8 nm reach two pixels along x, 4 nm each, but one along y, 8 nm.
    point = np.ones((1, 9, 9), int)
    point[0, 4, 4] = 2
    mask = border_mask(point, 8, voxel_size=(40, 8, 4))[0]
    assert mask[4].sum() == 7
    assert mask[:, 4].sum() == 5
    with pytest.raises(ValueError, match="distance is -1"):
        border_mask(labels, -1)
    with pytest.raises(ValueError, match="voxel_size is"):
        border_mask(labels, 1, voxel_size=(1, 0, 1))


def test_fill_gives_unlabelled_voxels_to_the_nearest_segment():
    segmentation = np.array([[[1, 0, 0, 0, 0, 2]]], np.uint32)
    assert fill_unlabelled(segmentation).tolist() == [[[1, 1, 1, 2, 2, 2]]]
    assert fill_unlabelled(segmentation, max_distance=1).tolist() == [[[1, 1, 0, 0, 2, 2]]]
    assert fill_unlabelled(segmentation, mask=np.array([[[1, 1, 0, 1, 0, 1]]])).tolist() == [[[1, 1, 0, 2, 0, 2]]]
    columns = np.array([[[1], [0]], [[2], [0]]], np.uint8)
    assert fill_unlabelled(columns, voxel_size=(40, 4, 4))[:, 1, 0].tolist() == [1, 2]
    assert not fill_unlabelled(np.zeros((2, 2, 2), int)).any()
