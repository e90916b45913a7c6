"""Crops: ids, grey values, connected parts."""

import numpy as np
import pytest
import skimage.measure

from emjax.data import crops
from emjax.errors import UserError


def test_grey_values_survive_the_way_to_float_and_back():
    greys = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(crops.as_uint8(crops.as_float(greys)), greys)
    np.testing.assert_array_equal(crops.as_uint8(np.array([[[-0.5, 0.0, 1.0, 2.0]]], np.float32)), [[[0, 0, 255, 255]]])


def test_large_ids_are_renumbered_and_small_ones_kept():
    small = np.array([[[0, 5, 2**31 - 1]]], np.uint64)
    np.testing.assert_array_equal(crops.as_int32_ids(small), small)
    large = np.array([[[0, 2**40, 7, 2**40]]], np.uint64)
    np.testing.assert_array_equal(crops.as_int32_ids(large), [[[0, 2, 1, 2]]])
    np.testing.assert_array_equal(crops.as_int32_ids(large[..., 1:]), [[[2, 1, 2]]])
    assert crops.as_int32_ids(large).dtype == np.int32
    with pytest.raises(UserError, match="float32"):
        crops.as_int32_ids(np.zeros((1, 1, 1), np.float32))


@pytest.mark.parametrize("connectivity", [6, 26])
def test_parts_equal_those_of_scikit_image(connectivity):
    labels = np.random.default_rng(0).integers(0, 4, (9, 13, 11)).astype(np.int32)
    want = skimage.measure.label(labels, connectivity={6: 1, 26: 3}[connectivity], background=0)
    np.testing.assert_array_equal(crops.split_components(labels, connectivity), want)


def test_parts_equal_the_reference(oracles):
    with np.load(oracles / "agq" / "targets.npz") as file:
        np.testing.assert_array_equal(crops.split_components(file["raw_label"]), file["split_label"])


def test_centre_crop():
    sample = {"image": np.arange(5 * 6 * 4).reshape(5, 6, 4)}
    out = crops.centre_crop(sample, (2, 6, 3))["image"]
    np.testing.assert_array_equal(out, sample["image"][1:3, :, 0:3])
    with pytest.raises(ValueError, match="smaller"):
        crops.centre_crop(sample, (6, 6, 4))
