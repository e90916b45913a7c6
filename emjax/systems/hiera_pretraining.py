"""Masked pretraining of SAM 2's image encoder on unlabelled EM slices: the "EM-prior" of SAM4EM and FGNet.

It stands in where no SAM 2 weights are at hand, and is not SAM 2: no image but EM has been seen. Random blocks of every
slice are filled with noise of the slice's own mean and deviation (as in SegNeuron's pretraining); trunk and neck restore
grey values and gradients of what is hidden, cell by cell of 4 x 4 pixels. Masked autoencoders restore grey values (He et
al. 2022), MaskFeat histograms of oriented gradients (Wei et al. 2022).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.hog import ORIENTATIONS, hog_histogram
from emjax.data.masking import Fill, draw, hidden_patch, visible
from emjax.errors import UserError
from emjax.losses import weighted_mean
from emjax.models.sam2.config import STRIDE, SAM2Config, sam2_config
from emjax.models.sam2.pretraining import CELL, MaskedEncoder
from emjax.models.unet import depth_to_space, space_to_depth
from emjax.systems.protocol import Block, Output, unit_grey

PIXELS = CELL * CELL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Pretraining.

    Attributes:
        encoder: trunk and neck; the system that starts from the run must have the same trunk.
        width: channels of the head, which is thrown away.
        fill: what hidden blocks hold: ``"gaussian"``, ``"zero"`` or ``"mean"``.
        blocks: sides of hidden blocks in pixels (y, x), multiples of 4, one drawn for each slice.
        ratio: smallest and largest share of hidden blocks.
        image_weight, hog_weight: of the squared errors of grey values and of gradients, both over hidden cells alone.
        plan: blocks of prediction, to look at restored volumes.
    """

    encoder: SAM2Config = sam2_config("tiny", image_only=True)
    width: int = 128
    fill: Fill = "gaussian"
    blocks: tuple[tuple[int, int], ...] = ((16, 16), (32, 32))
    ratio: tuple[float, float] = (0.5, 0.7)
    image_weight: float = 1.0
    hog_weight: float = 1.0
    plan: Block = Block(size=(8, 128, 128), stride=(8, 64, 64), blending="gaussian")

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """``blocks`` as (z, y, x), of one slice."""
        return tuple((1, *sides) for sides in self.blocks)


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    if config.encoder.hiera.lora is not None:
        raise UserError(
            "hiera_pretraining: encoder.hiera.lora is set; adapters belong to the system that is fine-tuned"
        )
    if config.fill not in ("gaussian", "zero", "mean"):
        raise UserError(f"hiera_pretraining: fill {config.fill!r}, expected 'gaussian', 'zero' or 'mean'")
    if not config.blocks or any(
        len(sides) != 2 or min(sides) < 1 or any(s % CELL for s in sides) for sides in config.blocks
    ):
        raise UserError(
            f"hiera_pretraining: blocks {config.blocks}, expected sides (y, x) that are multiples of {CELL}"
        )
    if not 0 < config.ratio[0] <= config.ratio[1] < 1:
        raise UserError(f"hiera_pretraining: ratio {config.ratio}, expected (smallest, largest) between 0 and 1")
    if min(config.image_weight, config.hog_weight) < 0 or config.image_weight + config.hog_weight == 0:
        raise UserError(
            f"hiera_pretraining: image_weight {config.image_weight} and hog_weight {config.hog_weight}, expected "
            "numbers from 0 up that are not both 0"
        )
    config.plan.validate()
    _check_plane(config.plan.size[1:], "plan.size")


def _check_plane(shape: tuple[int, ...], name: str) -> None:
    if any(side % STRIDE for side in shape):
        raise UserError(f"hiera_pretraining: {name} is {tuple(shape)} (y, x), expected multiples of {STRIDE}")


def build(config: Config, rngs: nnx.Rngs) -> MaskedEncoder:
    """The encoder with its head."""
    return MaskedEncoder(config.encoder, config.width, PIXELS + ORIENTATIONS, rngs)


def trainable(config: Config, path: str) -> bool:
    """Every parameter trains."""
    return True


def inherited(other: Any, encoder: SAM2Config, name: str = "image_encoder") -> dict[str, str] | None:
    """For ``inherits`` of a system with an image encoder at ``name``: what it takes over from a run of ``other``.

    ``{part of the pretrained network: part of this network}``: the trunk, and the neck where both are equally wide; or
    None if ``other`` is no run of this pretraining.
    """
    if not isinstance(other, Config):
        return None
    parts = ("trunk", "neck") if other.encoder.features == encoder.features else ("trunk",)
    return {f"image_encoder.{part}": f"{name}.{part}" for part in parts}


def _slices(image: jax.Array) -> jax.Array:
    """(b, z, y, x) to (b * z, y, x), 0..1."""
    _check_plane(image.shape[2:], "the crop")
    return unit_grey(image).reshape(-1, *image.shape[2:])


def _cells(slices: jax.Array) -> jax.Array:
    """(n, y, x) to (n, y / 4, x / 4, 16)."""
    return space_to_depth(slices[:, None, :, :, None], (1, CELL, CELL))[:, 0]


def _moments(clean: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, deviation = clean.mean((-2, -1), keepdims=True), clean.std((-2, -1), keepdims=True)
    return mean, jnp.maximum(deviation, 1e-3)


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``image`` (n, y / 4, x / 4, 16) and ``hog`` (n, y / 4, x / 4, 9) of the slices, n = b * z, float32.

    Grey values have the mean 0 and the deviation 1 in every slice. Histograms are divided by the slice's mean, then
    their square root is taken, so that the strongest edges do not count for all.
    """
    clean = _slices(batch["image"])
    mean, deviation = _moments(clean)
    histogram = hog_histogram(clean)
    strength = histogram.mean((-3, -2, -1), keepdims=True)
    return {
        "image": _cells((clean - mean) / deviation),
        "hog": jnp.sqrt(histogram / jnp.maximum(strength, 1e-4)),
    }


def hidden(config: Config, clean: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slices (n, y, x) with hidden blocks, and which cells are hidden, bool (n, y / 4, x / 4); each drawn by itself."""

    def one(slice_: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (1, slice_.shape[0], slice_.shape[1])
        draws = draw(key, shape, config.shapes, config.ratio)
        seen = visible(draws, shape, config.shapes)
        return hidden_patch(slice_[None], draws, config.shapes, config.fill)[0], ~seen[0, ::CELL, ::CELL]

    return jax.vmap(one)(clean, jax.random.split(key, len(clean)))


def loss(
    config: Config, model: MaskedEncoder, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the squared errors in hidden cells. Of ``image_loss``, 1 is the slice's mean as the answer."""
    wanted = targets(config, batch)
    seen, hide = hidden(config, _slices(batch["image"]), key)
    found = model(seen)
    weights = hide[..., None].astype(jnp.float32)
    image = weighted_mean(jnp.square(found[..., :PIXELS] - wanted["image"]), weights)
    hog = weighted_mean(jnp.square(found[..., PIXELS:] - wanted["hog"]), weights)
    return config.image_weight * image + config.hog_weight * hog, {"image_loss": image, "hog_loss": hog}


def predict(config: Config, model: MaskedEncoder, image: jax.Array) -> dict[str, jax.Array]:
    """``restored`` (b, z, y, x, 1) in 0..1 of an image without hidden blocks."""
    clean = _slices(image)
    mean, deviation = _moments(clean)
    grey = depth_to_space(model(clean)[:, None, ..., :PIXELS], (1, CELL, CELL))[:, 0, ..., 0] * deviation + mean
    return {"restored": jnp.clip(grey, 0, 1).reshape(*image.shape, 1)}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame."""
    return {name: jnp.flip(values, [axis + 1 for axis in axes]) for name, values in outputs.items()}


def outputs(config: Config) -> dict[str, Output]:
    """The restored image."""
    return {"restored": Output(kind="probability", channels=1)}


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Raises ``UserError``: this network restores images and segments nothing."""
    raise UserError(
        "this is a checkpoint of the EM-prior's pretraining, which restores images and segments nothing; start SAM4EM or "
        "FGNet from it with --config.train.init_from=DIR"
    )


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan
