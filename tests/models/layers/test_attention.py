"""Attention: chunked, masked and half precision against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.models.layers import attention
from emjax.models.layers.attention import attend, merge_heads, split_heads


def plain(q, k, v, mask=None):
    scores = np.einsum("...qd,...kd->...qk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("...qk,...kd->...qd", weights / weights.sum(-1, keepdims=True), v)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("limit", [1 << 22, 1 << 8])
@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
def test_equals_the_formula(monkeypatch, limit, masked):
    monkeypatch.setattr(attention, "_MOST_SCORES", limit)
    q, k, v = drawn(2, 3, 128, 8), drawn(2, 3, 40, 8, seed=1), drawn(2, 3, 40, 5, seed=2)
    mask = None
    if masked is not None:
        shape = (2, 1, 1, 40) if masked == "keys" else (2, 1, 128, 40)
        mask = np.random.default_rng(3).random(shape) < 0.5
        mask[..., 0] = True
    got = attend(*map(jnp.asarray, (q, k, v)), mask=None if mask is None else jnp.asarray(mask))
    assert np.abs(np.asarray(got) - plain(q, k, v, mask)).max() < 1e-5


def test_a_query_without_keys_gives_zeros():
    x = jnp.ones((1, 4, 8))
    assert np.array_equal(attend(x, x, x, mask=jnp.zeros((1, 4, 4), bool)), jnp.zeros((1, 4, 8)))


def test_masked_keys_are_as_if_absent():
    q, k, v = drawn(1, 2, 10, 8), drawn(1, 2, 30, 8, seed=1), drawn(1, 2, 30, 8, seed=2)
    mask = jnp.arange(30)[None, None, None] < 20
    alone = attend(*map(jnp.asarray, (q, k[:, :, :20], v[:, :, :20])))
    assert np.abs(np.asarray(attend(*map(jnp.asarray, (q, k, v)), mask=mask) - alone)).max() < 1e-6


def test_half_precision_has_a_float32_softmax():
    q, k, v = (jnp.asarray(drawn(1, 1, 64, 16, seed=s), jnp.bfloat16) for s in range(3))
    got = attend(q, k, v)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - plain(*(np.asarray(x, np.float32) for x in (q, k, v)))).max() < 0.02


def test_gradient_of_the_chunked_form(monkeypatch):
    q, k, v = (jnp.asarray(drawn(1, 1, 128, 8, seed=s)) for s in range(3))
    whole = jax.grad(lambda q: (attend(q, k, v) ** 2).sum())(q)
    monkeypatch.setattr(attention, "_MOST_SCORES", 1 << 8)
    assert np.abs(np.asarray(whole - jax.grad(lambda q: (attend(q, k, v) ** 2).sum())(q))).max() < 1e-4


def test_heads_and_back():
    x = jnp.asarray(drawn(2, 5, 12))
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert np.array_equal(merge_heads(split_heads(x, 3)), x)


def test_unknown_implementation():
    x = jnp.ones((1, 4, 8))
    with pytest.raises(ValueError, match="implementation is 'flash'"):
        attend(x, x, x, implementation="flash")


@pytest.mark.parametrize(("tokens", "keys", "fused"), [(64, 64, True), (5, 5, False), (5, 64, False), (64, 5, False)])
def test_the_fused_form_is_taken_where_its_gradient_works(monkeypatch, tokens, keys, fused):
    # On an H200 a decoder's 5 tokens ended a training with "Unsupported sequence length".
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    taken = []

    def recorded(q, k, v, mask, implementation):
        taken.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q, kv = (jnp.ones((1, 2, n, 16), jnp.bfloat16) for n in (tokens, keys))
    attend(q, kv, kv)
    assert taken == (["cudnn"] if fused else [])
