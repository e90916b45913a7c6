"""Targets against slow loops over voxels, and against the recorded reference targets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.data import targets
from emjax.data.crops import with_membrane
from emjax.errors import UserError


def blocky_labels(seed, shape=(5, 12, 11), ids=6):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, ids, [size // 3 + 1 for size in shape])
    return np.kron(coarse, np.ones((3, 3, 3), int))[tuple(slice(size) for size in shape)].astype(np.int32)


def slow_affinities(labels, offsets, border):
    out = np.zeros(labels.shape + (len(offsets),), np.float32)
    for v in np.ndindex(labels.shape):
        for c, offset in enumerate(offsets):
            u = tuple(a + b for a, b in zip(v, offset))
            if all(0 <= a < n for a, n in zip(u, labels.shape)):
                out[*v, c] = labels[v] == labels[u] and labels[v] > 0
            elif border == "replicate":
                out[*v, c] = labels[v] > 0
    return out


def slow_widen(labels, window):
    pads = [(size // 2, size // 2) for size in window]
    padded = np.pad(labels, pads, mode="reflect")
    out = labels.copy()
    for v in np.ndindex(labels.shape):
        ids = np.unique(padded[tuple(slice(a, a + size) for a, size in zip(v, window))])
        if len(ids[ids > 0]) > 1:
            out[v] = 0
    return out


@pytest.mark.parametrize("border", ["replicate", "masked"])
def test_affinities_equal_a_loop(border):
    offsets = ((-1, 0, 0), (0, -3, 0), (0, 2, -4), (-9, 0, 0), (1, 1, 1))
    labels = np.stack([blocky_labels(0), blocky_labels(1)])
    got = jax.jit(targets.affinities, static_argnums=(1, 2))(labels, offsets, border)
    want = np.stack([slow_affinities(one, offsets, border) for one in labels])
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.float32


def test_affinities_under_vmap_equal_the_batch():
    labels = jnp.asarray(np.stack([blocky_labels(seed) for seed in range(3)]))
    np.testing.assert_array_equal(jax.vmap(targets.affinities)(labels), targets.affinities(labels))


@pytest.mark.parametrize(("border", "both"), list(itertools.product(["replicate", "masked"], [True, False])))
def test_affinity_mask_equals_a_loop(border, both):
    offsets = ((-1, 0, 0), (0, -2, 1))
    mask = (np.random.default_rng(3).random((4, 6, 7)) < 0.8).astype(np.uint8)
    got = targets.affinity_mask(mask, offsets, border, both)
    for v in np.ndindex(mask.shape):
        for c, offset in enumerate(offsets):
            u = tuple(a + b for a, b in zip(v, offset))
            if all(0 <= a < n for a, n in zip(u, mask.shape)):
                want = bool(mask[v]) and (bool(mask[u]) or not both)
            else:
                want = bool(mask[v]) and border == "replicate"
            assert got[*v, c] == want


@pytest.mark.parametrize("window", [(1, 3, 3), (3, 3, 3), (1, 5, 5)])
def test_widening_equals_a_loop(window):
    labels = blocky_labels(4)
    np.testing.assert_array_equal(
        jax.jit(targets.widen_borders, static_argnums=1)(labels, window), slow_widen(labels, window)
    )
    np.testing.assert_array_equal(with_membrane(np.asarray(labels), window), slow_widen(labels, window))


def test_widening_needs_an_odd_window():
    with pytest.raises(UserError, match="odd"):
        targets.widen_borders(jnp.zeros((2, 4, 4), jnp.int32), (1, 2, 3))


def test_loss_mask_and_one_hot():
    labels = jnp.asarray([[[0, 1, 2, 7]]], jnp.int32)
    mask = jnp.asarray([[[1, 0, 1, 1]]], jnp.uint8)
    np.testing.assert_array_equal(targets.loss_mask(labels, mask, (7,)), [[[1, 0, 1, 0]]])
    np.testing.assert_array_equal(targets.loss_mask(labels), np.ones((1, 1, 4)))
    np.testing.assert_array_equal(targets.one_hot(labels, 2)[0, 0], [[1, 0], [0, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(targets.one_hot(labels, (7, 2))[0, 0], [[0, 0], [0, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(targets.foreground(labels), [[[0, 1, 1, 1]]])


@pytest.mark.parametrize("per", ["sample", "channel", "batch"])
def test_weights_balance_the_classes(per):
    rng = np.random.default_rng(0)
    target = (rng.random((2, 4, 8, 8, 3)) < np.array([0.9, 0.7, 0.3])).astype(np.float32)
    mask = (rng.random(target.shape) < 0.7).astype(np.float32)
    weights = np.asarray(targets.balancing_weights(target, mask, per))
    assert np.all(weights[mask == 0] == 0)
    groups = {
        "sample": [np.s_[b] for b in range(2)],
        "channel": [np.s_[b, ..., c] for b in range(2) for c in range(3)],
        "batch": [np.s_[:]],
    }[per]
    for group in groups:
        t, w = target[group], weights[group]
        np.testing.assert_allclose(w[t == 1].sum(), w[t == 0].sum(), rtol=1e-4)
        assert w[mask[group] == 1].min() == 1


def test_weights_of_one_class_stay_finite():
    weights = targets.balancing_weights(jnp.ones((1, 2, 2, 2, 1)))
    np.testing.assert_array_equal(weights, np.ones((1, 2, 2, 2, 1)))


@pytest.mark.parametrize("offsets", [(), ((0, 0, 0),), ((1, 2),), ((0.5, 0, 0),)])
def test_wrong_offsets(offsets):
    with pytest.raises(UserError, match="offsets"):
        targets.check_offsets(offsets)


def test_agq_reference_targets(oracles):
    with np.load(oracles / "agq" / "targets.npz") as file:
        eroded = targets.widen_borders(jnp.asarray(file["split_label"]))
        np.testing.assert_array_equal(eroded, file["eroded_label"])
        affinity = targets.affinities(eroded, targets.NEAREST_OFFSETS, "replicate")
        np.testing.assert_array_equal(np.moveaxis(np.asarray(affinity), -1, 0), file["affinity"])


def test_segneuron_reference_targets(oracles):
    with np.load(oracles / "segneuron" / "affinity_targets.npz") as file:
        labels = jnp.asarray(file["labels"].astype(np.int32))
        offsets = tuple(tuple(int(step) for step in offset) for offset in file["offsets"])
        for border, name in (("replicate", "affinity_replicate"), ("masked", "affinity_nopad")):
            got = targets.affinities(labels, offsets, border)
            np.testing.assert_array_equal(np.moveaxis(np.asarray(got), -1, 0), file[name])
        np.testing.assert_array_equal(targets.foreground(labels), file["foreground"])
        np.testing.assert_array_equal(targets.loss_mask(labels, None, (10000,)), file["loss_mask"])
