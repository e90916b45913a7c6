"""The plainest system: a 3-D U-Net predicts affinities, watershed and agglomeration make them neurons."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax import losses
from emjax.data.targets import NEAREST_OFFSETS, Offset, affinities, affinity_mask, balancing_weights, check_offsets
from emjax.data.targets import widen_borders as widen
from emjax.errors import UserError
from emjax.models.unet import UNet, UNetConfig
from emjax.postprocess import agglomerate, apply, mutex_watershed, region_graph, regrow, watershed
from emjax.systems.protocol import Block, Output, Triple, flip_back_affinities, unit_grey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """From affinities to labels.

    Attributes:
        fragments: ``"watershed"`` of the nearest affinities, or ``"mutex"`` watershed of all offsets, of which those
            beyond the nearest repel (whole volumes only; needs ``predicted="all"``).
        low, high: watershed limits; edges at or below ``low`` never join, those at or above ``high`` always do.
        regrow: fragments of fewer voxels are dissolved and the others grow into their place
            (``emjax.postprocess.regrow``); 0 leaves them. Whole volumes only.
        score: agglomeration score, such as ``"mean"`` or ``"hist_quant_50"``.
        threshold: pairs are merged while their score (1 - affinity) is below it.
    """

    fragments: Literal["watershed", "mutex"] = "watershed"
    low: float = 0.0001
    high: float = 0.9999
    regrow: int = 0
    score: str = "mean"
    threshold: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The affinity U-Net.

    Attributes:
        model: the network.
        offsets: trained affinities (z, y, x); the first three must be the nearest neighbours, further ones are
            auxiliary targets.
        predicted: the affinities that ``predict`` returns: the nearest, or all, as the mutex watershed needs them.
        widen_borders: window in which a voxel with two ids becomes background; ``None`` leaves labels as they are.
        loss: ``"bce"`` or ``"mse"`` (of the probabilities), plus ``dice_weight`` times a Dice term.
        class_balance: rarer class weighs more, so that thin membranes count.
        image_mean, image_std: normalisation of grey values 0..1.
        voxel_size: nm (z, y, x) that the model is meant for; prediction warns when the volume's differs.
        plan: blocks of prediction.
        segmentation: default post-processing.
    """

    model: UNetConfig = UNetConfig()
    offsets: tuple[Offset, ...] = NEAREST_OFFSETS
    predicted: Literal["nearest", "all"] = "nearest"
    widen_borders: Triple | None = (1, 3, 3)
    loss: Literal["bce", "mse"] = "bce"
    dice_weight: float = 0.0
    class_balance: bool = True
    side_weight: float = 0.4
    image_mean: float = 0.5
    image_std: float = 0.13
    voxel_size: tuple[float, float, float] | None = None
    plan: Block = Block(size=(32, 128, 128), stride=(24, 96, 96), halo=(4, 16, 16))
    segmentation: Segmentation = Segmentation()


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    config.model.validate()
    config.plan.validate()
    if check_offsets(config.offsets)[:3] != NEAREST_OFFSETS:
        raise UserError(f"offsets: the first three must be {NEAREST_OFFSETS}, found {config.offsets[:3]}")
    if config.segmentation.fragments == "mutex" and (config.predicted != "all" or len(config.offsets) < 4):
        raise UserError(
            f"segmentation.fragments 'mutex' with predicted {config.predicted!r} of {len(config.offsets)} offsets; "
            "expected 'all', and offsets beyond the nearest"
        )
    multiple = config.model.multiple()
    if any(size % step for size, step in zip(config.plan.size, multiple)):
        raise UserError(f"plan.size {config.plan.size} is not a multiple of {multiple}, the network's total pooling")


def build(config: Config, rngs: nnx.Rngs) -> UNet:
    """The network."""
    return UNet(config.model, 1, len(config.offsets), rngs=rngs)


def trainable(config: Config, path: str) -> bool:
    """Every parameter trains."""
    return True


def _normalise(config: Config, image: jax.Array) -> jax.Array:
    return ((unit_grey(image) - config.image_mean) / config.image_std)[..., None]


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``affinities`` and ``weights``, both (b, z, y, x, offset), from ``batch["labels"]`` and an optional mask."""
    labels = batch["labels"]
    wanted = affinities(labels if config.widen_borders is None else widen(labels, config.widen_borders), config.offsets)
    mask = batch.get("mask", jnp.ones(labels.shape, jnp.uint8))
    weights = affinity_mask(mask, config.offsets, "masked")
    if config.class_balance:
        weights = balancing_weights(wanted, weights, "channel")
    return {"affinities": wanted, "weights": weights}


def _affinity_loss(config: Config, logits: jax.Array, wanted: jax.Array, weights: jax.Array) -> jax.Array:
    if config.loss == "bce":
        value = losses.binary_cross_entropy(logits, wanted, weights)
    else:
        value = losses.mean_squared_error(jax.nn.sigmoid(logits), wanted, weights)
    if config.dice_weight:
        value += config.dice_weight * losses.dice(jax.nn.sigmoid(logits), wanted, weights > 0)
    return value


def loss(
    config: Config, model: UNet, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of the affinity logits; coarser levels of deep supervision count ``side_weight`` each."""
    wanted = targets(config, batch)
    logits = model(_normalise(config, batch["image"]))
    main, *sides = logits if isinstance(logits, tuple) else (logits,)
    value = _affinity_loss(config, main, wanted["affinities"], wanted["weights"])
    scalars = {"affinity_loss": value}
    for side in sides:
        # A coarse voxel is compared with the mean affinity of the voxels that it covers.
        shape = side.shape
        cover = [fine // coarse for fine, coarse in zip(main.shape[1:4], shape[1:4])]
        folded = (shape[0], shape[1], cover[0], shape[2], cover[1], shape[3], cover[2], shape[4])
        coarse, weights = (wanted[name].reshape(folded).mean((2, 4, 6)) for name in ("affinities", "weights"))
        value += config.side_weight * _affinity_loss(config, side, coarse, weights)
    right = (main > 0) == (wanted["affinities"] > 0.5)
    # Balanced accuracy is the honest figure: 95 % of affinities are 1.
    counted = wanted["weights"] > 0
    positive = wanted["affinities"] > 0.5
    recall = losses.weighted_mean(right, counted & positive)
    specificity = losses.weighted_mean(right, counted & ~positive)
    return value, scalars | {"recall": recall, "specificity": specificity}


def _predicted(config: Config) -> tuple[Offset, ...]:
    return config.offsets if config.predicted == "all" else NEAREST_OFFSETS


def predict(config: Config, model: UNet, image: jax.Array) -> dict[str, jax.Array]:
    """``affinities`` (b, z, y, x, offset) in [0, 1], of the three nearest neighbours or of all offsets."""
    logits = model(_normalise(config, image))
    main = logits[0] if isinstance(logits, tuple) else logits
    return {"affinities": jax.nn.sigmoid(main[..., : len(_predicted(config))])}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame."""
    return {"affinities": flip_back_affinities(outputs["affinities"], _predicted(config), axes)}


def outputs(config: Config) -> dict[str, Output]:
    """The affinities, with their offsets."""
    offsets = [list(offset) for offset in _predicted(config)]
    return {"affinities": Output(kind="affinities", channels=len(offsets), attributes={"offsets": offsets})}


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Labels uint32 (z, y, x) from ``affinities`` (offset, z, y, x), float32 or uint8 (scaled by 255)."""
    settings = config.segmentation
    everything = np.asarray(outputs["affinities"])
    wanted = everything[:3]
    if settings.fragments == "mutex":
        fragments = mutex_watershed(everything, _predicted(config))
    else:
        fragments = watershed(wanted, settings.low, settings.high)
    if settings.regrow:
        fragments = regrow(fragments, wanted, settings.regrow)
    tree = agglomerate(region_graph(wanted, fragments), settings.threshold, score=settings.score)
    return apply(tree.cut(settings.threshold), fragments)


def agglomeration(config: Config) -> Segmentation:
    """``decode`` is watershed and agglomeration with these settings, which also run block by block."""
    return config.segmentation


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan
