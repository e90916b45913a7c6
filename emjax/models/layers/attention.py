"""Scaled dot-product attention: fused where the platform has it, in bounded memory where it has not."""

import math

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = ("auto", "xla", "cudnn")

# Above this many scores, queries are taken in chunks, so that the score matrix stays in cache (CPU) or memory.
_MOST_SCORES = 1 << 22


def _fused_fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether cuDNN's fused attention takes these arrays (half precision, head size a multiple of 8 up to 128)."""
    half = query.dtype in (jnp.bfloat16, jnp.float16) and key.dtype == query.dtype
    # Its gradient refuses odd lengths, with a bias or without (jax 0.11).
    even = query.shape[-2] % 2 == 0 and key.shape[-2] % 2 == 0
    return half and even and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and jax.default_backend() == "gpu"


def _scores_times_values(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    if mask is not None:
        peak = jnp.maximum(peak, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(value.dtype)


def _chunk(queries: int, keys: int, rest: int) -> int:
    """The largest divisor of ``queries`` whose scores fit in the limit (or the smallest useful one)."""
    most = max(64, _MOST_SCORES // max(1, keys * rest))
    if queries <= most:
        return queries
    divisors = [n for n in range(1, most + 1) if queries % n == 0]
    return divisors[-1] if divisors[-1] >= 16 else queries


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with the heads before the tokens.

    ``query`` (..., tokens, d), ``key`` and ``value`` (..., keys, d); ``mask`` is boolean, broadcastable to
    (..., tokens, keys), True where a key counts; a query without any gives zeros. The softmax is in float32.
    ``implementation``: ``cudnn`` (fused, half precision on NVIDIA), ``xla``, or ``auto``, which takes the fused one
    where it fits. Raises ``ValueError`` for another name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    lead = query.shape[:-2]
    if implementation == "cudnn" or (implementation == "auto" and _fused_fits(query, key)):
        flat = [a.reshape(-1, lead[-1] if lead else 1, *a.shape[-2:]) for a in (query, key, value)]
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in flat)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*lead, query.shape[-2], key.shape[-2]))
            mask = mask.reshape(-1, lead[-1] if lead else 1, query.shape[-2], key.shape[-2])
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
        return jnp.swapaxes(out, 1, 2).reshape(query.shape[:-1] + value.shape[-1:])
    scaled = query * np.asarray(1 / math.sqrt(query.shape[-1]), query.dtype)
    tokens, keys = query.shape[-2], key.shape[-2]
    size = _chunk(tokens, keys, math.prod(lead))
    if size == tokens:
        return _scores_times_values(scaled, key, value, mask)
    chunks = jnp.moveaxis(scaled.reshape(*lead, tokens // size, size, query.shape[-1]), -3, 0)
    if mask is not None and mask.shape[-2] != 1:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], tokens, keys))
        parts = jnp.moveaxis(mask.reshape(*mask.shape[:-2], tokens // size, size, keys), -3, 0)
        out = jax.lax.map(lambda pair: _scores_times_values(pair[0], key, value, pair[1]), (chunks, parts))
    else:
        out = jax.lax.map(lambda part: _scores_times_values(part, key, value, mask), chunks)
    return jnp.moveaxis(out, 0, -3).reshape(*lead, tokens, value.shape[-1])


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """(batch, tokens, features) to (batch, heads, tokens, features / heads)."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], heads, -1), -2, -3)


def merge_heads(x: jax.Array) -> jax.Array:
    """The inverse of :func:`split_heads`."""
    x = jnp.swapaxes(x, -2, -3)
    return x.reshape(*x.shape[:-2], -1)
