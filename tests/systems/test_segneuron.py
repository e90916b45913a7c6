import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax import config as configuration
from emjax import segment
from emjax.data.hog import hog_image
from emjax.data.mixing import AFFINITY_BITS, affinity_bits
from emjax.errors import UserError
from emjax.inference.predictor import Network
from emjax.models import mnet
from emjax.models.functional import define
from emjax.systems import segneuron, segneuron_pretraining
from emjax.systems.protocol import system_of
from emjax.systems.segneuron import domain, rescaling

TINY = mnet.Config(widths=(1, 1, 1, 1, 2))


def _labels():
    return np.random.default_rng(0).integers(0, 4, (1, 3, 16, 16)).astype(np.int32)


class _Perfect:
    """A network that knows the targets."""

    def __init__(self, first, second):
        self.outputs = first, second

    def __call__(self, x):
        return self.outputs


def test_targets_from_labels_equal_those_from_bits():
    labels = _labels()
    config = segneuron.Config(model=TINY)
    plain = segneuron.targets(config, {"labels": jnp.asarray(labels)})
    bits = {"labels": jnp.asarray(labels), AFFINITY_BITS: jnp.asarray(affinity_bits(labels[0])[None])}
    mixed = segneuron.targets(config, bits)
    for name in ("affinities", "foreground", "mask"):
        np.testing.assert_array_equal(plain[name], mixed[name])


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_loss_of_the_right_answer_is_zero_and_masks_count(kind):
    config = segneuron.Config(model=TINY, loss=kind)
    batch = {"labels": jnp.asarray(_labels()), "image": jnp.zeros((1, 3, 16, 16), jnp.uint8)}
    wanted = segneuron.targets(config, batch)
    perfect = _Perfect(wanted["affinities"], wanted["foreground"])
    value, scalars = segneuron.loss(config, perfect, batch, jax.random.key(0), True)
    assert float(value) == 0
    assert float(scalars["recall"]) == float(scalars["specificity"]) == 1
    wrong = _Perfect(1 - wanted["affinities"], 1 - wanted["foreground"])
    nothing = {**batch, "mask": jnp.zeros((1, 3, 16, 16), jnp.uint8)}
    assert float(segneuron.loss(config, wrong, nothing, jax.random.key(0), True)[0]) == 0
    assert float(segneuron.loss(config, wrong, batch, jax.random.key(0), True)[0]) > 1


def test_published_squared_error_adds_channels_up():
    ones = jnp.ones((2, 3, 4, 5, 3))
    assert float(segneuron.squared_error(ones, 0 * ones, jnp.ones((2, 3, 4, 5, 1)))) == 3


def test_cross_entropy_has_finite_gradients_at_the_ends():
    p = jnp.asarray([0.0, 1.0, 0.5]).reshape(1, 1, 1, 3, 1)
    wanted = jnp.asarray([1.0, 0.0, 1.0]).reshape(p.shape)
    value, gradient = jax.value_and_grad(segneuron.cross_entropy)(p, wanted, jnp.ones_like(p))
    assert abs(float(value) - (100 + 100 + np.log(2)) / 3) < 1e-4
    assert np.isfinite(gradient).all()


def test_flips_turn_back():
    config = segneuron.Config(model=TINY)
    labels = jnp.asarray(_labels())
    straight = segneuron.targets(config, {"labels": labels})
    turned = segneuron.targets(config, {"labels": jnp.flip(labels, (2, 3))})
    back = segneuron.flip_back(config, {name: turned[name] for name in ("affinities", "foreground")}, (1, 2))
    np.testing.assert_array_equal(back["foreground"], straight["foreground"])
    # The first plane along a flipped axis has no partner, and is never read.
    np.testing.assert_array_equal(back["affinities"][:, :, 1:, 1:], straight["affinities"][:, :, 1:, 1:])


def test_pretraining_restores_image_and_hog():
    config = segneuron_pretraining.Config(model=mnet.pretraining(TINY), blocks=((1, 4, 4), (3, 8, 8)))
    image = jnp.asarray(np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16)), jnp.uint8)
    wanted = segneuron_pretraining.targets(config, {"image": image})
    np.testing.assert_allclose(wanted["hog"][..., 0], hog_image(image / 255), atol=1e-6)
    perfect = _Perfect(wanted["image"], wanted["hog"])
    assert float(segneuron_pretraining.loss(config, perfect, {"image": image}, jax.random.key(0), True)[0]) == 0
    seen = segneuron_pretraining.hidden(config, wanted["image"][..., 0], jax.random.key(1))
    changed = np.asarray(seen != wanted["image"][..., 0]).mean((1, 2, 3))
    assert ((changed > 0.4) & (changed < 0.75)).all()
    assert not np.array_equal(seen[0] == wanted["image"][0, ..., 0], seen[1] == wanted["image"][1, ..., 0])


def test_only_the_encoder_is_inherited_from_pretraining():
    config = segneuron.Config(model=TINY)
    taken = segneuron.inherits(config, segneuron_pretraining.Config())
    assert taken("encoder.down11.planar.conv1.conv.kernel")
    assert not taken("affinity.up11.planar.conv1.conv.kernel")
    assert segneuron.inherits(config, config) is None


def test_decode_needs_foreground_and_pretraining_does_not_segment():
    config = segneuron.Config(model=TINY)
    empty = {"affinities": np.full((3, 2, 24, 24), 0.9, np.float32), "foreground": np.zeros((1, 2, 24, 24), np.float32)}
    with pytest.raises(UserError, match="foreground is at most 0"):
        segneuron.decode(config, empty)
    with pytest.raises(UserError, match="pretraining, which restores images"):
        segneuron_pretraining.decode(segneuron_pretraining.Config(), {})
    arguments = ["--config", "configs/segneuron/pretrain.py:debug", "--input", "no.zarr", "--output", "out.zarr"]
    with pytest.raises(UserError, match="pretraining, which restores images"):
        segment.main(arguments)


@pytest.mark.slow
def test_tiles_depend_on_neither_batch_nor_devices():
    patch = (5, 16, 32)
    config = segneuron.Config(model=mnet.Config(widths=(2, 2, 3, 3, 4)))
    definition = define(lambda rngs: segneuron.build(config, rngs))
    rng = np.random.default_rng(0)
    collections = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), definition.shapes)
    tiles = rng.integers(0, 256, (5, *patch), dtype=np.uint8)
    wanted = None
    for batch, devices in ((1, 1), (4, 2)):
        net = Network(config, collections, patch, batch, devices=jax.local_devices()[:devices])
        found: dict[str, list] = {"affinities": [], "foreground": []}
        for start in range(0, len(tiles), net.batch):
            part = tiles[start : start + net.batch]
            for name, values in net(part).items():
                found[name].append(np.asarray(values)[: len(part)])
        joined = {name: np.concatenate(parts) for name, parts in found.items()}
        wanted = wanted or joined
        for name, values in joined.items():
            np.testing.assert_allclose(values, wanted[name], atol=2e-6)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("system.fill=zero", lambda s: s.fill == "zero"),
        ("system.fill=mean", lambda s: s.fill == "mean"),
        ("system.blocks=((4,8,8),)", lambda s: s.blocks == ((4, 8, 8),)),
        ("system.hog_weight=0", lambda s: s.hog_weight == 0),
    ],
)
def test_ablations_of_pretraining_are_switches(change, what):
    config = configuration.load("configs/segneuron/pretrain.py:debug", [change]).system
    segneuron_pretraining.validate(config)
    assert what(config)
    clean = jnp.asarray(np.random.default_rng(0).random((1, 8, 16, 16)), jnp.float32)
    seen = np.asarray(segneuron_pretraining.hidden(config, clean, jax.random.key(0)))
    hidden = seen != np.asarray(clean)
    assert 0.3 < hidden.mean() < 0.8
    if config.fill == "zero":
        assert (seen[hidden] == 0).all()
    if config.fill == "mean":
        np.testing.assert_allclose(seen[hidden], float(clean.mean()), atol=1e-5)
    if config.blocks == ((4, 8, 8),):
        grid = hidden.reshape(1, 2, 4, 2, 8, 2, 8)
        assert (grid.all((2, 4, 6)) | ~grid.any((2, 4, 6))).all()
    perfect = _Perfect(clean[..., None], jnp.ones((*clean.shape, 1)))
    value, scalars = segneuron_pretraining.loss(config, perfect, {"image": clean}, jax.random.key(0), True)
    assert (float(value) == 0) == (config.hog_weight == 0)
    assert float(scalars["hog_loss"]) > 0


@pytest.mark.parametrize(
    ("voxel_size", "wanted"),
    [
        ((8, 8, 8), (8, 8, 8)),
        ((50, 4, 4), (50, 5, 5)),
        ((4, 4, 4), (5, 5, 5)),
        ((30, 16, 16), (30, 10, 10)),
    ],
)
def test_domain(voxel_size, wanted):
    assert rescaling(voxel_size)[0] == wanted
    message = domain(segneuron.Config(), voxel_size)
    assert (message is None) == (voxel_size == wanted)


def test_sections_too_far_apart_are_refused():
    with pytest.raises(UserError, match="90 nm apart, SegNeuron was trained up to 50 nm"):
        domain(segneuron.Config(), (90, 8, 8))


def test_configurations_are_checked():
    assert system_of(segneuron.Config()) is segneuron
    for config in (segneuron.Config(model=TINY), segneuron_pretraining.Config()):
        system_of(config).validate(config)
    with pytest.raises(UserError, match=r"model\.skips False"):
        segneuron.validate(segneuron.Config(model=mnet.pretraining(TINY)))
    with pytest.raises(UserError, match=r"model\.skips True"):
        segneuron_pretraining.validate(segneuron_pretraining.Config(model=TINY))
    settings = dataclasses.replace(segneuron.Config().segmentation, beta=2)
    with pytest.raises(UserError, match="segmentation: beta is 2"):
        segneuron.validate(segneuron.Config(segmentation=settings))
