"""Voxel losses in float32. Weights (a mask, class balancing, or both) broadcast against the values.

Every loss is a weighted mean; where all weights are zero it is 0, not NaN, so that a crop without a counting voxel
changes nothing.
"""

import jax
import jax.numpy as jnp
import optax


def weighted_mean(values: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Sum of ``values * weights`` over the sum of the (broadcast) weights; plain mean without weights."""
    values = values.astype(jnp.float32)
    if weights is None:
        return values.mean()
    weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-6)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of logits against targets in [0, 1]; any equal shapes, a float32 scalar."""
    return weighted_mean(optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets), weights)


def mean_squared_error(predictions: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Squared error of predictions (probabilities, not logits) against targets."""
    return weighted_mean(jnp.square(predictions.astype(jnp.float32) - targets), weights)


def dice(
    probabilities: jax.Array, targets: jax.Array, weights: jax.Array | None = None, smooth: float = 1.0
) -> jax.Array:
    """1 - (2 sum(p t) + s) / (sum(p^2) + sum(t^2) + s) per channel (the last axis), then the mean over channels.

    The squared form of V-Net (Milletari et al. 2016, eq. 1).
    """
    probabilities, targets = probabilities.astype(jnp.float32), targets.astype(jnp.float32)
    weights = jnp.ones_like(targets) if weights is None else jnp.broadcast_to(weights, targets.shape)
    axes = tuple(range(targets.ndim - 1))
    overlap = (weights * probabilities * targets).sum(axes)
    sizes = (weights * (jnp.square(probabilities) + jnp.square(targets))).sum(axes)
    return (1 - (2 * overlap + smooth) / (sizes + smooth)).mean()


def linear_dice(
    probabilities: jax.Array, targets: jax.Array, weights: jax.Array | None = None, smooth: float = 1.0
) -> jax.Array:
    """1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s) per channel (the last axis), then the mean over channels (SAM4EM)."""
    probabilities, targets = probabilities.astype(jnp.float32), targets.astype(jnp.float32)
    weights = jnp.ones_like(targets) if weights is None else jnp.broadcast_to(weights, targets.shape)
    axes = tuple(range(targets.ndim - 1))
    overlap = (weights * probabilities * targets).sum(axes)
    sizes = (weights * (probabilities + targets)).sum(axes)
    return (1 - (2 * overlap + smooth) / (sizes + smooth)).mean()
