"""Adapters: nothing at first, additive afterwards, and merged into the plain network's matrices without a trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.errors import UserError
from emjax.models.functional import define, initialise, join, partition, paths
from emjax.models.layers.lora import LoRA, is_adapter, merge
from emjax.models.sam2.blocks import Attention
from emjax.models.sam2.config import HieraConfig
from emjax.models.sam2.hiera import Hiera

HIERA = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2))
KINDS = [
    LoRA(rank=3),
    LoRA(rank=3, alpha=6.0, targets=("q", "k", "v")),
    LoRA(rank=3, faithful_halves=True),
]


@functools.cache
def trunk(lora=None):
    config = dataclasses.replace(HIERA, lora=lora)
    build = lambda rngs: Hiera(config, rngs)  # noqa: E731
    return define(build), initialise(build, jax.random.key(0))["params"]


@functools.cache
def attention(lora=None):
    build = lambda rngs: Attention(8, 4, 2, "float32", rngs, "xla", lora=lora)  # noqa: E731
    return define(build), initialise(build, jax.random.key(0))["params"]


@functools.partial(jax.jit, static_argnums=0)
def run(definition, params, *inputs):
    with jax.default_matmul_precision("highest"):
        return definition.bind({"params": params, "batch_stats": {}, "constants": {}})(*inputs)


def trained(params):
    """Adapters as after training: both matrices away from zero."""
    adapters, rest = partition(params, is_adapter)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return join(rest, jax.tree.unflatten(structure, drawn))


@pytest.fixture(scope="module")
def image():
    return jax.random.normal(jax.random.key(1), (1, 32, 64, 3))


@pytest.mark.parametrize("lora", KINDS)
def test_hiera_starts_as_the_plain_network_and_merges_into_it(lora, image):
    plain, base = trunk()
    adapted, params = trunk(lora)
    adapters, rest = partition(params, is_adapter)
    assert paths(rest) == paths(base)
    assert len(paths(adapters)) == 2 * len(lora.targets) * HIERA.depth
    start = join(base, adapters)
    for got, want in zip(run(adapted, start, image), run(plain, base, image)):
        np.testing.assert_array_equal(got, want)
    learnt = trained(start)
    changed = run(adapted, learnt, image)
    assert all(float(jnp.abs(a - b).max()) > 1e-3 for a, b in zip(changed, run(plain, base, image)))
    merged = merge(learnt, lora)
    assert paths(merged) == paths(base)
    for got, want in zip(run(plain, merged, image), changed):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.std(want)))


def test_faithful_halves_leave_half_of_q_and_v_alone():
    lora = LoRA(rank=3, faithful_halves=True)
    params = trained(trunk(lora)[1])
    update = (
        merge(params, lora)["blocks"]["1"]["attn"]["qkv"]["kernel"] - params["blocks"]["1"]["attn"]["qkv"]["kernel"]
    )
    moved = np.abs(np.asarray(update)).max(axis=0) > 0
    # 8 channels become 16: q is 0..15, k 16..31, v 32..47.
    assert np.flatnonzero(moved).tolist() == [*range(8), *range(40, 48)]


@pytest.mark.parametrize("lora", KINDS)
def test_decoder_attention_starts_as_the_plain_one_and_merges_into_it(lora):
    plain, base = attention()
    adapted, params = attention(lora)
    start = join(base, partition(params, is_adapter)[0])
    inputs = [jax.random.normal(jax.random.key(i), (2, 5, 8)) for i in range(3)]
    np.testing.assert_array_equal(run(adapted, start, *inputs), run(plain, base, *inputs))
    learnt = trained(start)
    changed = run(adapted, learnt, *inputs)
    assert float(jnp.abs(changed - run(plain, base, *inputs)).max()) > 1e-3
    np.testing.assert_allclose(run(plain, merge(learnt, lora), *inputs), changed, atol=1e-5)


def test_gradients_reach_b_first():
    adapted, params = attention(LoRA(rank=3))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    gradient = jax.grad(lambda p: (run(adapted, p, x, x, x) ** 2).sum())(params)["lora"]
    assert float(jnp.abs(gradient["v"]["b"]["kernel"]).max()) > 0
    assert float(jnp.abs(gradient["v"]["a"]["kernel"]).max()) == 0


@pytest.mark.parametrize(
    ("lora", "message"),
    [(LoRA(rank=0), "rank 0"), (LoRA(targets=("q", "o")), "targets"), (LoRA(targets=("q", "q")), "targets")],
)
def test_wrong_settings_are_refused(lora, message):
    with pytest.raises(UserError, match=message):
        lora.validate()
