"""Small modules that several parts of SAM 2 share."""

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.attention import attend, merge_heads, split_heads
from emjax.models.layers.lora import Adapters, LoRA


class Keys:
    """Stands in for ``nnx.Rngs`` while a network is built.

    It counts in Python; the counter of ``nnx.Rngs`` is a traced variable, whose every change searches the whole trace,
    so that building a large network takes half a minute.
    """

    def __init__(self, rngs: "nnx.Rngs | Keys"):
        self._key, self._count = rngs.params(), 0

    def params(self) -> jax.Array:
        """A fresh key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def counted(rngs: nnx.Rngs) -> nnx.Rngs:
    """:class:`Keys`, typed as what it stands in for."""
    return cast(nnx.Rngs, Keys(rngs))


def linear(inputs: int, outputs: int, dtype: str, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=jnp.dtype(dtype), rngs=rngs)


def layer_norm(features: int, epsilon: float, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Over the last axis, statistics in float32, variance in two passes as PyTorch computes it."""
    return nnx.LayerNorm(features, epsilon=epsilon, use_fast_variance=False, dtype=jnp.dtype(dtype), rngs=rngs)


def convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    dtype: str,
    rngs: nnx.Rngs,
    init: Callable = nnx.initializers.lecun_normal(),
) -> nnx.Conv:
    """2-D convolution, channels last, symmetric zero padding (not ``SAME``, which is lopsided for strides)."""
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        kernel_init=init,
        dtype=jnp.dtype(dtype),
        rngs=rngs,
    )


class Upsampling(nnx.Module):
    """Transposed convolution with kernel 2 and stride 2: a matrix product and a pixel shuffle."""

    def __init__(self, inputs: int, outputs: int, dtype: str, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=2, out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, h, w, inputs) to (batch, 2 h, 2 w, outputs)."""
        batch, height, width, _ = x.shape
        dtype = jnp.dtype(self.dtype)
        shuffled = jnp.einsum("bhwi,klio->bhkwlo", x.astype(dtype), self.kernel[...].astype(dtype))
        return shuffled.reshape(batch, 2 * height, 2 * width, -1) + self.bias[...].astype(dtype)


class MLP(nnx.Module):
    """Linear layers with an activation between them; ``sigmoid`` at the end if asked."""

    def __init__(
        self,
        sizes: Sequence[int],
        dtype: str,
        rngs: nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        sigmoid: bool = False,
    ):
        self.layers = nnx.List([linear(a, b, dtype, rngs) for a, b in itertools.pairwise(sizes)])
        self.activation = activation
        self.sigmoid = sigmoid

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in list(self.layers)[:-1]:
            x = self.activation(layer(x))
        x = self.layers[-1](x)
        return jax.nn.sigmoid(x) if self.sigmoid else x


class Attention(nnx.Module):
    """Multi-head attention with separate projections and an inner width of its own."""

    def __init__(
        self,
        features: int,
        inner: int,
        heads: int,
        dtype: str,
        rngs: nnx.Rngs,
        attention: str,
        keys: int | None = None,
        lora: LoRA | None = None,
    ):
        self.q_proj = linear(features, inner, dtype, rngs)
        self.k_proj = linear(keys or features, inner, dtype, rngs)
        self.v_proj = linear(keys or features, inner, dtype, rngs)
        self.out_proj = linear(inner, features, dtype, rngs)
        self.adapted = lora is not None
        if lora is not None:
            widths = {"q": features, "k": keys or features, "v": keys or features}
            self.lora = Adapters(lora, widths, inner, dtype, rngs)
        self.heads = heads
        self.attention = attention

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """(batch, tokens, features) attending to (batch, keys, features)."""
        given = {"q": (self.q_proj, query), "k": (self.k_proj, key), "v": (self.v_proj, value)}
        projected = {target: projection(x) for target, (projection, x) in given.items()}
        if self.adapted:
            projected = {target: self.lora.adapt(target, y, given[target][1]) for target, y in projected.items()}
        q, k, v = (split_heads(y, self.heads) for y in projected.values())
        return self.out_proj(merge_heads(attend(q, k, v, implementation=self.attention)))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by the error function (JAX's default is the tanh approximation)."""
    return jax.nn.gelu(x, approximate=False)
