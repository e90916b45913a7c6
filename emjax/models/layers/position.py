"""Position encodings: sine tables, random Fourier features, axial rotary tables."""

import jax
import jax.numpy as jnp
import numpy as np


def _sine_axis(coordinate: np.ndarray, features: int, temperature: float) -> np.ndarray:
    """(n, features): channel 2j is the sine, 2j+1 the cosine, of coordinate / temperature^(2j / features)."""
    frequency = temperature ** (2 * (np.arange(features) // 2) / features)
    angle = coordinate[:, None] / frequency
    return np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def sine_position(height: int, width: int, features: int, temperature: float = 10000.0) -> jax.Array:
    """(height, width, features) float32 sine encoding of DETR as SAM 2 uses it: first y, then x.

    Coordinates are counted from 1 and scaled so that the last one is two pi.
    """
    half = features // 2

    def axis(n: int) -> np.ndarray:
        return _sine_axis(np.arange(1, n + 1) / (n + 1e-6) * 2 * np.pi, half, temperature)

    rows = jnp.broadcast_to(jnp.asarray(axis(height))[:, None], (height, width, half))
    columns = jnp.broadcast_to(jnp.asarray(axis(width))[None], (height, width, half))
    return jnp.concatenate([rows, columns], axis=-1)


def pixel_position(height: int, width: int, features: int, temperature: float = 10000.0) -> jax.Array:
    """(height, width, features) float32 sine encoding of whole pixels counted from 0: first y, then x (SAM4EM)."""
    half = features // 2
    rows, columns = (jnp.asarray(_sine_axis(np.arange(n), half, temperature)) for n in (height, width))
    shape = (height, width, half)
    return jnp.concatenate([jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)], axis=-1)


def sine_of_scalar(value: jax.Array, features: int, temperature: float = 10000.0) -> jax.Array:
    """(..., features) encoding of scalars: all sines, then all cosines (SAM 2's object pointers)."""
    half = features // 2
    frequency = jnp.asarray(temperature ** (2 * (np.arange(half) // 2) / half), jnp.float32)
    angle = value[..., None].astype(jnp.float32) / frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def fourier_features(unit: jax.Array, matrix: jax.Array) -> jax.Array:
    """(..., 2 n) random Fourier features of points ``unit`` (..., d) in [0, 1] with ``matrix`` (d, n); float32."""
    centred = 2 * unit.astype(jnp.float32) - 1
    angle = 2 * np.pi * jnp.matmul(centred, matrix.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rotary_table(height: int, width: int, features: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (height * width, features / 2) each, of an axial rotary encoding on a raster grid.

    The first half of the channel pairs turns with x, the second with y (RoFormer in two dimensions, as SAM 2 has it).
    """
    frequency = theta ** (-np.arange(0, features, 4)[: features // 4] / features)
    index = np.arange(height * width)
    x, y = index % width, index // width
    angle = np.concatenate([x[:, None] * frequency, y[:, None] * frequency], axis=1)
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates neighbouring channel pairs (2j, 2j + 1) of ``x`` (..., tokens, features); float32 inside, dtype kept."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
