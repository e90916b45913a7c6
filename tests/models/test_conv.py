import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from emjax.models.layers import conv
from emjax.models.layers.conv import _native, conv3d, depthwise_conv3d, same_pads, upconv3d
from emjax.models.layers.interpolate import max_pool, resize_linear, upsample_linear

CASES = [
    ((3, 3, 3), (1, 1, 1)),
    ((1, 3, 3), (1, 1, 1)),
    ((1, 5, 5), (1, 2, 2)),
    ((3, 1, 1), (1, 1, 1)),
    ((1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2)),
    ((3, 1, 1), (2, 1, 1)),
    ((2, 2, 2), (2, 2, 2)),
]


def _random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@pytest.fixture(autouse=True)
def planewise_for_all_sizes(monkeypatch):
    monkeypatch.setattr(conv, "SMALL", 0)


@pytest.mark.parametrize(("kernel_size", "strides"), CASES)
@pytest.mark.parametrize("padding", ["zero", "replicate", "valid"])
def test_planewise_equals_native_in_value_and_gradient(kernel_size, strides, padding):
    x, kernel = _random(2, 5, 9, 8, 3), _random(*kernel_size, 3, 4)

    def native(x, kernel):
        pads = same_pads(kernel_size) if padding != "valid" else ((0, 0),) * 3
        if padding == "replicate":
            x, pads = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge"), ((0, 0),) * 3
        return _native(x, kernel, strides, pads)

    with jax.default_matmul_precision("highest"):
        want, want_vjp = jax.vjp(native, x, kernel)
        got, got_vjp = jax.vjp(lambda x, kernel: conv3d(x, kernel, strides, padding), x, kernel)
        cotangent = _random(*want.shape)
        np.testing.assert_allclose(got, want, atol=2e-5)
        for ours, theirs in zip(got_vjp(cotangent), want_vjp(cotangent)):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_one_native_convolution(platform):
    exported = jax.export.export(jax.jit(conv3d), platforms=[platform])(
        jax.ShapeDtypeStruct((1, 4, 8, 8, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 2, 2), jnp.float32)
    )
    assert exported.mlir_module().count("= stablehlo.convolution(") == 1


def test_depthwise_equals_grouped():
    x, kernel = _random(1, 4, 6, 5, 3), _random(3, 3, 3, 3)
    want = lax.conv_general_dilated(
        x, kernel[..., None, :], (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), feature_group_count=3
    )
    np.testing.assert_allclose(depthwise_conv3d(x, kernel), want, atol=1e-5)


def test_upconv_puts_each_tap_at_its_place():
    x, kernel = _random(1, 2, 2, 3, 2), _random(1, 2, 2, 2, 5)
    out = upconv3d(x, kernel)
    assert out.shape == (1, 2, 4, 6, 5)
    for b, c in itertools.product(range(2), range(2)):
        np.testing.assert_allclose(out[:, :, b::2, c::2], x @ kernel[0, b, c], atol=1e-5)


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (1, 4, 4), (3, 1, 2)])
def test_upsampling_equals_resize(factors):
    x = _random(1, 3, 4, 5, 2)
    shape = tuple(size * factor for size, factor in zip(x.shape[1:4], factors))
    np.testing.assert_allclose(upsample_linear(x, factors), resize_linear(x, shape), atol=1e-6)


def test_resize_by_hand():
    line = jnp.arange(3.0).reshape(1, 1, 1, 3, 1)
    np.testing.assert_allclose(resize_linear(line, (1, 1, 5), align_corners=True).ravel(), [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(resize_linear(line, (1, 1, 6)).ravel(), [0, 0.25, 0.75, 1.25, 1.75, 2])


@pytest.mark.parametrize("shape", [(4, 6, 6), (5, 7, 6)])
def test_max_pool_rounds_down(shape):
    x = _random(1, *shape, 2)
    want = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool(x, (2, 2, 2)), want)
