"""Masked pretraining of the image encoder, and what other systems take over from it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.config import Data, Experiment, Train, load, validate
from emjax.data.pipeline import Source
from emjax.errors import UserError
from emjax.models import sam4em as network
from emjax.models.functional import paths
from emjax.models.layers.lora import LoRA
from emjax.models.sam2.config import HieraConfig, SAM2Config
from emjax.systems import affinity_unet, hiera_pretraining, sam4em
from emjax.systems.hiera_pretraining import PIXELS
from emjax.training.checkpoints import Checkpoints, initial_variables
from emjax.training.state import fresh

HIERA = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2))
SMALL = hiera_pretraining.Config(encoder=SAM2Config(HIERA, features=16, image_only=True), width=8)
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def batch(shape=(2, 3, 64, 96)):
    return {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))}


def test_targets_are_cells_of_every_slice():
    wanted = hiera_pretraining.targets(SMALL, batch())
    assert wanted["image"].shape == (6, 16, 24, 16)
    assert wanted["hog"].shape == (6, 16, 24, 9)
    np.testing.assert_allclose(wanted["image"].mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(wanted["image"].std((1, 2, 3)), 1, atol=1e-4)
    np.testing.assert_allclose(jnp.square(wanted["hog"]).mean((1, 2, 3)), 1, atol=1e-4)


def test_hidden_cells_are_those_that_changed():
    clean = batch()["image"].reshape(6, 64, 96) / 255
    seen, hide = hiera_pretraining.hidden(SMALL, clean, jax.random.key(0))
    changed = np.asarray(seen != clean).reshape(6, 16, 4, 24, 4).any((2, 4))
    np.testing.assert_array_equal(changed, hide)
    share = np.asarray(hide).mean((1, 2))
    assert (share > 0.4).all()
    assert (share <= 0.7).all()
    assert len({tuple(one) for one in np.asarray(hide).reshape(6, -1).tolist()}) == 6


def test_loss_counts_hidden_cells_alone():
    given = batch()
    wanted = hiera_pretraining.targets(SMALL, given)
    right = jnp.concatenate([wanted["image"], wanted["hog"]], -1)
    _, hide = hiera_pretraining.hidden(SMALL, given["image"].reshape(6, 64, 96) / 255, jax.random.key(1))
    value, scalars = hiera_pretraining.loss(
        SMALL, lambda seen: right + ~hide[..., None] * 3.0, given, jax.random.key(1), True
    )
    assert float(value) == 0
    off = right.at[..., :PIXELS].add(2.0)
    value, scalars = hiera_pretraining.loss(SMALL, lambda seen: off, given, jax.random.key(1), True)
    assert float(scalars["image_loss"]) == pytest.approx(4, rel=1e-5)
    assert float(scalars["hog_loss"]) == 0


def test_prediction_puts_cells_back():
    given = batch((1, 2, 32, 64))
    wanted = hiera_pretraining.targets(SMALL, given)
    right = jnp.concatenate([wanted["image"], wanted["hog"]], -1)
    found = hiera_pretraining.predict(SMALL, lambda seen: right, given["image"])["restored"]
    np.testing.assert_allclose(found[..., 0] * 255, given["image"], atol=1e-3)


def test_bad_configurations():
    for change, message in (
        ({"ratio": (0.0, 0.5)}, "ratio"),
        ({"blocks": ((6, 8),)}, "multiples of 4"),
        ({"image_weight": 0.0, "hog_weight": 0.0}, "not both 0"),
    ):
        with pytest.raises(UserError, match=message):
            hiera_pretraining.validate(dataclasses.replace(SMALL, **change))
    with pytest.raises(UserError, match="the crop is"):
        hiera_pretraining.targets(SMALL, batch((1, 1, 48, 64)))
    with pytest.raises(UserError, match="segments nothing"):
        hiera_pretraining.decode(SMALL, {})


@pytest.mark.parametrize("variant", ["", "cpu", "nano", "debug"])
def test_configs_are_sound(variant):
    validate(load(f"{CONFIGS / 'em_prior' / 'hiera.py'}:{variant}"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A work directory with a checkpoint of a network that was never trained."""
    folder = tmp_path_factory.mktemp("prior")
    config = Experiment(system=SMALL, data=Data(train=(Source(raw="none"),)), train=Train(steps=1))
    state = fresh(config, jax.random.key(5))
    checkpoints = Checkpoints(folder, config)
    checkpoints.save(1, state, None)
    checkpoints.close()
    return folder, state["params"]


def start(prior, **changes):
    model = network.Config(**{"hiera": HIERA, "features": 16, "heads": 2, "inner": 16, **changes})
    config = Experiment(system=sam4em.Config(model=model), data=Data(train=(Source(raw="none"),)))
    return initial_variables(str(prior[0]), config)["params"]


def test_trunk_and_neck_start_sam4em_and_adapters_are_new(prior):
    found = start(prior, lora=LoRA(rank=2))
    stored = prior[1]["image_encoder"]
    for path in paths(stored):
        one, other = found["image_encoder"], stored
        for key in path.split("."):
            one, other = one[key], other[key]
        np.testing.assert_array_equal(one, other)
    assert "lora" in found["image_encoder"]["trunk"]["blocks"]["0"]["attn"]


def test_a_neck_of_another_width_is_new_and_another_trunk_refused(prior):
    wide = dataclasses.replace(SMALL.encoder, features=32)
    assert hiera_pretraining.inherited(SMALL, wide, "sam2") == {"image_encoder.trunk": "sam2.trunk"}
    assert hiera_pretraining.inherited(affinity_unet.Config(), SMALL.encoder) is None
    with pytest.raises(UserError, match="need the same widths"):
        start(prior, hiera=dataclasses.replace(HIERA, width=16), lora=None)
