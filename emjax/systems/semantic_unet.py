"""A plain U-Net that predicts classes voxel by voxel: the baseline of SAM4EM, with the same classes, targets and loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax import losses
from emjax.errors import UserError
from emjax.models.unet import UNet, UNetConfig
from emjax.systems import sam4em
from emjax.systems.protocol import Block, Output, unit_grey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The semantic U-Net.

    Attributes:
        model: the network; with kernels and pools of 1 along z it works slice by slice (2-D).
        classes: what is segmented, as in SAM4EM: independent masks, the most probable wins.
        dice_share: d in the loss (1 - d) BCE + d Dice.
        threshold: probability from which a voxel belongs to a class.
        image_mean, image_std: normalisation of grey values 0..1.
        plan: blocks of prediction.
    """

    model: UNetConfig = UNetConfig()
    classes: tuple[sam4em.Class, ...] = (sam4em.Class(name="foreground"),)
    dice_share: float = 0.5
    threshold: float = 0.5
    image_mean: float = 0.5
    image_std: float = 0.2
    plan: Block = Block(size=(8, 256, 256), stride=(4, 192, 192), blending="gaussian")


def _rules(config: Config) -> sam4em.Config:
    """SAM4EM's targets and decoding know classes and threshold alone."""
    return sam4em.Config(classes=config.classes, threshold=config.threshold)


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    config.model.validate()
    config.plan.validate()
    sam4em.check_classes(config.classes)
    if config.model.deep_supervision:
        raise UserError("semantic_unet: model.deep_supervision is not used here")
    multiple = config.model.multiple()
    if any(size % step for size, step in zip(config.plan.size, multiple)):
        raise UserError(f"plan.size {config.plan.size} is not a multiple of {multiple}, the network's total pooling")
    for name in ("dice_share", "threshold"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"semantic_unet: {name} {getattr(config, name)}, expected 0 to 1")


def build(config: Config, rngs: nnx.Rngs) -> UNet:
    """The network."""
    return UNet(config.model, 1, len(config.classes), rngs=rngs)


def trainable(config: Config, path: str) -> bool:
    """Every parameter trains."""
    return True


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``masks`` (b, z, y, x, classes), 0 or 1, and ``weights`` (b, z, y, x, 1), float32."""
    return sam4em.targets(_rules(config), batch)


def _logits(config: Config, model: UNet, image: jax.Array) -> jax.Array:
    logits = model(((unit_grey(image) - config.image_mean) / config.image_std)[..., None])
    assert not isinstance(logits, tuple)
    return logits


def loss(
    config: Config, model: UNet, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """BCE and Dice; logs both, the IoU of each class in the batch, and ``error``, 1 - the mean IoU."""
    wanted = targets(config, batch)
    logits = _logits(config, model, batch["image"])
    bce = losses.binary_cross_entropy(logits, wanted["masks"], wanted["weights"])
    probability = jax.nn.sigmoid(logits)
    dice = losses.linear_dice(probability, wanted["masks"], wanted["weights"])
    scalars = {"bce": bce, "dice": dice, **sam4em.class_overlaps(_rules(config), probability, wanted)}
    return (1 - config.dice_share) * bce + config.dice_share * dice, scalars


def predict(config: Config, model: UNet, image: jax.Array) -> dict[str, jax.Array]:
    """``probabilities`` (b, z, y, x, classes)."""
    return {"probabilities": jax.nn.sigmoid(_logits(config, model, image))}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame."""
    return {name: jnp.flip(values, [axis + 1 for axis in axes]) for name, values in outputs.items()}


def outputs(config: Config) -> dict[str, Output]:
    """Probabilities of the classes, whose names are stored with the volume."""
    return sam4em.outputs(_rules(config))


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Classes uint32 (z, y, x), 1, 2, ... in the order of ``classes``, 0 for none."""
    return sam4em.decode(_rules(config), outputs)


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan
