"""Resampling equals PyTorch's."""

import jax.numpy as jnp
import numpy as np
import pytest

from emjax.models.layers.resize import matrix, resize, upsample_nearest

SIZES = [((16, 16), (64, 64)), ((13, 20), (50, 33)), ((40, 30), (11, 24)), ((256, 256), (300, 400)), ((7, 7), (56, 72))]


@pytest.mark.parametrize(("size", "out"), SIZES)
@pytest.mark.parametrize(
    ("method", "antialias"), [("nearest", False), ("bilinear", False), ("bilinear", True), ("bicubic", False)]
)
def test_equals_torch(size, out, method, antialias):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, *size, 3), dtype=np.float32)
    corners = None if method == "nearest" else False
    want = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(x, -1, 1)), size=out, mode=method, align_corners=corners, antialias=antialias
    )
    got = np.moveaxis(np.asarray(resize(jnp.asarray(x), out, method, antialias=antialias)), -1, 1)
    assert np.abs(got - want.numpy()).max() < 1e-5


def test_weights_of_a_row_sum_to_one():
    for method, antialias in (("bilinear", False), ("bilinear", True), ("bicubic", False)):
        assert np.allclose(matrix(17, 40, method, antialias).sum(1), 1, atol=1e-6)


def test_keeps_half_precision_and_any_axes():
    x = jnp.ones((4, 6, 2), jnp.bfloat16)
    assert resize(x, (8,), axes=(0,)).dtype == jnp.bfloat16
    assert resize(x, (3,), axes=(1,)).shape == (4, 3, 2)
    assert resize(jnp.ones((2, 2), jnp.uint8), (4, 4), axes=(0, 1)).dtype == jnp.float32


def test_nearest_by_a_whole_factor_repeats():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    assert np.array_equal(upsample_nearest(x, 2), resize(x, (4, 6), "nearest"))


@pytest.mark.parametrize(("method", "antialias"), [("lanczos", False), ("bicubic", True)])
def test_unknown_method(method, antialias):
    with pytest.raises(ValueError, match=r"method|antialias"):
        resize(jnp.ones((1, 4, 4, 1)), (8, 8), method, antialias=antialias)
