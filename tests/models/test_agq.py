"""Slots for queries change nothing: results equal those of the network with exactly as many slots as components."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.errors import UserError
from emjax.models.agq import (
    AGQ,
    AGQConfig,
    Decoder,
    choose_components,
    coordinates,
    pool_components,
    without_background,
)
from emjax.models.functional import define, initialise, variables

SMALL = AGQConfig(
    filters=(4, 8), isotropic=(False, False), features=8, groups=2, heads=2, branch_convs=1, learned=6, min_area=3
)
BLOCK = (5, 33, 33)
GRID = SMALL.mask_grid(BLOCK)


def boxes(count: int, grid=GRID) -> np.ndarray:
    """``count`` components of four voxels in raster order."""
    labels = np.zeros(grid, np.int32)
    places = [(z, y, x) for z in range(grid[0]) for y in range(0, grid[1], 2) for x in range(0, grid[2] - 3, 4)]
    for index, (z, y, x) in enumerate(places[:count]):
        labels[z, y, x : x + 4] = index + 1
    assert labels.max() == count
    return labels


def fused(batch: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, *GRID, SMALL.features + 3))


def randomised(build) -> dict:
    """Fresh weights, affine and running values moved away from 0 and 1."""
    fresh = jax.jit(lambda key: initialise(build, key))(jax.random.key(3))
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(4)
    moved = [np.asarray(leaf) * (1 + 0.2 * rng.random(leaf.shape, np.float32)) + np.float32(0.02) for leaf in leaves]
    return jax.tree.map(jnp.asarray, jax.tree.unflatten(tree, moved))


class Outputs(NamedTuple):
    valid: jax.Array
    query_features: jax.Array
    stages: tuple


def decode(decoder: Decoder, x: jax.Array, labels: jax.Array, train: bool) -> Outputs:
    """The network from the fused map on, an arbitrary function of it in place of the mask branch."""
    features = x
    for conv in decoder.query_convs:
        features = conv(features, train)
    queries, valid = decoder.initial_queries(features, labels, None)
    embedding = jnp.sin(3 * x[..., : SMALL.features])
    return Outputs(valid, features, decoder(features, queries, valid, embedding, train))


@functools.cache
def network(config: AGQConfig):
    definition = define(lambda rngs: Decoder(config, config.features + 3, rngs))

    def run(collections, x, labels, train):
        decoder = definition.bind(collections)
        return decode(decoder, x, labels, train), variables(decoder)["batch_stats"]

    return jax.jit(run, static_argnums=3)


@functools.cache
def weights():
    """They do not depend on the number of slots for guided queries."""
    return randomised(lambda rngs: Decoder(SMALL, SMALL.features + 3, rngs))


@functools.cache
def whole_weights():
    return randomised(lambda rngs: AGQ(SMALL, rngs=rngs))


def valid_rows(array, valid, axis):
    return np.compress(np.asarray(valid), np.asarray(array), axis)


def assert_same(padded, valid, plain, atol=1e-5):
    """Stages of one volume with slots against the same without."""
    with_background = np.concatenate([[True], valid])
    for got, want in zip(padded, plain):
        np.testing.assert_allclose(valid_rows(got.masks, with_background, -1), want.masks, atol=atol)
        for name in ("queries", "kernels", "updated"):
            if getattr(want, name) is not None:
                np.testing.assert_allclose(valid_rows(getattr(got, name), valid, 0), getattr(want, name), atol=atol)
        if want.gathered is not None:
            np.testing.assert_allclose(valid_rows(got.gathered, valid, 0), want.gathered, rtol=1e-5, atol=1e-3)


def volume(stages, index):
    return [type(stage)(*(None if part is None else part[index] for part in stage)) for stage in stages]


@pytest.mark.parametrize(("count", "train"), [(0, False), (1, False), (37, False), (100, False), (0, True), (37, True)])
def test_slots_equal_exact_number(count, train):
    labels = jnp.asarray(boxes(count))[None]
    padded, padded_statistics = network(SMALL)(weights(), fused(1), labels, train)
    exact = dataclasses.replace(SMALL, guided=count)
    plain, plain_statistics = network(exact)(weights(), fused(1), labels, train)
    assert int(padded.valid.sum()) == count + SMALL.learned
    assert plain.valid.all()
    assert_same(volume(padded.stages, 0), np.asarray(padded.valid[0]), volume(plain.stages, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), padded_statistics, plain_statistics)


def test_more_components_than_slots_keeps_the_largest():
    labels = boxes(113)
    big = np.arange(8, 108)
    for component in np.setdiff1d(np.arange(1, 114), big):
        labels[tuple(np.argwhere(labels == component)[-1])] = 0
    kept = np.where(np.isin(labels, big), labels, 0)
    config = dataclasses.replace(SMALL, min_area=2)
    all_of_them, _ = network(config)(weights(), fused(1), jnp.asarray(labels)[None], False)
    only_kept, _ = network(config)(weights(), fused(1), jnp.asarray(kept)[None], False)
    assert all_of_them.valid.all()
    assert_same(volume(all_of_them.stages, 0), np.ones(106, bool), volume(only_kept.stages, 0), 1e-6)


def test_volumes_of_a_batch_do_not_touch_each_other():
    labels = jnp.asarray(np.stack([boxes(3), boxes(41)]))
    both, _ = network(SMALL)(weights(), fused(2), labels, False)
    for index, count in enumerate((3, 41)):
        exact = dataclasses.replace(SMALL, guided=count)
        alone, _ = network(exact)(weights(), fused(2)[index : index + 1], labels[index : index + 1], False)
        assert_same(volume(both.stages, index), np.asarray(both.valid[index]), volume(alone.stages, 0))


def test_batch_statistics_of_kernels_count_every_valid_query_once():
    labels = jnp.asarray(np.stack([boxes(3), boxes(41)]))
    outputs, statistics = network(SMALL)(weights(), fused(2), labels, True)
    raw = outputs.stages[0].queries @ weights()["params"]["heads"]["0"]["kernel"]["kernel"]
    raw = raw + weights()["params"]["heads"]["0"]["kernel"]["bias"]
    valid = np.asarray(outputs.valid)
    want = np.asarray(raw)[valid].mean(0)
    old = weights()["batch_stats"]["heads"]["0"]["norm_kernel"]
    new = statistics["heads"]["0"]["norm_kernel"]
    np.testing.assert_allclose(new["mean"], 0.99 * old["mean"] + 0.01 * want, atol=1e-6)
    variance = np.asarray(raw)[valid].var(0, ddof=1)
    np.testing.assert_allclose(new["var"], 0.99 * old["var"] + 0.01 * variance, rtol=1e-5)


def test_convolution_statistics_are_those_of_each_volume():
    labels = jnp.asarray(np.stack([boxes(5), boxes(5)]))
    both, moved = network(SMALL)(weights(), fused(2), labels, True)
    averages = []
    for index in range(2):
        alone, moved_alone = network(SMALL)(weights(), fused(2)[index : index + 1], labels[index : index + 1], True)
        np.testing.assert_allclose(both.query_features[index], alone.query_features[0], atol=1e-5)
        averages.append(moved_alone["query_convs"]["0"]["norm"]["mean"])
    np.testing.assert_allclose(moved["query_convs"]["0"]["norm"]["mean"], np.mean(averages, 0), atol=1e-6)
    grouped = dataclasses.replace(SMALL, statistics="batch")
    together, _ = network(grouped)(weights(), fused(2), labels, True)
    assert np.abs(np.asarray(together.query_features - both.query_features)).max() > 1e-4


def test_statistics_do_not_depend_on_the_devices():
    labels = jnp.asarray(np.stack([boxes(3), boxes(41)]))
    one, one_moved = network(SMALL)(weights(), fused(2), labels, True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    both, both_moved = network(SMALL)(
        jax.device_put(weights(), everywhere), jax.device_put(fused(2), over), jax.device_put(labels, over), True
    )
    # Kernels and logits: the whole batch over all devices; convolutions: each volume, averaged.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one_moved, both_moved)
    np.testing.assert_allclose(one.query_features, both.query_features, atol=1e-5)
    for plain, split in zip(one.stages, both.stages):
        np.testing.assert_allclose(plain.masks, split.masks, atol=2e-5)


@pytest.mark.slow
def test_gradients_are_finite_and_equal_with_and_without_slots():
    labels = jnp.asarray(boxes(2))[None]

    def gradient(config):
        definition = define(lambda rngs: Decoder(config, config.features + 3, rngs))

        def value(params):
            outputs = decode(definition.bind(weights() | {"params": params}), fused(1), labels, True)
            shares = jax.nn.softmax(outputs.stages[-1].masks, -1)
            return jnp.square(shares).sum(-1).mean() + jnp.square(outputs.stages[1].masks[..., 0]).mean()

        return jax.jit(jax.grad(value))(weights()["params"])

    padded, plain = gradient(SMALL), gradient(dataclasses.replace(SMALL, guided=2))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), padded, plain)


def image(batch: int, block=BLOCK) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (batch, *block, 1))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"guided": 0, "remat": True}, {"learned": 0, "dtype": "bfloat16"}])
def test_variants_run_forward_and_backward(changes):
    config = dataclasses.replace(SMALL, **changes)
    definition = define(lambda rngs: AGQ(config, rngs=rngs))
    collections = jax.jit(lambda key: initialise(lambda rngs: AGQ(config, rngs=rngs), key))(jax.random.key(0))

    def value(params):
        outputs = definition.bind(collections | {"params": params})(
            image(1, (2, 9, 9)), component_labels=jnp.ones((1, 2, 5, 5), jnp.int32), train=True, key=jax.random.key(1)
        )
        masks = outputs.stages[-1].masks
        return jax.nn.softmax(masks, -1)[..., -1].sum() + outputs.affinity_logits.sum(), masks

    gradient, masks = jax.jit(jax.grad(value, has_aux=True))(collections["params"])
    assert masks.shape == (1, 2, 5, 5, 1 + config.queries)
    assert masks.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, masks)))


def test_no_query_at_all_leaves_only_background():
    config = dataclasses.replace(SMALL, learned=0)
    without = {name: {k: v for k, v in part.items() if k != "learned"} for name, part in weights().items()}
    for train in (False, True):
        outputs, statistics = network(config)(without, fused(1), jnp.zeros((1, *GRID), jnp.int32), train)
        assert (outputs.stages[-1].masks.argmax(-1) == 0).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(statistics))


def test_random_choice_of_components_is_uniform_and_keyed():
    labels = jnp.asarray(boxes(40))
    drawn = jax.jit(lambda key: choose_components(labels, 10, 3, "largest", key)[0])
    first, again, other = drawn(jax.random.key(0)), drawn(jax.random.key(0)), drawn(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    counts = np.zeros(41)
    for key in jax.random.split(jax.random.key(2), 200):
        counts[np.asarray(drawn(key))] += 1
    assert counts[0] == 0
    assert counts[1:].min() > 20
    assert counts[1:].max() < 90


def test_pooling_is_the_mean():
    labels = boxes(5)
    features = np.random.default_rng(0).random((*GRID, 4), np.float32)
    ids, valid = choose_components(jnp.asarray(labels), 8, 3, "raster")
    pooled = pool_components(jnp.asarray(features), jnp.asarray(labels), ids)
    assert valid.tolist() == [True] * 5 + [False] * 3
    for slot in range(5):
        np.testing.assert_allclose(pooled[slot], features[labels == slot + 1].mean(0), atol=1e-6)
    assert (np.asarray(pooled[5:]) == 0).all()


def test_area_must_exceed_the_minimum():
    labels = np.zeros((1, 4, 40), np.int32)
    labels[0, 0, :10], labels[0, 2, :11] = 1, 2
    ids, valid = choose_components(jnp.asarray(labels), 4, 10, "largest")
    assert ids[valid].tolist() == [2]


@pytest.mark.parametrize("block", [(1, 1, 1), (3, 6, 7)])
def test_any_block_size(block):
    definition = define(lambda rngs: AGQ(SMALL, rngs=rngs))
    run = jax.jit(lambda collections, x: definition.bind(collections)(x).stages[-1].masks)
    masks = run(whole_weights(), image(1, block))
    assert masks.shape == (1, *SMALL.mask_grid(block), 107)
    assert np.isfinite(np.asarray(masks)).all()


def test_background_switch():
    masks = jnp.ones((2, 1, 2, 2, 3))
    assert (np.asarray(without_background(masks)[..., 0]) == 0).all()
    assert np.asarray(without_background(masks, first_only=True)[..., 0]).tolist() == [
        [[[0, 0], [0, 0]]],
        [[[1, 1], [1, 1]]],
    ]


def test_coordinates_are_z_x_y():
    grid = coordinates((2, 3, 5))
    assert grid[1, 0, 0].tolist() == [1, -1, -1]
    assert grid[0, 2, 0].tolist() == [-1, -1, 1]
    assert grid[0, 0, 4].tolist() == [-1, 1, -1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"filters": (4,), "isotropic": (False,)}, "at least 2"),
        ({"isotropic": (False, True)}, "third"),
        ({"filters": (4, 7)}, "width 7"),
        ({"heads": 3}, "heads 3"),
        ({"guided": 0, "learned": 0}, "both 0"),
        ({"selection": "smallest"}, "smallest"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_wrong_settings_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(SMALL, **changes).validate()


def test_wrong_shapes_are_named():
    definition = define(lambda rngs: AGQ(SMALL, rngs=rngs))
    with pytest.raises(UserError, match=r"expected \(batch, z, y, x, 1\)"):
        definition.bind(whole_weights())(jnp.zeros((1, 5, 33, 33)))
    with pytest.raises(UserError, match="component_labels"):
        definition.bind(whole_weights())(image(1), component_labels=jnp.zeros((1, 2, 2, 2), jnp.int32))
