"""Stacks with a small recurrent network in SAM4EM's place, whose answers depend on all slices before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.segmentation import Places
from emjax.inference.streaming import Run, stream
from emjax.models.functional import define, initialise
from emjax.systems.protocol import Block, unit_grey
from emjax.systems.sam4em_stack import Net, Plan, Stack, plan_of, segment_volume, tiles_of


class Leaky(nnx.Module):
    """State and answer are a running mean of the slices, times a weight."""

    def __init__(self, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.float32(1.0))


def leaky(first=0.0):
    def build(rngs):
        return Leaky(rngs)

    def start(model, features, truth):
        return {"mean": jnp.zeros_like(features) + first if truth is None else truth[..., 0], "count": jnp.int32(0)}

    def scan(model, state, features, size):
        def one(state, now):
            mean = 0.5 * state["mean"] + 0.5 * now * model.weight[...]
            return {"mean": mean, "count": state["count"] + 1}, jnp.stack([mean, 1 - mean], -1)

        return jax.lax.scan(one, state, features)

    collections = initialise(build, jax.random.key(0))
    return Net(2, define(build), collections, lambda model, grey: unit_grey(grey), start, scan)


def wanted(image, first=0.0):
    mean, found = np.full(image.shape[1:], first, np.float32), []
    for section in image.astype(np.float32) / 255:
        mean = (mean + section) / 2
        found.append(mean)
    return np.stack(found)


def image_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(5, 64, 64), (7, 100, 33), (1, 10, 130)])
@pytest.mark.parametrize(("slab", "batch"), [(2, 1), (3, 4), (16, 2)])
def test_slabs_and_tiles_change_nothing(shape, slab, batch):
    image = image_of(shape)
    plan = Plan(tile=(64, 64), overlap=(16, 24), slab=slab, batch=batch)
    found = Stack(plan, leaky(), lambda a, b: image[a:b], shape).probabilities()
    assert found.shape == (2, *shape)
    np.testing.assert_allclose(found[0], wanted(image), atol=1e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)


def test_the_first_masks_are_cut_like_the_image():
    image, truth = image_of((2, 70, 90)), np.random.default_rng(1).random((70, 90, 2)).astype(np.float32)
    plan = Plan(tile=(32, 64), overlap=(8, 8), batch=3)
    found = Stack(plan, leaky(), lambda a, b: image[a:b], image.shape, truth).probabilities()
    np.testing.assert_allclose(found[0], wanted(image, truth[..., 0]), atol=1e-6)


def test_tiles_cover_the_plane_and_end_with_it():
    tiles = tiles_of(Plan(tile=(64, 64), overlap=(16, 16)), (150, 40))
    assert tiles.size == (64, 64)
    assert tiles.starts == ((0, 0), (48, 0), (86, 0))
    assert tiles.weight[0, 0] == pytest.approx(1 / 17**2)
    assert tiles.weight[32, 32] == 1
    assert plan_of(Block(size=(8, 64, 96), stride=(8, 48, 64)), 32).overlap == (16, 32)
    for wrong in (Plan(tile=(50, 64), overlap=(0, 0)), Plan(tile=(64, 64), overlap=(64, 0))):
        with pytest.raises(UserError, match="tiles of"):
            wrong.validate()


def decode(stored):
    return (stored[0] > 127).astype(np.uint32)


def segmented(tmp_path, name, image, broken=False):
    save_volume(tmp_path / "image.zarr", image, voxel_size=(40, 4, 4), overwrite=True)
    volume = open_volume(str(tmp_path / "image.zarr"))
    plan = Plan(tile=(64, 64), overlap=(16, 16), slab=2, batch=2)
    streaming = segment_volume(plan, leaky(), volume, decode)
    places = Places(str(tmp_path / name))
    run = Run(streaming, volume, places, {"input": "image"}, keep_every=0.0)
    if broken:
        whole = streaming.run

        def stops(written, state):
            for number, slab in enumerate(whole(written, state)):
                if number == 2:
                    raise KeyboardInterrupt
                yield slab

        object.__setattr__(streaming, "run", stops)
    stream(run, say=lambda text: None)
    return open_volume(places.labels)[...], open_volume(places.prediction)[...]


def test_a_killed_run_ends_in_the_same_volumes(tmp_path):
    image = image_of((7, 80, 70))
    labels, probabilities = segmented(tmp_path, "whole.zarr", image)
    assert probabilities.shape == (2, 7, 80, 70)
    np.testing.assert_allclose(probabilities[0], wanted(image) * 255, atol=0.51)
    np.testing.assert_array_equal(labels, decode(probabilities))
    with pytest.raises(KeyboardInterrupt):
        segmented(tmp_path, "killed.zarr", image, broken=True)
    again = segmented(tmp_path, "killed.zarr", image)
    np.testing.assert_array_equal(again[0], labels)
    np.testing.assert_array_equal(again[1], probabilities)
