import jax.numpy as jnp
import numpy as np
import pytest

from emjax.data.hog import hog_histogram, hog_image


@pytest.mark.parametrize("shape", [(16, 24), (13, 18)])
def test_equals_scikit_image(shape):
    hog = pytest.importorskip("skimage.feature").hog
    image = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.float32) / 255
    got = np.asarray(hog_image(jnp.asarray(image)))
    for section, mine in zip(image, got):
        _, want = hog(section, 9, (4, 4), (1, 1), visualize=True)
        np.testing.assert_allclose(mine, want, atol=1e-6)


def test_a_step_falls_into_one_bin():
    image = np.zeros((8, 8), np.float32)
    image[:, 4:] = 1
    histogram = np.asarray(hog_histogram(jnp.asarray(image)))
    # A step along x: gradients of 1 in the columns 3 and 4, at 0 degrees.
    assert histogram[..., 0].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert histogram[..., 1:].max() == 0
