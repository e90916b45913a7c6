"""Linear interpolation of volumes (batch, z, y, x, channel), equal to PyTorch's, without gathers along long axes."""

import jax
import jax.numpy as jnp
import numpy as np

Triple = tuple[int, int, int]


def _source(size: int, target: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = np.arange(target, dtype=np.float64)
    if align_corners:
        position = index * ((size - 1) / (target - 1)) if target > 1 else np.zeros(1)
    else:
        position = np.maximum((index + 0.5) * (size / target) - 0.5, 0.0)
    low = np.minimum(np.floor(position).astype(np.int32), size - 1)
    return low, np.minimum(low + 1, size - 1), position - low


def _resize_axis(x: jax.Array, axis: int, target: int, align_corners: bool) -> jax.Array:
    size = x.shape[axis]
    if size == target:
        return x
    low, high, weight = _source(size, target, align_corners)
    weight = weight.reshape([-1 if dim == axis else 1 for dim in range(x.ndim)]).astype(x.dtype)
    return jnp.take(x, low, axis) * (1 - weight) + jnp.take(x, high, axis) * weight


def resize_linear(x: jax.Array, shape: Triple, *, align_corners: bool = False) -> jax.Array:
    """Trilinear resize of (b, z, y, x, c) to ``shape`` (z, y, x), as ``torch.nn.functional.interpolate``.

    No anti-aliasing when shrinking. Computed one axis after the other.
    """
    # The axis that shrinks most goes first and the one that grows most last, so that the middle results stay small.
    order = sorted(range(3), key=lambda axis: shape[axis] / x.shape[axis + 1])
    for axis in order:
        x = _resize_axis(x, axis + 1, shape[axis], align_corners)
    return x


def _upsample_axis(x: jax.Array, axis: int, factor: int) -> jax.Array:
    if factor == 1:
        return x
    before = jnp.concatenate(
        [jax.lax.slice_in_dim(x, 0, 1, axis=axis), jax.lax.slice_in_dim(x, 0, -1 % x.shape[axis], axis=axis)], axis
    )
    after = jnp.concatenate(
        [jax.lax.slice_in_dim(x, 1, None, axis=axis), jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis)], axis
    )
    phases = []
    for phase in range(factor):
        position = (phase + 0.5) / factor - 0.5
        near, weight = (before, -position) if position < 0 else (after, position)
        phases.append(x * (1 - weight) + near * weight)
    shape = (*x.shape[:axis], x.shape[axis] * factor, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis + 1).reshape(shape)


def upsample_linear(x: jax.Array, factors: Triple) -> jax.Array:
    """Trilinear upsampling by whole factors (half-pixel centres), as a blend of shifted copies.

    Equal to :func:`resize_linear` without ``align_corners``; partitions over devices without an all-gather.
    """
    for axis, factor in enumerate(factors):
        x = _upsample_axis(x, axis + 1, factor)
    return x


def max_pool(x: jax.Array, window: Triple) -> jax.Array:
    """Max-pooling with stride = window, sizes rounded down (b, z, y, x, c)."""
    if all(size % step == 0 for size, step in zip(x.shape[1:4], window)):
        batch, depth, height, width, channels = x.shape
        a, b, c = window
        return x.reshape(batch, depth // a, a, height // b, b, width // c, c, channels).max((2, 4, 6))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *window, 1), "VALID")
