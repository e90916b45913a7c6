"""Resizing of slices; that it equals OpenCV bit for bit is checked by the parity of SAM4EM's preprocessing."""

import numpy as np
import pytest
import scipy.ndimage

from emjax.data.slices import resize_grey, resize_labels, zoom_labels


def grey(shape=(30, 26)):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_grey_values_are_interpolated_between_pixel_centres():
    image = np.uint8([[0, 100], [0, 100]])
    # The first row is cut off twice, so that it may be one lower.
    assert resize_grey(image, (4, 4))[1].tolist() == [0, 25, 75, 100]
    found, exact = resize_grey(grey(), (50, 60)), scipy.ndimage.zoom(grey().astype(float), 1)
    assert found.shape == (50, 60)
    assert abs(float(found.mean()) - exact.mean()) < 3


def test_same_size_changes_nothing():
    assert np.array_equal(resize_grey(grey(), (30, 26)), grey())
    assert np.array_equal(resize_labels(grey(), (30, 26)), grey())
    assert np.array_equal(zoom_labels(grey(), (30, 26)), grey())


def test_labels_take_the_pixel_before_or_the_corners():
    assert resize_labels(np.arange(6)[None], (1, 3)).tolist() == [[0, 2, 4]]
    assert resize_labels(np.arange(3)[None], (1, 6)).tolist() == [[0, 0, 1, 1, 2, 2]]
    labels = grey((40, 24))
    assert np.array_equal(zoom_labels(labels, (10, 6)), scipy.ndimage.zoom(labels, 0.25, order=0))


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="float32 of 2 axes"):
        resize_grey(grey().astype(np.float32), (8, 8))
