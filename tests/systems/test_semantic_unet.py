import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.config import load, validate
from emjax.errors import UserError
from emjax.systems import semantic_unet
from emjax.systems.sam4em import Class

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CONFIG = semantic_unet.Config(classes=(Class(name="mito", labels=(1,)), Class(name="glia", labels=(2, 4))))


def test_the_right_answer_has_no_loss_and_decodes_to_the_classes():
    labels = np.random.default_rng(0).integers(0, 5, (1, 2, 8, 8)).astype(np.int32)
    wanted = semantic_unet.targets(CONFIG, {"labels": jnp.asarray(labels)})
    assert wanted["masks"].shape == (1, 2, 8, 8, 2)
    logits = (2 * wanted["masks"] - 1) * 50
    given = {"labels": jnp.asarray(labels), "image": jnp.zeros((1, 2, 8, 8), jnp.uint8)}
    value, scalars = semantic_unet.loss(CONFIG, lambda x: logits, given, jax.random.key(0), True)
    assert float(value) == pytest.approx(0, abs=1e-6)
    assert float(scalars["iou_glia"]) == 1
    found = semantic_unet.predict(CONFIG, lambda x: logits, given["image"])["probabilities"]
    decoded = semantic_unet.decode(CONFIG, {"probabilities": np.moveaxis(np.asarray(found)[0], -1, 0)})
    np.testing.assert_array_equal(decoded, np.array([0, 1, 2, 0, 2])[labels[0]])


def test_bad_configurations():
    for change, message in (
        ({"classes": ()}, "different names"),
        ({"threshold": 1.5}, "threshold"),
        ({"plan": dataclasses.replace(CONFIG.plan, size=(8, 250, 256))}, "total pooling"),
    ):
        with pytest.raises(UserError, match=message):
            semantic_unet.validate(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("variant", ["vnc_semantic", "mito_sbem_cpu", "isbi2012_2d_cpu", "debug"])
def test_configs_are_sound(variant):
    validate(load(f"{CONFIGS / 'semantic_unet' / 'baseline.py'}:{variant}"))
