"""Labels of a block on the device, blocks into a volume, joining across faces, the system's settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax import config as configuration
from emjax.errors import UserError
from emjax.inference import predictor
from emjax.models.agq import ABSENT
from emjax.models.layers.interpolate import resize_linear
from emjax.systems import agq
from emjax.systems.agq_blocks import (
    INSTANCE_BITS,
    block_affinities,
    block_labels,
    block_positions,
    border_between_blocks,
    concatenate,
    segment_in_memory,
)
from emjax.systems.protocol import Block, system_of


def test_block_labels_equal_the_whole_computation():
    size = (3, 11, 14)
    masks = jax.random.normal(jax.random.key(0), (3, 6, 7, 9)) * 3
    masks = masks.at[..., 4].add(-4).at[..., 7].set(ABSENT)
    shares = jax.nn.softmax(resize_linear(masks[None], size)[0], -1)
    areas = shares.sum((0, 1, 2))
    threshold = float(jnp.sort(areas)[3]) + 0.01
    labels, found = jax.jit(block_labels, static_argnums=(1, 2))(masks, size, threshold)
    np.testing.assert_allclose(found, areas, rtol=1e-5)
    np.testing.assert_array_equal(labels, jnp.where(areas >= threshold, shares, 0).argmax(-1))
    assert labels.dtype == jnp.int16
    assert found[7] == 0


def test_all_background_block():
    masks = jnp.full((2, 5, 5, 4), ABSENT).at[..., 0].set(1.0)
    labels, _ = block_labels(masks, (2, 9, 9))
    assert (np.asarray(labels) == 0).all()


def test_sections_must_agree():
    with pytest.raises(UserError, match="sections"):
        block_labels(jnp.zeros((2, 5, 5, 4)), (3, 9, 9))


def test_affinities_are_probabilities():
    found = block_affinities(jnp.asarray([[-50.0, 0.0, 50.0]]).reshape(1, 1, 1, 1, 3), (1, 2, 3))
    np.testing.assert_allclose(found, np.broadcast_to([0, 0.5, 1], (1, 1, 2, 3, 3)), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 17, 17), (6, 20, 41), (5, 33, 18), (13, 17, 50)])
def test_positions_cover_any_shape(shape):
    size, stride = (5, 17, 17), (4, 16, 16)
    covered = np.zeros(shape, int)
    for position in block_positions(shape, size, stride):
        covered[tuple(slice(start, start + length) for start, length in zip(position, size))] += 1
    assert covered.min() >= 1


def test_a_volume_of_any_shape_comes_back_whole():
    truth = np.zeros((7, 23, 38), np.int32)
    truth[:, :9], truth[:, 10:, :20], truth[:, 10:, 21:] = 1, 2, 3
    calls = []

    def run(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The truth as a network would give it: ids of its own in every block."""
        calls.append(block.shape)
        labels = np.where(block > 0, (block + len(calls)) % 3 + 1, 0).astype(np.int16)
        return labels, np.stack([(block > 0).astype(np.float32)] * 3)

    found = segment_in_memory(run, truth, (4, 9, 17), (3, 8, 16))
    assert set(calls) == {(4, 9, 17)}
    pairs = np.unique(np.stack([truth.ravel(), found.ravel()]), axis=1)
    assert pairs.shape[1] == 4
    assert len(set(pairs[1])) == 4


def test_a_volume_smaller_than_a_block():
    image = np.ones((2, 5, 6), np.int32)
    found = segment_in_memory(
        lambda block: (block.astype(np.int16), np.ones((3, *block.shape))), image, (4, 8, 8), (3, 7, 7)
    )
    np.testing.assert_array_equal(found, image)


def test_weak_faces_keep_instances_apart():
    image = np.ones((3, 6, 16), np.int32)
    for affinity, segments in ((0.6, 2), (0.8, 1)):
        run = lambda block, a=affinity: (block.astype(np.int16), np.full((3, *block.shape), a, np.float32))  # noqa: E731
        found = segment_in_memory(run, image, (3, 6, 9), (3, 6, 8))
        assert len(np.unique(found)) == segments


def test_later_blocks_overwrite_and_affinities_are_means():
    blocks = [
        ((0, 0, 0), np.full((1, 2, 3), 1), np.full((3, 1, 2, 3), 0.2, np.float32)),
        ((0, 0, 2), np.array([[[0, 1, 1], [1, 1, 0]]]), np.full((3, 1, 2, 3), 0.6, np.float32)),
    ]
    whole = concatenate(blocks, (1, 2, 5))
    assert whole.labels.tolist() == [[[1, 1, 0, 2, 2], [1, 1, 2, 2, 0]]]
    np.testing.assert_allclose(whole.affinities[0, 0, 0], [0.2, 0.2, 0.4, 0.6, 0.6])
    assert whole.border[2, 0, 0].tolist() == [True, False, True, False, False]


def test_gaps_and_blocks_outside_are_refused():
    labels, affinities = np.ones((1, 2, 2), int), np.ones((3, 1, 2, 2))
    with pytest.raises(UserError, match="2 voxels of the volume"):
        concatenate([((0, 0, 0), labels, affinities)], (1, 2, 3))
    with pytest.raises(UserError, match="not inside"):
        concatenate([((0, 0, 2), labels, affinities)], (1, 2, 3))


def test_borders_are_read_off_the_ids():
    assert INSTANCE_BITS == predictor.INSTANCE_BITS
    ids = np.array([[[1, 2, 2]], [[1, 2, 2]]], np.uint64)
    ids |= np.array([[[1, 1, 2]], [[3, 3, 3]]], np.uint64) << np.uint64(INSTANCE_BITS)
    border = border_between_blocks(ids)
    assert border[2, :, 0].tolist() == [[False, False, True], [False, False, False]]
    assert border[0, 1].all()
    assert not border[1].any()


CONFIG = agq.Config()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": Block(size=(17, 257, 257), stride=(16, 256, 256), blending="gaussian")}, "gaussian"),
        ({"plan": Block(size=(17, 65, 65), stride=(15, 63, 63), halo=(1, 1, 1))}, "halo"),
        ({"plan": Block(size=(4, 4, 4), stride=(5, 4, 4), blending="linear")}, "gaps"),
        ({"background": "none"}, "background"),
        ({"merge": agq.Merge(ties="random")}, "ties"),
        ({"merge": agq.Merge(on_border=2.0)}, "on_border"),
    ],
)
def test_wrong_settings_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        agq.validate(dataclasses.replace(CONFIG, **changes))


def test_block_sizes_that_do_not_halve_are_described():
    assert agq.check_block(CONFIG, (17, 257, 257)) == ""
    assert "256 along x" in agq.check_block(CONFIG, (17, 257, 256))


def test_flips_are_refused():
    with pytest.raises(UserError, match="flips"):
        agq.flip_back(CONFIG, {}, (1,))


@pytest.mark.parametrize(
    ("file", "variants"),
    [
        ("ac4", ("", "bf16", "debug")),
        ("fib25", ("", "learned", "guided", "cpu", "cpu_learned", "cpu_guided", "debug")),
        ("isbi2012", ("", "cpu", "debug")),
    ],
)
def test_configurations_are_valid_and_survive_storage(file, variants):
    for variant in variants:
        experiment = configuration.load(f"configs/agq/{file}.py:{variant}")
        configuration.validate(experiment)
        assert system_of(experiment.system) is agq
        assert configuration.from_json(configuration.to_json(experiment)) == experiment
    with pytest.raises(UserError, match="unknown"):
        configuration.load(f"configs/agq/{file}.py:other")
