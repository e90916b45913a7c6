"""Position encodings: values that are known, and rotations that keep lengths and relative angles."""

import jax.numpy as jnp
import numpy as np

from emjax.models.layers.position import fourier_features, rotary_table, rotate, sine_of_scalar, sine_position


def test_sine_position_ends_at_two_pi_and_has_y_first():
    table = np.asarray(sine_position(4, 6, 8))
    assert table.shape == (4, 6, 8)
    assert np.allclose(table[-1, :, 0], np.sin(2 * np.pi), atol=1e-5)
    assert np.allclose(table[0, :, 0], np.sin(np.pi / 2), atol=1e-5)
    assert np.allclose(table[:, 2, 4], np.sin(np.pi), atol=1e-5)


def test_scalar_encoding_is_sines_then_cosines():
    got = np.asarray(sine_of_scalar(jnp.asarray([0.0, 1.0]), 8))
    assert np.allclose(got[0], [0] * 4 + [1] * 4)
    assert np.allclose(got[1, [0, 1]], np.sin(1))


def test_fourier_features_of_the_centre():
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)
    assert np.allclose(fourier_features(jnp.asarray([0.5, 0.5]), matrix), [0] * 5 + [1] * 5, atol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_differences_only():
    height, width, features = 3, 5, 16
    cosine, sine = rotary_table(height, width, features)
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal(features), jnp.float32) for _ in range(2))
    tokens = height * width
    q = np.asarray(rotate(jnp.broadcast_to(query, (tokens, features)), cosine, sine)).reshape(height, width, -1)
    k = np.asarray(rotate(jnp.broadcast_to(key, (tokens, features)), cosine, sine)).reshape(height, width, -1)
    assert np.allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(query), rtol=1e-5)
    assert np.isclose(q[0, 1] @ k[1, 3], q[1, 2] @ k[2, 4], rtol=1e-4)
    assert not np.isclose(q[0, 1] @ k[1, 3], q[0, 1] @ k[2, 3], rtol=1e-3)
