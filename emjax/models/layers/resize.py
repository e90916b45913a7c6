"""Resampling along chosen axes, equal to ``torch.nn.functional.interpolate`` with ``align_corners=False``.

``jax.image.resize`` renormalises at the borders and uses another cubic kernel, so the weights are built here: one small
(out, in) matrix per axis, applied as a matrix product.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("nearest", "bilinear", "bicubic")


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel with PyTorch's ``a = -0.75``."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=256)
def matrix(size: int, out: int, method: str = "bilinear", antialias: bool = False) -> np.ndarray:
    """The (out, size) float32 matrix that resamples one axis.

    Pixel centres are at half integers. Without antialiasing, taps beyond the border take the border's pixel; with it,
    the triangle is stretched by the down-scaling factor and the weights inside the image are normalised.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if antialias and method != "bilinear":
        raise ValueError(f"antialias is only there for bilinear, not for {method}")
    scale = size / out
    # The factor is rounded to float32 as in PyTorch: in large images that is visible in the weights.
    single = float(np.float32(size) / np.float32(out))
    rows = np.arange(out)
    weights = np.zeros((out, size))
    if method == "nearest":
        weights[rows, np.minimum((rows * scale).astype(int), size - 1)] = 1
        return weights.astype(np.float32)
    if antialias:
        centre = (single * (rows + 0.5)).astype(np.float32).astype(float)
        stretch = max(scale, 1.0)
        first = np.maximum((centre - stretch + 0.5).astype(int), 0)
        last = np.minimum((centre + stretch + 0.5).astype(int), size)
        columns = np.arange(size)
        triangle = np.maximum(0.0, 1 - np.abs(columns[None] - centre[:, None] + 0.5) / stretch)
        weights = triangle * ((columns >= first[:, None]) & (columns < last[:, None]))
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    source = ((rows + 0.5) * single - 0.5).astype(np.float32)
    if method == "bilinear":
        source = np.maximum(source, 0.0)
        base = np.floor(source).astype(int)
        taps = [(0, 1 - (source - base)), (1, source - base)]
    else:
        base = np.floor(source).astype(int)
        taps = [(tap, _cubic(source - base - tap)) for tap in (-1, 0, 1, 2)]
    for tap, weight in taps:
        np.add.at(weights, (rows, np.clip(base + tap, 0, size - 1)), weight)
    return weights.astype(np.float32)


def resize(
    x: jax.Array,
    size: Sequence[int],
    method: str = "bilinear",
    *,
    axes: Sequence[int] = (-3, -2),
    antialias: bool = False,
) -> jax.Array:
    """Resamples ``axes`` of ``x`` (by default rows and columns of (..., row, column, channel)) to ``size``.

    Computed in float32 with full-precision products whatever the matrix precision of the platform; the dtype of a
    floating-point ``x`` is kept, integers become float32. Raises ``ValueError`` for an unknown method.
    """
    if len(size) != len(axes):
        raise ValueError(f"size {tuple(size)} and axes {tuple(axes)} differ in length")
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    y = x.astype(jnp.float32)
    for axis, out in zip(axes, size):
        axis %= x.ndim
        if x.shape[axis] == out:
            continue
        weights = jnp.asarray(matrix(x.shape[axis], int(out), method, antialias))
        y = jnp.moveaxis(jnp.tensordot(weights, y, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
    return y.astype(dtype)


def upsample_nearest(x: jax.Array, factor: int, axes: Sequence[int] = (-3, -2)) -> jax.Array:
    """Repeats every element ``factor`` times along ``axes``."""
    for axis in axes:
        x = jnp.repeat(x, factor, axis=axis)
    return x
