"""Batch normalisation with PyTorch's running statistics, of all entries or of those that count."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class MaskedBatchNorm(nnx.Module):
    """Batch norm over all but the last axis that leaves masked entries out, in float32.

    Statistics are those of the whole batch (over all devices, when the batch is sharded), or of each volume; running
    ones follow PyTorch: ``momentum`` is the weight of the new value, and the running variance is unbiased.
    """

    def __init__(self, features: int, epsilon: float, momentum: float, per_volume: bool, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.epsilon = epsilon
        self.momentum = momentum
        self.per_volume = per_volume

    def _statistics(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        axes = tuple(range(1 if self.per_volume else 0, x.ndim - 1))
        weights = jnp.ones((1,) * x.ndim, jnp.float32) if mask is None else mask.astype(jnp.float32)
        repeats = np.prod([x.shape[axis] for axis in axes if weights.shape[axis] == 1])
        count = weights.sum(axes, keepdims=True) * repeats
        total = jnp.maximum(count, 1)
        mean = (x * weights).sum(axes, keepdims=True) / total
        var = (jnp.square(x - mean) * weights).sum(axes, keepdims=True) / total
        unbiased = var * (count / jnp.maximum(count - 1, 1))

        def average(value: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(value.reshape(-1, x.shape[-1]).mean(0))

        # Without a single valid entry there is nothing to learn a running value from.
        seen = jnp.any(count > 0)
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            moved = (1 - self.momentum) * running[...] + self.momentum * average(new)
            running.set_value(jnp.where(seen, moved, running[...]))
        return mean, var

    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """``x`` (b, ..., features); ``mask`` broadcastable to it, with a last axis of 1, nonzero where it counts."""
        x = x.astype(jnp.float32)
        mean, var = self._statistics(x, mask) if train else (self.mean[...], self.var[...])
        return (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * self.scale[...]) + self.bias[...]
